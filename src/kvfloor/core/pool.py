"""Keep the caches of many requests of one layer in blocks of bytes that a serving engine owns.

A method is the configuration of a compressed KV cache, a spec its sizes, dtype and constants. A state is the cache
itself: the tokens that it holds, and its counters. The engine gives each request one block of bytes per layer, which
holds the request's state of that layer, and frees the block when the request ends. All blocks have one size. "Block"
alone always means a block of bytes. A token block is a fixed number of consecutive tokens of a request; methods evict
tokens where one ends.
A row is one (request, kv head) stream. A slot is the place of one held token. The requests of one call may have
different numbers of tokens. In shapes, n are the requests of a call, H kv heads, g query heads per kv head (GQA group),
t tokens, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfloor.core.attend import attend, fused
from kvfloor.core.blocked import Blocked
from kvfloor.core.bounded import Bounded
from kvfloor.core.broken import BrokenState
from kvfloor.core.layout import Layout
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.core.watching import Watching

AT_ONCE = 8
"""Most requests whose states `step` copies out of their blocks at a time; each layer keeps memory for the copy."""


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


@dataclass(frozen=True)
class DecodeBatch:
    """Hold the block indices and token counts for a decode step, which gives one new token to each of n requests.

    They are the same in all layers. Counts are those before the step.

    ids       (n,) index of each request's block, on the CPU
    index     the same indices on the blocks' device, or a slice if they are consecutive
    rows      (n,) the same indices as a tensor on the blocks' device
    seen      (n,) tokens appended to each request so far
    held      (n,) tokens that each kv head of the request holds
    fill      (n,) tokens in the request's last token block, if that is not complete; else 0
    width     largest number of tokens that a kv head holds once the new token is added
    visible   bool (n, 1, 1, width), True for slots that hold a token then; None: all slots do
    complete  (c,) indices, on the CPU, of the blocks of those requests whose token block the new token completes; None:
              there are none
    """

    ids: Tensor
    index: Tensor | slice
    rows: Tensor
    seen: Tensor
    held: Tensor
    fill: Tensor
    width: int
    visible: Tensor | None
    complete: Tensor | None

    @classmethod
    def of(cls, ids: Tensor, seen: Tensor, held: Tensor, block: int, device: torch.device) -> DecodeBatch:
        """Make the batch from the requests' block indices and their token counts before the step.

        ids     (n,) index of each request's block, on the CPU
        seen    (n,) tokens appended to each request so far, on the CPU
        held    (n,) tokens that each of its kv heads holds, on the CPU
        block   number of tokens in a token block
        device  that of the blocks
        """
        named, counts, fill = ids.tolist(), held.tolist(), seen % block
        width = max(counts) + 1
        visible = None
        if min(counts) + 1 < width:
            visible = (torch.arange(width) <= held.unsqueeze(1)).view(-1, 1, 1, width).to(device)
        consecutive = all(b == a + 1 for a, b in pairwise(named))
        rows = ids.to(device)
        index = slice(named[0], named[-1] + 1) if consecutive else rows
        ends = fill == block - 1
        complete = ids[ends] if bool(ends.any()) else None
        return cls(ids, index, rows, seen.to(device), held.to(device), fill.to(device), width, visible, complete)


class Pool:
    """Read and write the states in the blocks of one layer.

    Before a block is first used, `clear` must write an empty state into it. If an exception interrupts a call while it
    changes blocks, later calls on these blocks raise BrokenState, until `clear`, `put` or `copy` overwrites the blocks.
    Other blocks are not affected. Calls name blocks by their indices: `ids` (n,) int64, without repeats.

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
        self._plain = isinstance(empty, Blocked) and empty._plainly_read and spec.rotation is None
        self._watches = isinstance(empty, Watching) and empty.queries is not None
        self._block = empty.block if isinstance(empty, Blocked) else 1
        self._capacity = method.budget if isinstance(method, Bounded) and isinstance(method.budget, int) else None
        self._working: State | None = None  # the state that blocks were copied out to last
        self._lens: State | None = None  # a state of one request that is bound to one block after the other
        self._torn: set[int] = set()

    # ---- whole blocks ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def clear(self, ids: Tensor) -> None:
        """Overwrite these blocks by empty states. No byte of the old states is left."""
        ids = self._known(ids, torn=True)
        self._blocks[ids, : self.layout.nbytes] = self._empty
        self._torn.difference_update(ids.tolist())

    @torch.inference_mode()
    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy the state in block source[i] into block target[i] for each i, to fork requests; both are (n,)."""
        source, target = self._known(source), self._known(target, torn=True)
        with self._writing(target):
            self._blocks[target, : self.layout.nbytes] = self._blocks[source, : self.layout.nbytes]

    @torch.inference_mode()
    def take(self, ids: Tensor) -> State:
        """Return a copy of the states in these blocks as one state of n H rows, request after request.

        Later changes of the blocks do not change the copy. Raises ValueError if the prompt has ended in some of the
        requests but not in all.
        """
        ids = self._known(ids)
        taken = self._loaded(ids)
        self._working = None
        return taken

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
        with self._writing(ids):
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
    def batch(self, ids: Tensor, seen: Tensor | None = None) -> DecodeBatch:
        """Prepare a decode step of one new token for each of these requests, for the pools of all layers.

        One batch serves all layers, because a request has the same token counts in all of them.
        seen: (n,) tokens appended to each request so far, on the CPU. None: the counts are read from the blocks, which
        waits for their device.
        """
        ids = self._known(ids)
        clock = self.seen(ids).cpu() if seen is None else seen.to(torch.int64)
        if self._capacity is None:
            held = clock
        else:  # evictions at block ends bring a row down to its budget
            last = clock - clock % self._block
            held = last.clamp_max(self._capacity) + clock - last
        return DecodeBatch.of(ids, clock, held, self._block, self._blocks.device)

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def seal(self, ids: Tensor) -> None:
        """Mark the end of the prompt of these requests.

        Methods that evict or compress at the end of the prompt do so now. The call changes nothing in a request whose
        prompt was marked as ended already.
        """
        ids = self._known(ids)
        ids = ids[(self._views["sealed"][ids, 0] == 0).cpu()]
        with self._writing(ids):
            for block in ids.split(1) if len(ids) else ():
                state = self._bound(block)
                state.seal()
                self.layout.store(state, self._views, block)

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
        Raises ValueError for bad input, with the blocks unchanged.
        """
        batch = ids if isinstance(ids, DecodeBatch) else None
        ids = self._known(ids.ids if isinstance(ids, DecodeBatch) else ids)
        self._require(ids, q, k, v, count)
        if self._plain and k.shape[2] == 1 and (count is None or bool((count == 1).all())):
            return self._decode(self.batch(ids) if batch is None else batch, q, k, v)
        out = torch.zeros(*q.shape[:4], self.spec.dv, dtype=self.spec.dtype, device=q.device)
        for at in self._parts(ids):
            out[at] = self._stepped(ids[at], q[at], k[at], v[at], None if count is None else count[at])
        return out

    def _stepped(self, ids: Tensor, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None) -> Tensor:
        """Append tokens and answer their queries, for requests that are all within or all past their prompts.

        ids    (n,) the requests' blocks
        q      (n, H, g, t, d) -> outputs (n, H, g, t, dv), 0 for padding
        k, v   (n, H, t, d), (n, H, t, dv)
        count  (n,) number of each request's real tokens, which come first; the others are padding. None: all are real
        A single request's state is changed in its block. The states of several requests are copied out of their blocks,
        changed together as one state, and copied back.
        """
        n, _, g, t, d = q.shape
        present = None
        if count is not None:
            real = (torch.arange(t) < count.cpu().unsqueeze(1)).to(k.device)
            present = real.unsqueeze(1).expand(n, self.spec.rows, t).reshape(-1, t)
        with self._writing(ids):
            state = self._bound(ids) if n == 1 else self._loaded(ids)
            out = state.step(q.reshape(-1, g, t, d), k.reshape(-1, t, d), v.reshape(-1, t, self.spec.dv), present)
            self.layout.store(state, self._views, ids)
        return out.view(n, self.spec.rows, g, t, self.spec.dv)

    def _decode(self, batch: DecodeBatch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token to each request and answer its queries q (n, H, g, 1, d): outputs (n, H, g, 1, dv).

        k is (n, H, 1, d), v (n, H, 1, dv). Every query attends to all held tokens of its row and to nothing else. The
        blocks are changed in place, for all requests at once. Afterwards the requests whose token block is complete are
        handled one by one (`_close`).
        """
        views, at, asked = self._views, batch.held, q.squeeze(3)
        if q.device.type == "cpu" and not torch.equal(views["seen"][batch.index, 0], batch.seen):
            raise ValueError("the batch was made for other clocks than these blocks have: make it anew for each step")
        with self._writing(batch.ids):
            self._slots("slots.k")[batch.rows, :, at] = k.squeeze(2)
            if not self.spec.tied:
                self._slots("slots.v")[batch.rows, :, at] = v.squeeze(2)
            self._slots("slots.position")[batch.rows, :, at] = batch.seen.unsqueeze(1)
            if self._watches:
                views["queries"][batch.rows, :, :, batch.fill] = asked
                views["asked"][batch.rows, :, batch.fill] = True
            views["slots.held"][batch.index] += 1
            out = self._attended(batch, asked)
            views["seen"][batch.index] += 1
            if batch.complete is not None:
                self._close(batch.complete)
        return out.unsqueeze(3)

    def _close(self, ids: Tensor) -> None:
        """Handle the end of a token block in the requests of these blocks, for example by evicting tokens.

        The requests are handled one by one, each state in its block. A request comes here once per token block.
        """
        for block in ids.split(1):
            state = self._bound(block)
            assert isinstance(state, Blocked)
            with torch.inference_mode(False), torch.no_grad():
                state._close(None)
            self.layout.store(state, self._views, block)

    def _attended(self, batch: DecodeBatch, q: Tensor) -> Tensor:
        """Return attention outputs (n, H, g, dv) of q (n, H, g, d) over all held tokens, the newest included."""
        n, heads, g, _d = q.shape
        keys = self._slots("slots.k")[:, :, : batch.width]
        values = keys if self.spec.tied else self._slots("slots.v")[:, :, : batch.width]
        at = batch.index  # blocks that follow one another are read in place, others are copied together first
        k, v = (x[at] if isinstance(at, slice) else x.index_select(0, at) for x in (keys, values))
        if fused(q.flatten(0, 1), k[0], v[0], self.spec.softcap):
            return scaled_dot_product_attention(q, k, v, attn_mask=batch.visible, scale=self.spec.scale)
        hide = None if batch.visible is None else ~batch.visible.expand(n, heads, 1, -1).flatten(0, 1)
        law = (self.spec.scale, self.spec.softcap, None, hide)
        out, _ = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *law)
        return out.view(n, heads, g, self.spec.dv).to(self.spec.dtype)

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

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bound(self, ids: Tensor) -> State:
        """Return a state of one request whose tensors are views of the block that `ids` (1,) names.

        A call on the state changes the block in place. `layout.store` must follow, as numbers and replaced tensors of
        the state are not views. The state is valid until the next call of this method, which moves it to another block.
        """
        if self._lens is None or self._lens.broken:
            self._lens = opened(self.method, self.spec, self.g, self._tokens)
        self.layout.bind(self._views, int(ids[0]), self._lens)
        return self._lens

    def _loaded(self, ids: Tensor) -> State:
        """Copy the states out of these blocks, and return them as one state of n H rows, request after request.

        The next call of this method may overwrite the returned state.
        """
        state, n = self._working, len(ids)
        if state is None or state.broken or state.spec.rows != n * self.spec.rows:
            places = None if self.spec.places is None else tuple(self.spec.places) * n
            rows = {"rows": n * self.spec.rows, "row_ids": tuple(self.spec.row_ids or ()) * n, "places": places}
            state = opened(self.method, replace(self.spec, **rows), self.g, self._tokens)
        self.layout.load(self._views, ids, state)
        self._working = state
        return state

    @contextmanager
    def _writing(self, ids: Tensor) -> Iterator[None]:
        """Mark these blocks as half-written while the body of the `with` statement changes them.

        If an exception ends the body, the mark stays, and later calls on the blocks raise BrokenState.
        """
        touched = ids.tolist()
        self._torn.update(touched)
        yield
        self._torn.difference_update(touched)

    # ---- input -----------------------------------------------------------------------------------------------------

    def _known(self, ids: Tensor, torn: bool = False) -> Tensor:
        """Check the block indices `ids`, and return them as int64 on the CPU.

        Raises ValueError unless they are a non-empty 1-d tensor of different indices of existing blocks. Raises
        BrokenState for a block that an interrupted call left half-written, unless `torn` is True.
        """
        ids = torch.as_tensor(ids).to("cpu")
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32) or not len(ids):
            raise ValueError(f"blocks are named by a non-empty 1-d int64 tensor, got {ids.dtype} {tuple(ids.shape)}")
        named = ids.tolist()
        if min(named) < 0 or max(named) >= len(self._blocks) or len(set(named)) < len(named):
            raise ValueError(f"blocks must be different indices in 0..{len(self._blocks) - 1}, got {named}")
        if not torn and not self._torn.isdisjoint(named):
            broken = sorted(self._torn.intersection(named))
            raise BrokenState(f"a call on the blocks {broken} broke off and left them torn: clear them and start again")
        return ids.to(torch.int64)

    def _require(self, ids: Tensor, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None) -> None:
        """Raise ValueError if the arguments of `step` have a wrong shape or dtype, or do not fit into their blocks.

        ids (n,) are the requests' blocks. The entries must also be finite; this is checked here for one token per
        request only, as the states check longer input themselves.
        """
        n, spec, t = len(ids), self.spec, k.shape[2] if k.ndim == 4 else -1
        wanted = {
            "q": (n, spec.rows, self.g, t, spec.d),
            "k": (n, spec.rows, t, spec.d),
            "v": (n, spec.rows, t, spec.dv),
        }
        for (name, shape), x in zip(wanted.items(), (q, k, v), strict=True):
            if tuple(x.shape) != shape or x.dtype != spec.dtype:
                raise ValueError(f"{name} must be {spec.dtype} {shape}, got {x.dtype} {tuple(x.shape)}")
            if t == 1 and not math.isfinite(x.sum().item()) and not bool(torch.isfinite(x).all()):
                raise ValueError(f"{name} has NaN or infinite entries; no block was changed")
        if count is not None and (count.shape != (n,) or int(count.min()) < 0 or int(count.max()) > t):
            raise ValueError(f"count must be (n,) = ({n},) numbers in 0..{t}, got {count.tolist()}")
        if self._tokens is not None:
            after = self._views["seen"][ids, 0].cpu() + (t if count is None else count.cpu())
            if int(after.max()) > self._tokens:
                raise ValueError(
                    f"a request would have {int(after.max())} tokens; its block has room for {self._tokens}"
                )
