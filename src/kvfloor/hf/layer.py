"""One layer of a compressed cache: transformers' cache protocol on one side, a kvfloor state on the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfloor.core.bounded import BoundedState
from kvfloor.core.state import State
from kvfloor.hf import latent
from kvfloor.hf.masks import Slots
from kvfloor.hf.opener import Opening
from kvfloor.hf.replaced import refuse_other_attention
from kvfloor.hf.rows import present_rows, step_rows


class Meter:
    """What a cache's layers took together: bytes, the most of them with what was staged or copied, and slots seen.

    A layer that was never asked is not in it.
    """

    def __init__(self) -> None:
        self.held_bytes: dict[int, int] = {}
        self.seen: dict[int, int] = {}
        self.peak_bytes = 0
        self.staged: weakref.ref[CompressedLayer] | None = None  # the layer whose keys wait for their attention

    def measure(self, layer: int, held_bytes: int, transient_bytes: int) -> None:
        self.held_bytes[layer] = held_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self.held_bytes.values()) + transient_bytes)

    def forget(self, layer: int) -> None:
        """The layer holds nothing any more."""
        self.seen.pop(layer, None)
        self.held_bytes.pop(layer, None)

    @property
    def level(self) -> bool:
        """Whether all layers saw the same slots: not so after a forward that broke off between them."""
        return len(set(self.seen.values())) <= 1


@dataclass(frozen=True)
class Eviction:
    """Tokens that left a layer for good, an entry each: batch item (e,), kv head (e,), position in the row (e,)."""

    layer: int
    item: Tensor
    head: Tensor
    position: Tensor


_MEASURED_EVERY = 32  # decoded tokens; a state remembers its own peak, so what it grew by in between is not missed
_BROKE_OFF = (
    "the last forward broke off after some layers had taken its tokens in, so this cache is of no use: reset() it, or "
    "load the last one you saved"
)
_TAG = "kv_layer"  # the attribute by which a staged key tensor names its layer


class CompressedLayer(CacheLayerMixin):
    """Keys and values are staged by `update` and taken in by `answer`, which the attention function calls.

    Batch x kv head is the state's rows, a GQA group its g. `seen` counts slots, pads included, because generate()
    derives positions from it; the state's own clocks count real tokens per row. `readers` later layers have no keys
    of their own and ask this layer's (Gemma 3n, Gemma 4): they are answered from a copy of the state as it was
    before the forward, which is dropped with the last of them.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    beside: tuple[str, ...] = ()  # attributes of a second half that is transformers' own; they are saved too

    def __init__(
        self,
        opening: Opening,
        index: int,
        place: int,
        meter: Meter,
        readers: int = 0,
    ) -> None:
        """The place-th compressed layer of a cache, which is layer `index` of the model."""
        super().__init__()
        self.opening, self.index, self.place = opening, index, place
        self.state: State | None = None
        self.seen = 0
        self.batch = 0
        self.staged_bytes = 0
        self.served_by: weakref.ref[torch.nn.Module] | None = None  # who last asked: `save` finds the model by it
        self.record: Callable[[Tensor, Tensor, Tensor, float, float | None], None] | None = (
            None  # sees what is answered
        )
        self._meter = meter
        self._on_evict: Callable[[Eviction], None] | None = None
        self._readers, self._waiting = readers, 0  # layers that share these keys; how many of them come in this forward
        self._before: State | None = None

    @staticmethod
    def of(key: Tensor) -> CompressedLayer | None:
        """The layer that staged this key tensor; None if a stock cache returned it."""
        reference = getattr(key, _TAG, None)
        return None if reference is None else reference()

    # ---- transformers' protocol ----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stage this forward's keys and values (B, Hkv, n, d), after RoPE; the attention function takes them in."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._stage)(key_states, value_states)  # pyright: ignore[reportCallIssue]
        return self._stage(key_states, value_states)

    def _stage(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        refuse_other_attention(self.served_by)
        waiting = None if self._meter.staged is None else self._meter.staged()
        if waiting is not None and waiting.staged_bytes:
            waiting.unstage()
            raise RuntimeError(
                f"the keys of layer {waiting.index} were never asked for by kvfloor's attention, so their tokens are "
                f"not in this cache: call kvfloor.hf.prepare(model) first"
            )
        self.expect(key_states.shape[0])
        if self.place == 0 and not self._meter.level:
            raise RuntimeError(_BROKE_OFF)
        self.is_initialized, self._before = True, None
        keys = key_states.view_as(key_states)  # a tensor object of its own, so that the tag is not the caller's
        setattr(keys, _TAG, weakref.ref(self))
        latent.staged(keys, value_states)
        self.staged_bytes = key_states.nbytes + value_states.nbytes
        self._meter.staged = weakref.ref(self)
        return keys, value_states

    def unstage(self) -> None:
        """Forget the keys that were staged and not answered: the layer is as it was."""
        self.staged_bytes, self._meter.staged = 0, None

    def expect(self, batch: int) -> None:
        """Raise ValueError unless a forward of this batch size can continue the layer."""
        if self.state is not None and batch != self.batch:
            raise ValueError(
                f"this cache holds a batch of {self.batch} and cannot go on with one of {batch}: give each item a copy "
                f"of what it holds first, cache.batch_repeat_interleave(copies), choose items by "
                f"cache.batch_select_indices(indices), or begin with a new cache"
            )

    def get_seq_length(self, *args: Any) -> int:
        """Slots seen (pads included), not tokens stored."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(slots seen and new, 0). Until transformers 5.3 the argument is the tensor of cache positions."""
        refuse_other_attention(self.served_by)
        n = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return Slots(self.seen + n, self), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.12

    def reset(self) -> None:
        self.state, self.seen, self.batch, self.staged_bytes, self._before = None, 0, 0, 0, None
        self._meter.forget(self.index)

    def call_on_evict(self, on_evict: Callable[[Eviction], None] | None) -> None:
        """Tell `on_evict` of the tokens that leave from now on; None: no one."""
        self._on_evict = on_evict
        if isinstance(self.state, BoundedState):
            self.state.on_evict = None if on_evict is None else self._report

    def _report(self, row: Tensor, position: Tensor) -> None:
        assert self._on_evict is not None and self.state is not None
        heads = self.state.spec.rows // self.batch
        self._on_evict(Eviction(self.index, row // heads, row % heads, position))

    def clocks(self) -> dict[str, Any]:
        """What continuing needs beside the state; JSON-ready."""
        return {"seen": self.seen, "batch": self.batch, "is_initialized": self.is_initialized}

    def resume(self, state: State | None, clocks: dict[str, Any], model: torch.nn.Module) -> None:
        """Continue from what a saved layer held, in `model`, which filled it."""
        self.state, self.served_by = state, weakref.ref(model)
        self.seen, self.batch, self.is_initialized = clocks["seen"], clocks["batch"], clocks["is_initialized"]
        if state is not None:
            self._meter.seen[self.index] = self.seen
            self._meter.measure(self.index, state.nbytes, 0)
        self.call_on_evict(self._on_evict)

    def crop(self, *args: Any) -> None:
        raise ValueError(
            "a compressed cache cannot be cropped, as assisted decoding and prompt lookup ask: evicted tokens cannot "
            "come back; generate without them, or use a stock cache"
        )

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded: its state is small and stays on the model's device")

    def prefetch(self) -> None:
        """Nothing is ever offloaded."""

    def to(self, device: str | torch.device) -> None:
        """Move the state; its copy is made by way of its message, on the CPU."""
        if self.state is not None:
            self.state = self.state.method.from_bytes(self.state.to_bytes(), device)
            self.call_on_evict(self._on_evict)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch items: each takes its kv heads' rows along."""
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
    ) -> Tensor:
        """query (B, H, n, d), staged key and value (B, Hkv, n, .) -> (B, n, H, dv); commits what was staged.

        padding: bool (B, slots), None if every token is real. sink: a logit per query head (H,) that takes its share
        of the softmax and has no value.
        """
        if not self.staged_bytes:
            return self._answer_reader(query, key, value, padding, sink)
        batch, heads, n, _d = query.shape
        kv_heads, dv = key.shape[1], value.shape[-1]
        g = heads // kv_heads
        try:
            if self.state is None:
                if max(self._meter.seen.values(), default=0) > self.seen + n:
                    raise RuntimeError(_BROKE_OFF)  # before this layer was asked for the first time
                self.state = self.opening.open(self.index, self.place, key, dv, g, scale, softcap, tied=value is key)
                self.batch, self._meter.seen[self.index] = batch, self.seen
                self.call_on_evict(self._on_evict)
            state = self.state
            if n == 1 and self.seen and not state.sealed:
                state.seal()  # the first decoded token: the prompt is over
            present = present_rows(padding, slice(self.seen, self.seen + n), kv_heads)
            if self.record is not None:
                self.record(query, key, value, scale, softcap)
            self._before, self._waiting = state.clone() if self._readers else None, self._readers
            out = step_rows(state, query, key, value, present, sink)
            self.seen += n
            if n > 1 or self.seen % _MEASURED_EVERY == 0 or self._readers:
                held_bytes = state.nbytes
                copied_bytes = state.peak_nbytes - held_bytes + (self._before.nbytes if self._before else 0)
                self._meter.measure(self.index, held_bytes, copied_bytes + self.staged_bytes)
            self._meter.seen[self.index] = self.seen
        finally:
            self.staged_bytes = 0
        return out

    def _answer_reader(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, sink: Tensor | None
    ) -> Tensor:
        """The answer to a layer that asks this one's keys: query (B, H, m, d) of the newest m tokens of this forward.

        What this layer keeps is its own queries' business: the reader's leave no trace in the state.
        """
        if self._before is None:
            raise RuntimeError(
                f"layer {self.index}'s keys were asked again, which the model's configuration does not announce: this "
                f"family shares keys between layers in a way that kvfloor does not know"
            )
        kv_heads, n, m = key.shape[1], key.shape[2], query.shape[2]
        self._waiting -= 1
        state = self._before.clone() if self._waiting else self._before
        if not self._waiting:
            self._before = None
        present = present_rows(padding, slice(self.seen - n, self.seen), kv_heads)
        if m < n:
            early, unasked = (x[:, :, : n - m].flatten(0, 1) for x in (key, value))
            state.append(early, unasked, None if present is None else present[:, : n - m])
            present = None if present is None else present[:, n - m :]
        return step_rows(state, query, key[:, :, n - m :], value[:, :, n - m :], present, sink)
