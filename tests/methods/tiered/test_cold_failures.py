"""A disk that is full, damaged, cut off or gone gives the right answer or a typed error, never a wrong answer.

The faults that each test is for are planted in the last tests, which require that they give wrong answers unnoticed.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor import BrokenState, CorruptState
from kvfloor.core import message
from kvfloor.methods.tiered.cold_blocks import ColdTierError, CorruptBlock
from kvfloor.methods.tiered.cold_disk import DiskBlocks
from tests.methods.tiered.lives import PAGE, ROWS, calls, live, opened_at, tokens
from tests.support import Stream

TOKENS = tokens()
Writes = Callable[[int, memoryview, int], int]


def full(file: int, data: memoryview, offset: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_full(file: int, data: memoryview, offset: int) -> int:
    """Write half of the data, as a disk does that fills up meanwhile, and fail."""
    SYSTEM_WRITE(file, data[: len(data) // 2], offset)
    return full(file, data, offset)


def interrupted(file: int, data: memoryview, offset: int) -> int:
    SYSTEM_WRITE(file, data[: len(data) // 3], offset)
    raise KeyboardInterrupt


def nothing(file: int, data: memoryview, offset: int) -> int:
    return 0


SYSTEM_WRITE = os.pwrite
FAILURES: dict[str, tuple[Writes, type[BaseException]]] = {
    "full": (full, ColdTierError),
    "full in the middle": (half_full, ColdTierError),
    "Ctrl-C": (interrupted, KeyboardInterrupt),
    "nothing is written": (nothing, ColdTierError),
}


@contextmanager
def failing(at: int, how: Writes) -> Iterator[list[int]]:
    """Have the at-th write and all later ones fail; yield a list that grows by an entry with every write."""
    done: list[int] = []

    def write(file: int, data: memoryview, offset: int) -> int:
        done.append(len(data))
        return how(file, data, offset) if len(done) >= at else SYSTEM_WRITE(file, data, offset)

    os.pwrite = write  # type: ignore[assignment]
    try:
        yield done
    finally:
        os.pwrite = SYSTEM_WRITE


def writes_of_a_life() -> int:
    with failing(sys.maxsize, full) as done:
        live(opened_at("disk"), TOKENS)
    return len(done)


WRITES = writes_of_a_life()
EVERY_WAY = [(n, how) for n in (2, 7) for how in FAILURES if tuple(FAILURES)[n % 4] != how]


def require_refused(state: Any) -> None:
    """Require that every call raises BrokenState."""
    q, k, v = (x[..., :1, :] for x in TOKENS)
    for call in (
        lambda: state.step(q[: state.spec.rows], k[: state.spec.rows], v[: state.spec.rows]),
        lambda: state.read(q[: state.spec.rows, 0]),
        state.to_bytes,
        state.clone,
    ):
        with pytest.raises(BrokenState):
            call()


@pytest.mark.parametrize(("nth", "how"), [(n, tuple(FAILURES)[n % 4]) for n in range(1, WRITES + 1)] + EVERY_WAY)
def test_a_write_that_fails_breaks_the_state_and_no_copy_of_it(nth: int, how: str) -> None:
    state, plain = opened_at("disk"), opened_at("device")
    fail, error = FAILURES[how]
    failed = False
    with failing(nth, fail) as done:
        for what, call in calls(TOKENS):
            twin, alone = state.clone(), plain.clone()
            try:
                found = call(state)
            except error:
                failed = True
                break
            wanted = call(plain)
            assert found is None or (wanted is not None and torch.equal(found, wanted)), what
    assert failed and len(done) >= nth
    require_refused(state)
    for again in (twin, twin.clone()):  # the disk has space again
        found, wanted = call(again), call(alone.clone())
        assert found is None or (wanted is not None and torch.equal(found, wanted))
        assert again.to_bytes() == opened_twin(again).to_bytes()


def opened_twin(state: Any) -> Any:
    return state.method.from_bytes(state.to_bytes())


def test_a_life_writes_often() -> None:
    assert WRITES >= 8


@pytest.mark.parametrize("what", ["a prompt", "token 47", "a padded chunk", "a last chunk"])
def test_a_disk_that_is_known_to_be_full_leaves_the_state_as_it_was(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, plain = opened_at("disk"), opened_at("device")
    for name, call in calls(TOKENS):
        if name == what:
            before, asked = state.to_bytes(), 0

            def refuse(file: int, offset: int, size: int) -> None:
                nonlocal asked
                asked += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with monkeypatch.context() as patch:
                patch.setattr(os, "posix_fallocate", refuse)
                with pytest.raises(ColdTierError, match=r"no space for another page: No space left"):
                    call(state)
            assert asked == 1 and state.to_bytes() == before
        found, wanted = call(state), call(plain)
        assert found is None or (wanted is not None and torch.equal(found, wanted))


@pytest.mark.parametrize("reserves", [True, False])
def test_a_real_limit_of_the_system_is_told(reserves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file grow beyond 6 kB, which the system enforces like a full disk."""
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")
    state, (q, k, v) = opened_at("disk"), TOKENS
    state.append(k[:, :16], v[:, :16])
    before, limit = state.to_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limit[1]))
    try:
        with pytest.raises(ColdTierError, match="too large"):
            state.append(k[:, 16:], v[:, 16:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if not reserves:
        require_refused(state)
        return
    assert state.to_bytes() == before
    plain = opened_at("device")
    plain.append(k[:, :16], v[:, :16])
    assert torch.equal(state.step(q[:, :, 16:], k[:, 16:], v[:, 16:]), plain.step(q[:, :, 16:], k[:, 16:], v[:, 16:]))


# ---- damage --------------------------------------------------------------------------------------------------------


def damaged(state: Any, offset: int, new: bytes) -> None:
    assert SYSTEM_WRITE(state.slots.cold._file, new, offset) == len(new)


def bytes_at(state: Any, offset: int, count: int) -> bytes:
    return os.pread(state.slots.cold._file, count, offset)


def filled(dtype: torch.dtype = torch.float32, tied: bool = False) -> tuple[Any, Any, Stream]:
    """Return states with their exact tokens on disk and on the device, and their tokens."""
    given = tokens(3, dtype, tied)
    states = [opened_at(place, dtype=dtype, tied=tied) for place in ("disk", "device")]
    for state in states:
        state.append(given[1], given[2])
    return states[0], states[1], given


def silent(state: Any, plain: Any, asked: Tensor) -> int:
    """Return 1 if a read with all tokens gives a wrong answer, 0 if it gives the right one or a typed error."""
    try:
        found = state.read_certified(asked, 0).partial.mean
    except ColdTierError:
        return 0
    return int(not torch.equal(found, plain.read_certified(asked, 0).partial.mean))


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_every_changed_bit_of_a_record_is_noticed(dtype: torch.dtype, tied: bool) -> None:
    """Change keys, values and tags alike, in the first, a middle and the last record of a file."""
    state, plain, (q, _, _) = filled(dtype, tied)
    size, count = state.slots.cold._record_bytes, state.slots.cold.count * state.slots.page
    whole = bytes_at(state, 0, count * size)
    for record in (0, count // 2, count - ROWS * PAGE - 1):  # the newest page is read from memory
        for place in range(record * size, (record + 1) * size):
            damaged(state, place, bytes([whole[place] ^ (1 << place % 8)]))
            with pytest.raises(CorruptBlock, match=f"1 of [0-9]+ tokens read are not as they were.*record {record}"):
                state.read_certified(q[:, 0, :4].contiguous(), 0)
            damaged(state, place, whole[place : place + 1])
    assert not silent(state, plain, q[:, 0, :4].contiguous())
    assert torch.equal(state.read(q[:, 0]).mean, plain.read(q[:, 0]).mean)  # a read that failed changed nothing


def test_records_that_change_places_are_noticed() -> None:
    state, _, (q, _, _) = filled()
    size = state.slots.cold._record_bytes
    first, second = bytes_at(state, 0, size), bytes_at(state, size, size)
    damaged(state, 0, second + first)
    with pytest.raises(CorruptBlock, match="2 of"):
        state.read_certified(q[:, 0, :4].contiguous(), 0)


def test_damage_in_a_step_is_told_and_breaks_the_state() -> None:
    state, _, (q, k, v) = filled()
    damaged(state, 0, bytes(64) * 100)
    with pytest.raises(CorruptBlock):
        state.step(q, k, v)
    require_refused(state)


def test_a_damaged_token_is_not_saved() -> None:
    state, _, _ = filled()
    damaged(state, 3, b"\xff\xff")
    with pytest.raises(CorruptBlock):
        state.to_bytes()
    with pytest.raises(CorruptBlock):
        state.export()


def truncated_elsewhere(state: Any, size: int) -> None:
    """Have another process truncate the file, which has no name but can be reached through this process."""
    path = f"/proc/{os.getpid()}/fd/{state.slots.cold._file}"
    subprocess.run([sys.executable, "-c", f"import os; os.truncate({path!r}, {size})"], check=True)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_file_that_another_process_truncates_is_noticed(share: float) -> None:
    state, plain, (q, k, v) = filled()
    size = state.slots.cold._record_bytes * state.slots.cold.count * state.slots.page
    truncated_elsewhere(state, int(share * size) // 8 * 8 + 3)
    with pytest.raises(ColdTierError, match="truncated"):
        state.read_certified(q[:, 0, :4].contiguous(), 0)
    twin = state.clone()
    try:
        out = twin.step(q, k, v)  # which lengthens the file again: what was cut off is zeros now
    except ColdTierError:
        require_refused(twin)
    else:
        assert torch.equal(out, plain.clone().step(q, k, v))
    with pytest.raises(CorruptBlock):
        state.read_certified(q[:, 0, :4].contiguous(), 0)


def test_a_disk_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    state, plain, (q, _, _) = filled()

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(ColdTierError, match="could not be read: Input/output error"):
            state.read_certified(q[:, 0, :4].contiguous(), 0)
    assert not silent(state, plain, q[:, 0, :4].contiguous())


def test_reads_that_come_in_pieces_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    state, plain, (q, _, _) = filled()
    system = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, to, at: system(f, [to[0][:37]], at))
    assert torch.equal(state.read(q[:, 0]).mean, plain.read(q[:, 0]).mean)


def test_a_folder_that_is_removed_takes_nothing_away(tmp_path: Path) -> None:
    folder = tmp_path / "cold"
    folder.mkdir()
    state = opened_at("disk", folder=folder)
    folder.rmdir()
    found, wanted = live(state, TOKENS), live(opened_at("device"), TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("where", ["missing", "file/inside"])
def test_a_folder_that_cannot_hold_a_file_is_told(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ColdTierError, match=r"no file can be made: (No such file|Not a directory)"):
        opened_at("disk", folder=tmp_path / where)


def test_a_folder_without_permission_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ColdTierError, match="Permission denied; give a folder"):
        opened_at("disk", folder=tmp_path)


def test_too_little_space_to_load_is_no_corrupt_file() -> None:
    state, _, _ = filled()
    saved, method = state.to_bytes(), state.method
    with failing(1, full), pytest.raises(ColdTierError, match="No space left"):
        method.from_bytes(saved)
    assert method.from_bytes(saved).to_bytes() == saved


def test_a_forged_count_of_tokens_is_refused() -> None:
    state, _, _ = filled()
    header, fields = message.unpack(state.to_bytes())
    fields["slots"]["pushed"] = fields["slots"]["pushed"] + 8
    with pytest.raises(CorruptState, match="tokens given to the exact tier"):
        state.method.from_bytes(message.pack(header, fields))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_reads_on_and_may_not_append() -> None:
    state, plain, (q, k, v) = filled()
    child = os.fork()
    if not child:
        code = 1
        try:
            code += 2 * silent(state, plain, q[:, 0, :4].contiguous())
            state.append(k, v)
        except ColdTierError as refused:
            code = code - 1 if "belongs to process" in str(refused) else 8
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(state.step(q, k, v), plain.step(q, k, v))


# ---- the faults that these tests are for ---------------------------------------------------------------------------


def unchecked(patch: pytest.MonkeyPatch) -> None:
    """Take every record as it is."""
    patch.setattr(DiskBlocks, "_tags", lambda self, records, index: records[:, -8:])


def tags_without_index(patch: pytest.MonkeyPatch) -> None:
    """Leave the record's place in the file out of its tag."""
    real = DiskBlocks._tags
    patch.setattr(DiskBlocks, "_tags", lambda self, records, index: real(self, records, np.zeros_like(index)))


def short_reads_pass(patch: pytest.MonkeyPatch) -> None:
    """Take what follows the end of the file to be zeros."""

    def fill(self: DiskBlocks, into: memoryview, offset: int) -> None:
        into[:] = bytes(len(into))  # memory that was just freed may hold the right bytes
        os.preadv(self._file, [into], offset)

    unchecked(patch)
    patch.setattr(DiskBlocks, "_fill", fill)


@pytest.mark.parametrize("plant", [unchecked, tags_without_index, short_reads_pass])
def test_without_its_defence_the_file_answers_wrongly(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> int:
        state, plain, (q, _, _) = filled()
        asked, size = q[:, 0, :4].contiguous(), state.slots.cold._record_bytes
        if plant is short_reads_pass:
            os.ftruncate(state.slots.cold._file, 40 * size)
        else:
            damaged(state, 0, bytes_at(state, size, size))  # exchanging two tokens would change no answer
        return silent(state, plain, asked)

    assert not wrong()
    plant(monkeypatch)
    assert wrong()
