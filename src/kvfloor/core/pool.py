"""Keep the caches of many requests of one layer in blocks of bytes that a serving engine owns.

A method is the configuration of a compressed KV cache, a spec its sizes, dtype and constants. A state is the cache
itself: the tokens that it holds, and its counters. The engine gives each request one block of bytes per layer, which
holds the request's state of that layer, and frees the block when the request ends. All blocks have one size. "Block"
alone always means a block of bytes. A token block is a fixed number of consecutive tokens of a request; methods evict
tokens where one ends. A decode step gives one new token to each request of a call.
A torn block is one whose bytes are not to be used: an exception interrupted a call that was changing it, or a decode
step gave its request a q, k or v with NaN or infinite entries. Calls that would read a torn block raise BrokenState.
A row is one (request, kv head) stream. A slot is the place of one held token. The requests of one call may have
different numbers of tokens. In shapes, n are the requests of a call, H kv heads, g query heads per kv head (GQA group),
t tokens, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kvfloor.core.attend_blocks import attend_blocks
from kvfloor.core.blocked import Blocked
from kvfloor.core.bounded import Bounded
from kvfloor.core.broken import BrokenState
from kvfloor.core.decoding import DecodeBatch
from kvfloor.core.layout import Layout
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.core.watching import Watching

AT_ONCE = 8
"""Most requests whose states are copied out of their blocks at a time. The copy takes memory beside the engine's."""

STALE = "the batch was made for other clocks than these blocks have: make it anew for each step"


def opened(method: Method, spec: Spec, g: int, tokens: int | None = None) -> State:
    """Open an empty state for one request, and allocate all memory that it will ever need.

    spec    sizes, dtype and constants; one row per kv head of the request
    g       query heads per kv head
    tokens  most tokens of a request; the method `exact`, which keeps every token, needs it. None: not known
    Raises ValueError for a method whose memory would grow with the stream, for `exact` if `tokens` is None, and for
    budgets that differ between kv heads.
    """
    if isinstance(method, Bounded) and isinstance(method.budget, tuple):
        raise ValueError(f"{method} gives heads different budgets; in blocks of one size, give one number of tokens")
    state = method.open(spec)
    state.reserve(g, tokens)
    return state


def block_bytes(method: Method, spec: Spec, g: int, tokens: int | None = None) -> int:
    """Return the size in bytes of a block, which holds one request's state of one layer.

    spec    sizes, dtype and constants; one row per kv head of a request
    g       query heads per kv head
    tokens  most tokens of a request; the method `exact`, which keeps every token, needs it. None: not known
    Raises ValueError for a method whose memory would grow with the stream, for `exact` if `tokens` is None, and for
    budgets that differ between kv heads.
    """
    return Layout.of(opened(method, spec, g, tokens)).nbytes


class Pool:
    """Read and write the states in the blocks of one layer.

    Before a block is first used, `clear` must write an empty state into it. If an exception interrupts a call while it
    changes blocks, these blocks are torn: later calls on them raise BrokenState, until `clear`, `put` or `copy`
    overwrites them. Other blocks are not affected. Calls name blocks by their indices: `ids` (n,) int64, without
    repeats.

    layout  offset, shape and dtype of each tensor and number in a block
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, method: Method, spec: Spec, g: int, blocks: Tensor, tokens: int | None = None) -> None:
        """Build the pool over the engine's memory; no byte of it is read or written.

        method  the configuration of the cache, with its budget in tokens per kv head
        spec    sizes, dtype and constants; one row per kv head of a request. Its row ids, which seed random draws, are
                the same for all requests, so that no request depends on its neighbours
        g       query heads per kv head
        blocks  (blocks, bytes) uint8: the engine's memory. A block's bytes lie together; the blocks may lie apart
        tokens  most tokens of a request; the method `exact`, which keeps every token, needs it. None: not known
        Raises ValueError for a method whose memory would grow with the stream, for budgets that differ between kv
        heads, and for blocks that are too small or not aligned to 8 bytes.
        """
        self.method, self.spec, self.g, self._tokens = method, spec, g, tokens
        empty = opened(method, spec, g, tokens)
        self.layout = Layout.of(empty)
        if blocks.is_inference():  # a state writes outside inference mode, where such a tensor cannot be written to
            blocks = torch.from_dlpack(blocks)
        self._blocks = blocks
        self._views = self.layout.views(blocks)
        self._empty = torch.zeros(1, self.layout.nbytes, dtype=torch.uint8, device=blocks.device)
        self.layout.store(empty, self.layout.views(self._empty), torch.zeros(1, dtype=torch.int64))
        self._plain = isinstance(empty, Blocked) and empty._plainly_read and empty.slots.plain and spec.rotation is None
        self._watches = isinstance(empty, Watching) and empty.queries is not None
        self._block = empty.block if isinstance(empty, Blocked) else 1
        self._capacity = method.budget if isinstance(method, Bounded) and isinstance(method.budget, int) else None
        self._shells: dict[int, State] = {}  # number of requests -> state to use again, with new tensors
        self._torn: dict[int, str] = {}  # index of each torn block -> why it is torn
        self._unsettled: DecodeBatch | None = None  # the last step, if its check for NaN and infinity is unread

    # ---- whole blocks ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def clear(self, ids: Tensor) -> None:
        """Overwrite these blocks by empty states. No byte of the old states is left."""
        ids = self._known(ids, torn=True)
        self._blocks[ids, : self.layout.nbytes] = self._empty
        self._mend(ids.tolist())

    @torch.inference_mode()
    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy the state in block source[i] into block target[i] for each i, to fork requests; both are (n,)."""
        source, target = self._known(source), self._known(target, torn=True)
        with self._writing(target.tolist()):
            self._blocks[target, : self.layout.nbytes] = self._blocks[source, : self.layout.nbytes]

    @torch.inference_mode()
    def take(self, ids: Tensor) -> State:
        """Return a copy of the states in these blocks as one state of n H rows, request after request.

        Later changes of the blocks do not change the copy. Raises ValueError if the prompt has ended in some of the
        requests but not in all.
        """
        return self._filled(self._known(ids), bound=False)

    @torch.inference_mode()
    def put(self, ids: Tensor, state: State) -> None:
        """Write a state of n H rows, request after request, into these n blocks; the inverse of `take`.

        Raises ValueError for a state of another method or size.
        """
        ids = self._known(ids, torn=True)
        if state.method != self.method or state.spec.rows != len(ids) * self.spec.rows:
            raise ValueError(
                f"the state is of {state.method} and has {state.spec.rows} rows; {len(ids)} blocks hold {self.method} "
                f"with {self.spec.rows} rows each"
            )
        with self._writing(ids.tolist()):
            self.layout.store(state, self._views, ids)

    @torch.inference_mode()
    def seen(self, ids: Tensor) -> Tensor:
        """Return the number of tokens appended to each of these requests so far, (n,) int64."""
        return self._views["seen"][self._known(ids), 0]

    @torch.inference_mode()
    def held(self, ids: Tensor) -> Tensor:
        """Return the number of tokens whose key and value each kv head of these requests holds, (n, H) int64.

        It is 0 for methods that keep no keys and values.
        """
        held = self._views.get("slots.held")
        ids = self._known(ids)
        return self._views["seen"][ids] * 0 if held is None else held[ids]

    @torch.inference_mode()
    def batch(self, ids: Tensor, seen: Tensor | None = None, deferred: bool | None = None) -> DecodeBatch:
        """Prepare a decode step of one new token for each of these requests, for the pools of all layers.

        One batch serves all layers, because a request has the same token counts in all of them.
        seen      (n,) tokens appended to each request so far, on the CPU. None: the counts are read from the blocks,
                  which waits for their device
        deferred  False: `step` reads from the device whether q, k and v are finite before it changes a block, and
                  waits for the device to do so. True: `step` leaves the result on the device, unread. It is read by the
                  pool's next call, by `DecodeBatch.require_finite`, or before tokens are evicted, whichever comes
                  first. If a request had NaN or infinite entries, its block is torn. If this is found before an
                  eviction, the step raises ValueError and all blocks of the batch are torn in this pool. None: True if
                  `seen` is given and the blocks are not on the CPU. Methods with a selector, a summary or rotated keys
                  are always checked as for False
        """
        ids = self._known(ids)
        clock = self.seen(ids).cpu() if seen is None else seen.to(torch.int64)
        if self._capacity is None:
            held = clock
        else:  # evictions at block ends bring a row down to its budget
            last = clock - clock % self._block
            held = last.clamp_max(self._capacity) + clock - last
        device = self._blocks.device
        deferred = (seen is not None and device.type != "cpu") if deferred is None else deferred
        return DecodeBatch.of(ids, len(self._blocks), clock, held, self._block, device, deferred)

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def seal(self, ids: Tensor) -> None:
        """Mark the end of the prompt of these requests.

        Methods that evict or compress at the end of the prompt do so now. The call changes nothing in a request whose
        prompt was marked as ended already.
        """
        ids = self._known(ids)
        ids = ids[(self._views["sealed"][ids, 0] == 0).cpu()]
        with self._writing(ids.tolist()):
            for some in ids.split(AT_ONCE) if len(ids) else ():
                with self._lent(some) as state:
                    state.seal()

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor | DecodeBatch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        count: Tensor | None = None,
    ) -> Tensor:
        """Append tokens and answer their queries causally: token i of a request attends to its tokens up to itself.

        ids    (n,) the requests' blocks; or, for one token of each request, the `DecodeBatch` that `batch` returned for
               them
        q      (n, H, g, t, d) -> outputs (n, H, g, t, dv) in the spec's dtype, 0 for padding
        k, v   (n, H, t, d), (n, H, t, dv)
        count  (n,) number of each request's real tokens, which come first; the others are padding. None: all are real
        Raises ValueError for bad input, and BrokenState for a torn block, with the blocks unchanged. Only a batch with
        `deferred` reports NaN or infinite entries later (`batch`).
        """
        if isinstance(ids, DecodeBatch):
            batch = self._taken(ids)
            ids = batch.ids
        else:
            batch, ids = None, self._known(ids)
        self._require(len(ids), q, k, v, count)
        alone = k.shape[2] == 1 and (count is None or bool((count == 1).all()))
        if batch is not None and not alone:
            raise ValueError("a batch is of one token of each request: name the blocks for other numbers of tokens")
        plain = alone and self._plain
        if batch is None or batch.check is None or not plain:
            self._require_finite(q, k, v, count)
        self._require_room(ids, batch, k.shape[2], count)
        if plain:
            return self._decode(self.batch(ids, deferred=False) if batch is None else batch, q, k, v)
        out = torch.zeros(*q.shape[:4], self.spec.dv, dtype=self.spec.dtype, device=q.device)
        for at in self._parts(ids):
            out[at] = self._stepped(ids[at], q[at], k[at], v[at], None if count is None else count[at])
        return out

    def _stepped(self, ids: Tensor, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None) -> Tensor:
        """Append tokens and answer their queries, for requests that are all within or all past their prompts.

        ids    (n,) the requests' blocks
        q      (n, H, g, t, d) -> outputs (n, H, g, t, dv)
        k, v   (n, H, t, d), (n, H, t, dv)
        count  (n,) number of each request's real tokens, which come first; None: all are real
        A single request's state is changed in its block. The states of several requests are copied out of their blocks,
        changed together as one state, and copied back.
        """
        n, _, g, t, d = q.shape
        present = None
        if count is not None:
            real = (torch.arange(t) < count.cpu().unsqueeze(1)).to(k.device)
            present = real.unsqueeze(1).expand(n, self.spec.rows, t).reshape(-1, t)
        with self._writing(ids.tolist()), self._lent(ids) as state:
            out = state.step(q.reshape(-1, g, t, d), k.reshape(-1, t, d), v.reshape(-1, t, self.spec.dv), present)
        return out.view(n, self.spec.rows, g, t, self.spec.dv)

    def _decode(self, batch: DecodeBatch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token to each request and answer its queries q (n, H, g, 1, d): outputs (n, H, g, 1, dv).

        k is (n, H, 1, d), v (n, H, 1, dv). Every query attends to all held tokens of its row and to nothing else. The
        blocks are changed in place, for all requests at once. Afterwards `_close` handles the requests whose token
        block is complete.
        """
        views, at, asked = self._views, batch.held, q.squeeze(3)
        if q.device.type == "cpu" and not torch.equal(views["seen"][batch.index, 0], batch.seen):
            raise ValueError(STALE)
        with self._writing(batch.named):
            self._slots("slots.k")[batch.rows, :, at] = k.squeeze(2)
            if not self.spec.tied:
                self._slots("slots.v")[batch.rows, :, at] = v.squeeze(2)
            self._slots("slots.position")[batch.rows, :, at] = batch.seen.unsqueeze(1)
            if self._watches:
                views["queries"][batch.rows, :, :, batch.fill] = asked
                views["asked"][batch.rows, :, batch.fill] = True
            views["slots.held"][batch.index] += 1
            values = self._slots("slots.k" if self.spec.tied else "slots.v")
            out = attend_blocks(asked, self._slots("slots.k"), values, batch, self.spec.scale, self.spec.softcap)
            views["seen"][batch.index] += 1
            if batch.check is not None:
                batch.check.add(q, k, v)
                self._unsettled = batch
            if batch.complete is not None:
                batch.require_finite()
                self._close(batch.complete)
        return out.unsqueeze(3)

    def _close(self, ids: Tensor) -> None:
        """Handle the end of a token block in the requests of the blocks `ids` (n,), for example by evicting tokens.

        The state of a single request is changed in its block. Several are copied out of their blocks, changed together
        as one state, and copied back; at most AT_ONCE at a time.
        """
        for at in self._parts(ids):
            with self._lent(ids[at]) as state, torch.inference_mode(False), torch.no_grad():
                assert isinstance(state, Blocked)
                state._close(None)

    def _slots(self, name: str) -> Tensor:
        """Return a view (blocks, H, slots, ...) of the field `name`, which has one entry per slot, as "slots.k" has."""
        return self._views[name].unflatten(1, (self.spec.rows, -1))

    # ---- states ----------------------------------------------------------------------------------------------------

    def _parts(self, ids: Tensor) -> Iterator[Tensor]:
        """Split the requests of the blocks `ids` (n,) into groups that one state can hold, by index.

        Yields the indices of each group's blocks into `ids`. A state marks the end of the prompt for all its rows at
        once. So in a group either all prompts have ended or none has. A group has at most AT_ONCE requests.
        """
        sealed = (self._views["sealed"][ids, 0] != 0).cpu()
        for alike in (sealed, ~sealed):
            at = alike.nonzero().squeeze(1)
            if len(at):
                yield from at.split(AT_ONCE)

    @contextmanager
    def _lent(self, ids: Tensor) -> Iterator[State]:
        """Yield the states in the blocks `ids` (n,) as one state of n H rows, for the body of a `with` statement.

        What the body changes in this state is in the blocks afterwards. With one request, the state's tensors are views
        of its block. With several they are copies, which are written back at the end of the body. The state must not be
        used after the body.
        """
        state = self._filled(ids, bound=len(ids) == 1)
        yield state
        self.layout.store(state, self._views, ids)
        if len(ids) > 1:
            self.layout.empty(state)
        self._shells[len(ids)] = state

    @torch.inference_mode(False)
    @torch.no_grad()
    def _filled(self, ids: Tensor, bound: bool) -> State:
        """Return a state of n H rows with the contents of the blocks `ids` (n,), request after request.

        bound: True: its tensors are views of the block, and n must be 1. False: they are copies.
        """
        state, n = self._shells.pop(len(ids), None), len(ids)
        if state is None:
            places = None if self.spec.places is None else tuple(self.spec.places) * n
            rows = {"rows": n * self.spec.rows, "row_ids": tuple(self.spec.row_ids or ()) * n, "places": places}
            state = opened(self.method, replace(self.spec, **rows), self.g, self._tokens)
        if bound:
            self.layout.bind(self._views, int(ids[0]), state)
        else:
            self.layout.load(self._views, ids, state)
        return state

    # ---- torn blocks -----------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, named: Sequence[int]) -> Iterator[None]:
        """Mark the blocks with the indices `named` as torn while the body of the `with` statement changes them.

        If an exception ends the body, the mark stays, and later calls on the blocks raise BrokenState.
        """
        self._torn.update(dict.fromkeys(named, "a call on them broke off"))
        yield
        self._mend(named)

    def _mend(self, named: Sequence[int]) -> None:
        """Remove the torn mark of the blocks with the indices `named`, so that calls on them work again."""
        for block in named:
            self._torn.pop(block, None)

    def _settle(self) -> None:
        """Read whether all q, k and v of the last decode step were finite, if the device's result is still unread.

        Mark as torn the block of each request that had a NaN or infinite entry. The call waits for the device, unless a
        pool of another layer has already read the result.
        """
        if self._unsettled is not None:
            for block in self._unsettled.bad():
                self._torn.setdefault(block, "they got a q, k or v with NaN or infinite entries")
            self._unsettled = None

    def _require_whole(self, named: Sequence[int]) -> None:
        """Raise BrokenState if one of the blocks with the indices `named` is torn."""
        broken = sorted(self._torn.keys() & named) if self._torn else []
        if broken:
            why = " and ".join(sorted({self._torn[block] for block in broken}))
            raise BrokenState(f"the blocks {broken} are torn, as {why}: clear them and start again")

    # ---- input -----------------------------------------------------------------------------------------------------

    def _known(self, ids: Tensor, torn: bool = False) -> Tensor:
        """Check the block indices `ids`, and return them as int64 on the CPU.

        Raises ValueError unless they are a non-empty 1-d tensor of different indices of existing blocks. Raises
        BrokenState for a torn block, unless `torn` is True. An unread check of the last decode step is read first
        (`_settle`).
        """
        ids = torch.as_tensor(ids).to("cpu")
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32) or not len(ids):
            raise ValueError(f"blocks are named by a non-empty 1-d int64 tensor, got {ids.dtype} {tuple(ids.shape)}")
        named = ids.tolist()
        if min(named) < 0 or max(named) >= len(self._blocks) or len(set(named)) < len(named):
            raise ValueError(f"blocks must be different indices in 0..{len(self._blocks) - 1}, got {named}")
        self._settle()
        if not torn:
            self._require_whole(named)
        return ids.to(torch.int64)

    def _taken(self, batch: DecodeBatch) -> DecodeBatch:
        """Check that this pool can take the decode step `batch`, and return it.

        Its block indices were checked when it was made. Raises ValueError if it is for pools with another number of
        blocks, or if it is the pool's last step and defers its check for NaN. Raises BrokenState for a torn block.
        """
        if batch.blocks != len(self._blocks):
            raise ValueError(f"the batch is for pools of {batch.blocks} blocks; this one has {len(self._blocks)}")
        if self._unsettled is batch:
            raise ValueError(STALE)
        self._settle()
        self._require_whole(batch.named)
        return batch

    def _require(self, n: int, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None) -> None:
        """Raise ValueError if q, k, v or count, the arguments of `step` for n requests, do not fit this pool.

        q, k and v must have the shapes that `step` states and the spec's dtype; count must be None or (n,) numbers in
        0..t.
        """
        spec, t = self.spec, k.shape[2] if k.ndim == 4 else -1
        wanted = {
            "q": (n, spec.rows, self.g, t, spec.d),
            "k": (n, spec.rows, t, spec.d),
            "v": (n, spec.rows, t, spec.dv),
        }
        for (name, shape), x in zip(wanted.items(), (q, k, v), strict=True):
            if tuple(x.shape) != shape or x.dtype != spec.dtype:
                raise ValueError(f"{name} must be {spec.dtype} {shape}, got {x.dtype} {tuple(x.shape)}")
        if count is not None and (count.shape != (n,) or int(count.min()) < 0 or int(count.max()) > t):
            raise ValueError(f"count must be (n,) = ({n},) numbers in 0..{t}, got {count.tolist()}")

    def _require_finite(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None) -> None:
        """Raise ValueError if q, k or v of `step` have NaN or infinite entries; those of padding may have any."""
        real = None
        if count is not None and int(count.min()) < k.shape[2]:
            real = torch.arange(k.shape[2]) < count.cpu().unsqueeze(1)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if math.isfinite(x.sum().item()):  # one cheap look; a sum may also overflow
                continue
            finite = torch.isfinite(x).all(-1)
            if real is not None:
                finite |= ~real.to(x.device).view(len(real), *[1] * (finite.ndim - 2), -1)
            if not bool(finite.all()):
                raise ValueError(f"{name} has NaN or infinite entries; no block was changed")

    def _require_room(self, ids: Tensor, batch: DecodeBatch | None, t: int, count: Tensor | None) -> None:
        """Raise ValueError if a request would have more tokens than the pool's argument `tokens` allows.

        ids    (n,) the requests' blocks
        batch  the decode step of these requests; None: the token counts are read from the blocks
        t      number of new tokens per request, padding included
        count  (n,) number of new tokens of each request without padding; None: t
        """
        if self._tokens is None:
            return
        if batch is None:
            longest = int((self._views["seen"][ids, 0].cpu() + (t if count is None else count.cpu())).max())
        else:
            longest = batch.longest
        if longest > self._tokens:
            raise ValueError(f"a request would have {longest} tokens; its block has room for {self._tokens}")
