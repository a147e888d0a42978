"""Implement one layer of a compressed cache: transformers' cache-layer protocol, with a kvfloor state as its memory.

A method is a way to compress a KV cache. A state holds what the method keeps of one layer's tokens, in rows. A row is
the stream of one (batch item, kv head). A slot is one column of the padded batch. The model passes a forward's keys and
values to the layer's `update`. They are staged, i.e. noted but not stored, until `answer` receives the queries, and
appends the keys and values to the state. In shapes, B is the batch, H and Hkv the numbers of query heads and kv heads,
n the number of new slots, d and dv the widths of a key and of a value. On a sharded model, heads and bytes are those of
this process.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfloor.core.bounded import BoundedState
from kvfloor.core.broken import BrokenState
from kvfloor.core.state import State
from kvfloor.hf import latent, precision
from kvfloor.hf.answering import marked
from kvfloor.hf.masks import LazyMask, SlotCount, refuse_other_rules
from kvfloor.hf.opener import Opening
from kvfloor.hf.passage import Passage
from kvfloor.hf.presence import Presence
from kvfloor.hf.promise import PromiseBroken
from kvfloor.hf.replaced import refuse_other_attention
from kvfloor.hf.rows import present_rows, step_rows
from kvfloor.methods.compaction.compact import CompactState, Span


class Meter:
    """Record the bytes held and the slots seen by each layer of a cache, and the peak of all layers' bytes together.

    The peak includes staged tensors and temporary copies. A layer has no entry until its first attention call. On a
    sharded model, the bytes are those of this process alone.
    """

    def __init__(self) -> None:
        self.held_bytes: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.peak_bytes = 0
        self.staged: weakref.ref[CompressedLayer] | None = None  # the layer whose keys are staged

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle, without the reference to the layer whose keys are staged."""
        return vars(self) | {"staged": None}

    def measure(self, layer: int, held_bytes: int, transient_bytes: int) -> None:
        self.held_bytes[layer] = held_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self.held_bytes.values()) + transient_bytes)

    def forget(self, layer: int) -> None:
        """Remove the entries of a layer that was emptied."""
        self.seen.pop(layer, None)
        self.held_bytes.pop(layer, None)


@dataclass(frozen=True)
class Eviction:
    """Hold the e tokens that a layer evicted in one step: batch item (e,), kv head (e,), position in the row (e,).

    A position counts the real tokens of the batch item, pads excluded, from 0. `layer` is the index in the model.
    """

    layer: int
    item: Tensor
    head: Tensor
    position: Tensor


Law = tuple[float, float | None]  # the factor on q.k, and the cap on logits or None

_MEASURED_EVERY = 32  # decoded tokens; a state remembers its own peak, so what it grew by in between is not missed


class CompressedLayer(CacheLayerMixin):
    """Compress one layer's keys and values: `update` stages new ones, `answer` appends them and attends.

    The model calls `update` first; kvfloor's attention function then calls `answer` with the queries. A row of the
    state is one (batch item, kv head), and g queries of a GQA group attend to each row. `seen` counts slots, pads
    included, because generate() derives positions from it; the state itself counts real tokens per row.

    `readers` is the number of later layers that have no keys of their own and attend to this layer's (Gemma 3n and 4).
    Queries of these later layers are answered from a copy of the state from before the forward. The copy is freed after
    the last of them.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    beside: tuple[str, ...] = ()  # attributes of transformers' own half of a hybrid layer; they are saved too

    def __init__(
        self,
        opening: Opening,
        index: int,
        place: int,
        meter: Meter,
        passage: Passage,
        presence: Presence,
        readers: int = 0,
    ) -> None:
        """Build the empty cache layer of the model's layer `index`; `place` is its index among the compressed layers.

        A compressed layer is one with attention over all tokens; layers of other kinds are not counted by `place`.
        All layers of one cache share its settings (opening), byte counts (meter), record of how far a forward has got
        (passage) and list of pads (presence). readers: number of later layers that attend to this layer's keys.
        """
        super().__init__()
        self.opening, self.index, self.place = opening, index, place
        self.state: State | None = None
        self.seen = 0
        self.batch = 0
        self.staged_bytes = 0
        self.served_by: weakref.ref[torch.nn.Module] | None = None  # last to call `answer`: leads `save` to the model
        # Called with the inputs of every answer: (query, key, value, scale, softcap, sink).
        self.record: Callable[[Tensor, Tensor, Tensor, float, float | None, Tensor | None], None] | None = None
        self._meter, self._passage, self._presence = meter, passage, presence
        # For positions="cache": (query, key, value, positions) -> query and key without their rotation.
        self.turn_back: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None
        self.room: int | None = None  # positions in the model's learned table, if it has one
        self._on_evict: Callable[[Eviction], None] | None = None
        self._readers, self._waiting = readers, 0  # layers that share these keys; those still to come in this forward
        self._before: State | None = None
        self._unturned: Tensor | None = None  # this forward's keys as the state took them, while readers wait

    @property
    def has_readers(self) -> bool:
        """Return True if later layers have no keys of their own and attend to this layer's."""
        return self._readers > 0

    # ---- transformers' protocol ----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stage this forward's `key_states` and `value_states` (B, Hkv, n, .), and return them marked as this layer's.

        The keys come from the model after RoPE. Nothing is stored yet. kvfloor's attention function recognises the mark
        on the keys and calls `answer`. Other arguments, such as transformers' cache_kwargs, are not used.
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._stage)(key_states, value_states)  # pyright: ignore[reportCallIssue]
        return self._stage(key_states, value_states)

    def _stage(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.place:  # the attention function is one for all layers of a forward
            refuse_other_attention(self.served_by)
        waiting = None if self._meter.staged is None else self._meter.staged()
        if waiting is not None and waiting.staged_bytes and self._passage.passed_over(self.index):
            waiting.unstage()
            raise RuntimeError(
                f"the keys of layer {waiting.index} were never asked for by kvfloor's attention, so their tokens are "
                f"not in this cache: the forward broke off there, or call kvfloor.hf.prepare(model) first"
            )
        self.expect(key_states.shape[0])
        self._passage.begin_keys(self.index)
        self.is_initialized, self._before, self._unturned = True, None, None
        keys = marked(key_states, self)
        latent.remember_update(keys, value_states)
        self.staged_bytes = key_states.nbytes + value_states.nbytes
        self._meter.staged = weakref.ref(self)
        return keys, value_states

    def unstage(self) -> None:
        """Undo an `update` that was not followed by `answer`: drop the staged keys and values."""
        self.staged_bytes, self._meter.staged = 0, None
        self._passage.unchanged(self.index)

    def expect(self, batch: int) -> None:
        """Raise ValueError unless the layer is empty or holds `batch` batch items."""
        if self.state is not None and batch != self.batch:
            raise ValueError(
                f"this cache holds a batch of {self.batch} and cannot go on with one of {batch}: give each item a copy "
                f"of what it holds first, cache.batch_repeat_interleave(copies), choose items by "
                f"cache.batch_select_indices(indices), or begin with a new cache"
            )

    def refuse_rule(self, mask: LazyMask) -> None:
        """Raise ValueError unless the mask is the causal mask, possibly with padding."""
        refuse_other_rules(mask)

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of slots fed so far, pads and evicted tokens included.

        The model calls this before it chooses the positions of new tokens. So ValueError is raised here if the model's
        learned position table has no position left for another token.
        """
        if self.room is not None and self.state is not None and int(self.state.seen.max()) >= self.room:
            raise ValueError(
                f"this model has a learned table of {self.room} positions, and its cache has seen as many tokens: no "
                f"more can come. Start a new cache with the text that matters; a stream without an end needs a model "
                f'with rotary positions, and positions="cache"'
            )
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (slots, 0): the number of slots that the attention mask covers, and the index of the first of them.

        The mask covers the slots of earlier forwards too. query_length: the number of new slots; before transformers
        5.3, a tensor of their positions.
        """
        refuse_other_attention(self.served_by)
        n = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return SlotCount(self.seen + n, self), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.12

    def reset(self) -> None:
        self.state, self.seen, self.batch, self.staged_bytes = None, 0, 0, 0
        self._before = self._unturned = None
        self._meter.forget(self.index)
        self._presence.reset()

    def call_on_evict(self, on_evict: Callable[[Eviction], None] | None) -> None:
        """Call `on_evict` whenever tokens are evicted from now on; None stops the calls.

        `on_evict` receives an `Eviction`: the batch item, the kv head and the position of every token that was evicted.
        """
        self._on_evict = on_evict
        if isinstance(self.state, BoundedState):
            self.state.on_evict = None if on_evict is None else self._report

    def _report(self, row: Tensor, position: Tensor) -> None:
        assert self._on_evict is not None and self.state is not None
        heads = self.state.spec.rows // self.batch
        first = self.opening.ranks.rank * heads
        self._on_evict(Eviction(self.index, row // heads, first + row % heads, position))

    def compact(self, span: Span, to: float) -> None:
        """Shrink a span of tokens to the share `to` of it in every row; only for the method `compact`.

        Arguments and errors are those of `CompactState.compact`. An empty layer stays as it is.
        """
        if isinstance(self.state, CompactState):
            self.state.compact(span, to)
            held_bytes = self.state.nbytes
            self._meter.measure(self.index, held_bytes, self.state.peak_nbytes - held_bytes)

    def clocks(self) -> dict[str, Any]:
        """Return the layer's counters, which are saved beside its state.

        They are {"seen": slots fed so far, "batch": batch size, "is_initialized": True once keys came}.
        """
        return {"seen": self.seen, "batch": self.batch, "is_initialized": self.is_initialized}

    def resume(self, state: State | None, clocks: dict[str, Any], model: torch.nn.Module) -> None:
        """Continue a saved layer: set its state and its counters.

        state   the saved state; None if the layer was empty
        clocks  the saved counters: slots fed ("seen"), batch size ("batch"), True once keys came ("is_initialized")
        model   the model that filled the saved layer
        """
        self.state, self.served_by = state, weakref.ref(model)
        self.seen, self.batch, self.is_initialized = clocks["seen"], clocks["batch"], clocks["is_initialized"]
        if state is not None:
            self._meter.seen[self.index] = self.seen
            self._meter.measure(self.index, state.nbytes, 0)
        self.call_on_evict(self._on_evict)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and torch.save, with the state as bytes (its serialised message).

        Callbacks, the reference to the model, and the copy of the state for later layers are left out. Raises
        ValueError in the middle of a forward.
        """
        if self.staged_bytes:
            raise ValueError("a forward is not finished: its tokens are staged but not answered yet; pickle after it")
        kept = vars(self) | dict.fromkeys(("served_by", "record", "_on_evict", "_before"))
        if self.state is not None:
            kept["state"] = self.state.method, self.state.to_bytes(), str(self.state.spec.device)
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept)
        if kept["state"] is not None:
            method, message, device = kept["state"]
            self.state = method.from_bytes(message, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return an independent copy of the layer, which keeps the reference to the model and the eviction callback."""
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return made

    def crop(self, *args: Any) -> None:
        raise ValueError(
            "a compressed cache cannot be cropped, as assisted decoding and prompt lookup ask: evicted tokens cannot "
            "come back; generate without them, or use a stock cache"
        )

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded: its state is small and stays on the model's device")

    def prefetch(self) -> None:
        """Do nothing: a compressed layer is never offloaded to the CPU, so there is nothing to fetch."""

    def to(self, device: str | torch.device) -> None:
        """Move the state to `device`: serialise it on the CPU, and build it again on `device`."""
        if self.state is not None:
            self.state = self.state.method.from_bytes(self.state.to_bytes(), device)
            self.call_on_evict(self._on_evict)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch items with these indices (b,), in that order, repeats allowed, each with all its kv heads."""
        if self.state is None:
            return
        heads = self.state.spec.rows // self.batch
        rows = indices.cpu().unsqueeze(1) * heads + torch.arange(heads)
        self.state.select_rows(rows.reshape(-1))
        self.batch = indices.shape[0]

    # ---- answering -----------------------------------------------------------------------------------------

    def answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Append the staged keys and values, and return the queries' attention output (B, n, H, dv), 0 in pads.

        query      (B, H, n, d)
        key        (B, Hkv, n, d), the keys that this forward's `update` staged; value: (B, Hkv, n, dv), their values
        padding    bool (B, slots), True where a slot holds a real token; None if all do
        scale      the factor on q.k; softcap: the cap on logits, or None
        sink       one logit per query head (H,) that takes its share of the softmax and has no value; None without
        positions  the positions (B or 1, n) by which the model rotated query and key. Needed only in a cache with
                   positions="cache", which undoes this rotation before it stores keys
        If nothing is staged, the queries belong to a later layer of the model that shares this layer's keys. They are
        answered, and nothing is appended.
        """
        answer = self._answer if self.staged_bytes else self._answer_reader
        lower = precision.lowered(query)
        if lower is None:
            return answer(query, key, value, padding, scale, softcap, sink, positions, None).to(query.dtype)
        with precision.settled(query):
            return answer(query, key, value, padding, scale, softcap, sink, positions, lower).to(lower)

    def append(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, law: Law) -> None:
        """Append the staged keys and values, without computing the queries' attention, which the caller does not need.

        query    (B, H, n, d), for its shape and dtype; what the layer keeps must not depend on these queries
        key      (B, Hkv, n, d), the keys that this forward's `update` staged; value: (B, Hkv, n, dv), their values
        padding  bool (B, slots), True where a slot holds a real token; None if all do
        law      the factor on q.k, and the cap on logits or None
        """
        self._answer(query, key, value, padding, *law, sink=None, positions=None, lower=None, attend=False)

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
        positions: Tensor | None,
        lower: torch.dtype | None,
        attend: bool = True,
    ) -> Tensor:
        """Append the staged keys and values, and return this layer's own attention output (B, n, H, dv), 0 in pads.

        query           (B, H, n, d)
        key, value      (B, Hkv, n, .), the keys and values that this forward's `update` staged
        padding         bool (B, slots), True where a slot holds a real token; None if all do
        scale, softcap  the factor on q.k, and the cap on logits or None
        sink            one logit per query head (H,) that takes its share of the softmax and has no value, or None
        positions       the positions by which the model rotated query and key; needed only to undo this rotation
        lower           torch.autocast's dtype, None if it is off
        attend          False to append only: the state never sees the queries, and the result is empty
        An error before the state changed leaves the layer as it was.
        """
        batch, heads, n, _d = query.shape
        kv_heads, dv = key.shape[1], value.shape[-1]
        g = heads // kv_heads
        began = False
        before = self.state, self.batch, None if self.state is None else (self.state.seen, self.state.sealed)
        try:
            held = None if self.state is None else self.state.spec.dtype
            query, key, value = precision.one_dtype(held, lower, query, key, value)
            if self.state is None:
                if max(self._meter.seen.values(), default=0) > self.seen + n:
                    raise BrokenState(f"layer {self.index} was never asked while others were: reset() the cache")
                self.state = self.opening.open(self.index, self.place, key, dv, g, scale, softcap, tied=value is key)
                self.batch, self._meter.seen[self.index] = batch, self.seen
                self.call_on_evict(self._on_evict)
                before = None, 0, (self.state.seen, self.state.sealed)
            state = self.state
            present = present_rows(padding, slice(self.seen, self.seen + n), kv_heads)
            leaving = self._presence.leaving(padding, self.seen, batch)
            dropped = None if leaving is None else _in_rows(leaving, kv_heads)
            if dropped is not None:
                state.require_forgettable(*dropped)
            if self.record is not None:
                self.record(query, key, value, scale, softcap, sink)
            if self.turn_back is not None:
                asked = key
                query, key = self.turn_back(query, key, value, positions)
                value = key if value is asked else value
            self._unturned = key if self._readers else None
            self._passage.changing(self.index)
            began = True
            if dropped is not None:
                state.forget(*dropped)
            self._before, self._waiting = state.clone() if self._readers else None, self._readers
            if n == 1 and self.seen and not state.sealed:
                state.seal()  # the first decoded token: the prompt is over
            if attend:
                out = self._stepped(state, query, key, value, present, sink)
            else:
                state.append(key.flatten(0, 1), value.flatten(0, 1), present)
                out = query.new_empty(0)
            self._presence.commit(padding, self.seen, n, leaving)
            self.seen += n
            if n > 1 or self.seen % _MEASURED_EVERY == 0 or self._readers:
                held_bytes = state.nbytes
                copied_bytes = state.peak_nbytes - held_bytes + (self._before.nbytes if self._before else 0)
                self._meter.measure(self.index, held_bytes, copied_bytes + self.staged_bytes)
            self._meter.seen[self.index] = self.seen
            self._passage.took_keys(self.index)
        except BaseException as cause:
            if not began or isinstance(cause, (TypeError, ValueError, OSError)):  # OSError: a full cold tier
                self._refused(*before)
            raise
        finally:
            self.staged_bytes = 0
        return out

    def _refused(self, state: State | None, batch: int, clocks: tuple[Tensor, bool] | None) -> None:
        """Restore the layer as it was before a failed call of `answer`, unless that call has changed the state.

        state, batch   the layer's attributes from before the call; they are set again
        clocks         from before the call: (the state's token counts per row, True if the prompt had ended), or None
                       if there was no state. If the state has other values now, the call has changed it
        """
        asked = self.state
        if asked is not None and (asked.broken or clocks is None or clocks[0] is not asked.seen):
            return
        if asked is not None and clocks is not None and clocks[1] != asked.sealed:
            return
        self.state, self.batch, self._before = state, batch, None
        if state is None:
            self._meter.forget(self.index)
        self._passage.unchanged(self.index)

    def _answer_reader(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
        positions: Tensor | None,
        lower: torch.dtype | None,
    ) -> Tensor:
        """Return the attention output (B, m, H, dv), 0 in pads, of a later layer that attends to this layer's keys.

        The queries attend to a copy of the state from before this forward, with this forward's tokens appended to the
        copy. So queries of later layers have no influence on the tokens that this layer keeps.
        query           (B, H, m, d), of the newest m of the forward's n tokens
        key, value      (B, Hkv, n, .), as this layer received them
        padding         bool (B, slots), True where a slot holds a real token; None if all do
        scale, softcap  not used: the state has its own
        sink            one logit per query head (H,) that takes its share of the softmax and has no value, or None
        positions       the positions by which the model rotated query and key; needed only to undo this rotation
        lower           torch.autocast's dtype, None if it is off
        """
        del scale, softcap  # as the state was opened for
        if self._before is None:
            raise RuntimeError(
                f"layer {self.index}'s keys were asked again, which the model's configuration does not announce: this "
                f"family shares keys between layers in a way that kvfloor does not know"
            )
        query, key, value = precision.one_dtype(self._before.spec.dtype, lower, query, key, value)
        kv_heads, n, m = key.shape[1], key.shape[2], query.shape[2]
        if self.turn_back is not None and self._unturned is not None:
            newest = None if positions is None else positions[..., -m:]
            query, _ = self.turn_back(query, key[:, :, n - m :], value[:, :, n - m :], newest)
            key = self._unturned
        self._waiting -= 1
        state = self._before.clone() if self._waiting else self._before
        if not self._waiting:
            self._before = self._unturned = None
        present = present_rows(padding, slice(self.seen - n, self.seen), kv_heads)
        if m < n:
            early, unasked = (x[:, :, : n - m].flatten(0, 1) for x in (key, value))
            state.append(early, unasked, None if present is None else present[:, : n - m])
            present = None if present is None else present[:, n - m :]
        return self._stepped(state, query, key[:, :, n - m :], value[:, :, n - m :], present, sink)

    def _stepped(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, present: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        """Return what `step_rows` does; raise PromiseBroken if an answer's error bound breaks the cache's promise."""
        promise = self.opening.promise
        before = 0 if promise is None else promise.watch(state)
        out = step_rows(state, query, key, value, present, sink)
        if promise is not None:
            try:
                promise.check(state, before, self.index)
            except PromiseBroken as broken:
                self._passage.break_off(str(broken))
                raise
        return out


def _in_rows(tokens: tuple[Tensor, Tensor], kv_heads: int) -> tuple[Tensor, Tensor]:
    """Convert (batch item (e,), position (e,)) of e tokens to (row, position), (e * kv_heads,) each.

    Each token is in the rows of all kv heads of its batch item. A row's index is batch item * kv_heads + kv head.
    """
    item, position = tokens
    rows = item.unsqueeze(1) * kv_heads + torch.arange(kv_heads)
    return rows.flatten(), position.repeat_interleave(kv_heads)
