"""Keep exact tokens in a file that has no name, and check each of them when it is read.

The file holds one record per token: its key, its value, zeros up to a multiple of 4 bytes, and a tag of 8 bytes. The
tag is a checksum of the other bytes and of the record's index in the file, under numbers that are drawn for the file
and never leave the process. It is multilinear hashing of 32-bit words (Carter and Wegman 1979; Lemire and Kaser 2014,
"Strongly universal string hashing is fast"), twice: damage that does not depend on these numbers passes with
probability 2^-64.

The file is made for its owner only, and its name is removed at once. So no other program opens or deletes it, and when
the process ends, however it ends, the system frees the space. The file is no save: nothing can be recovered from it.
"""

from __future__ import annotations

import errno
import os
import secrets
import weakref
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import torch
from torch import Tensor

from kvfloor.core.spec import Spec
from kvfloor.methods.tiered.cold_blocks import Blocks, ColdTierError, CorruptBlock

_TAG_BYTES = 8
_GAP = 8  # records that are read and thrown away rather than begin another read
_PIECE_BYTES = 1 << 24
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


class DiskBlocks(Blocks):
    """Keep blocks in a nameless file in a folder, and verify each token that is read from it.

    The file is closed, and its space freed, when the last copy of the state is gone. Only the process that made it may
    write to it: a forked one may read on, and gets ColdTierError when it appends.
    """

    def __init__(self, spec: Spec, page: int, folder: str) -> None:
        """Make the file in the existing folder `folder`; raise ColdTierError if that is not possible."""
        super().__init__(spec, page)
        self._spec, self.folder, self._lock, self._process = spec, folder, Lock(), os.getpid()
        itemsize = spec.dtype.itemsize
        self._key_bytes, self._value_bytes = self.d * itemsize, self.dv * itemsize
        self._words = -(-(self._key_bytes + self._value_bytes) // 4)
        self._record_bytes = 4 * self._words + _TAG_BYTES
        secret = secrets.token_bytes((self._words + 3) * 2 * 8)  # a factor per word, two for the index, and a summand
        self._secret = np.frombuffer(secret, dtype=np.uint64).reshape(-1, 2)
        self._file = self._made()

    def _made(self) -> int:
        """Make the file without a name, and return its descriptor, which is closed together with this object."""
        if not hasattr(os, "preadv"):
            raise ColdTierError("cold=disk needs a system that reads files at an offset (preadv): take cold=ram")
        path = Path(self.folder) / f".kvfloor-{secrets.token_hex(8)}.cold"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            file = os.open(path, flags, 0o600)
        except (OSError, ValueError) as error:
            raise self._failed("no file can be made", error) from error
        named: Path | None = None
        try:
            os.unlink(path)
        except OSError:  # a file system that keeps names of open files: removed at the end
            named = path
        weakref.finalize(self, _closed, file, named)
        return file

    def _failed(self, what: str, error: Exception) -> ColdTierError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return ColdTierError(
            f"the cold tier in {self.folder!r}: {what}: {reason}; give a folder with space left that you may write to, "
            f"as in Tiered(cold='disk', folder='PATH'), or take cold=ram"
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes of the file that hold blocks, and those of the numbers behind the tags."""
        return self.count * self.page * self._record_bytes + self._secret.nbytes

    def anew(self) -> Self:
        return type(self)(self._spec, self.page, self.folder)

    def reserve(self, blocks: int) -> None:
        """Have the file system set aside the space of so many more blocks, so that a full disk is told beforehand."""
        block_bytes = self.page * self._record_bytes
        if not blocks or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._file, self.count * block_bytes, blocks * block_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise self._failed("no space for another page", error) from error

    def write(self, k: Tensor, v: Tensor) -> Tensor:
        if os.getpid() != self._process:
            raise ColdTierError(
                f"the cold tier's file belongs to process {self._process}, and process {os.getpid()} may not append to "
                f"it: load a saved cache here, or send state.to_bytes()"
            )
        with self._lock:  # a copy of the state, in another thread, may write too
            start, tokens = self.count, len(k) * self.page
            records = np.zeros((tokens, self._record_bytes), dtype=np.uint8)
            records[:, : self._key_bytes] = _raw(k, tokens)
            if self.dv:
                records[:, self._key_bytes : self._key_bytes + self._value_bytes] = _raw(v, tokens)
            first = start * self.page
            records[:, -_TAG_BYTES:] = self._tags(records, np.arange(first, first + tokens, dtype=np.uint64))
            self._put(records.reshape(-1).data, first * self._record_bytes)
            self.count = start + len(k)  # only now: after a failure the next write begins at the same place
        return torch.arange(start, self.count)

    def _put(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                written = os.pwrite(self._file, data[:_PIECE_BYTES], offset)
                if written <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                data, offset = data[written:], offset + written
        except OSError as error:
            raise self._failed("a page could not be written", error) from error

    def _read(self, token: Tensor) -> tuple[Tensor, Tensor]:
        wanted = token.numpy()
        records = self._records(wanted)
        tags = self._tags(records, wanted.astype(np.uint64))
        damaged = (tags != records[:, -_TAG_BYTES:]).any(1)
        if damaged.any():
            raise CorruptBlock(
                f"the cold tier's file in {self.folder!r} was damaged: {int(damaged.sum())} of {len(wanted)} tokens "
                f"read are not as they were written, the first of them record {int(wanted[damaged][0])}: reset() the "
                f"cache, or load the last one you saved"
            )
        stop = self._key_bytes + self._value_bytes
        return self._tensor(records[:, : self._key_bytes]), self._tensor(records[:, self._key_bytes : stop])

    def _tensor(self, raw: np.ndarray) -> Tensor:
        width = raw.shape[1] // self.dtype.itemsize
        if not raw.size:
            return torch.zeros(len(raw), width, dtype=self.dtype)
        return torch.from_numpy(np.ascontiguousarray(raw)).view(self.dtype)

    def _records(self, wanted: np.ndarray) -> np.ndarray:
        """Return the records with these ascending indices (e,), as bytes (e, record), with one read per run of them."""
        size = self._record_bytes
        if not len(wanted):
            return np.zeros((0, size), dtype=np.uint8)
        begins = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - _GAP - 1) > _GAP)
        first, last = wanted[begins], wanted[np.append(begins[1:], len(wanted)) - 1]
        counts = last - first + 1
        place = np.cumsum(counts) - counts  # of each run's first record in what is read
        read = np.empty((int(counts.sum()), size), dtype=np.uint8)
        into = read.reshape(-1).data
        for at, start, count in zip(place.tolist(), first.tolist(), counts.tolist(), strict=True):
            self._fill(into[at * size : (at + count) * size], start * size)
        shift = np.repeat(place - first, np.diff(np.append(begins, len(wanted))))
        return read[wanted + shift]

    def _fill(self, into: memoryview, offset: int) -> None:
        """Read bytes from the file at `offset` until `into` is full."""
        done = 0
        try:
            while done < len(into):
                got = os.preadv(self._file, [into[done:]], offset + done)
                if not got:
                    raise OSError(errno.EIO, f"the file ends after {offset + done} bytes: it was truncated")
                done += got
        except OSError as error:
            raise self._failed("tokens could not be read", error) from error

    def _tags(self, records: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the tags (e, 8), uint8, of records (e, record), uint8, at the indices (e,), uint64, of the file."""
        words = records[:, :-_TAG_BYTES].view(np.uint32).astype(np.uint64)
        low, high = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
        own, place, rest = self._secret[: self._words], self._secret[self._words : -1], self._secret[-1]
        total = words @ own + low[:, None] * place[0] + high[:, None] * place[1] + rest  # modulo 2^64
        tags = (total >> np.uint64(32)).astype(np.uint32)
        return np.ascontiguousarray(tags).view(np.uint8).reshape(len(records), _TAG_BYTES)


def _raw(x: Tensor, tokens: int) -> np.ndarray:
    """Return the entries of x (b, page, w) as bytes (tokens, bytes of a token)."""
    flat = x.detach().to("cpu").contiguous().view(tokens, x.shape[-1])
    return flat.view(torch.uint8).numpy()


def _closed(file: int, named: Path | None) -> None:
    with suppress(OSError):
        os.close(file)
    if named is not None:
        with suppress(OSError):
            named.unlink()
