"""One layer of a compressed cache: transformers' cache protocol on one side, a kvfloor state on the other."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfloor.budget import resolve
from kvfloor.method import Method, Spec
from kvfloor.state import State


class Meter:
    """Bytes of all layers' states together, and the most they took with what was staged or copied at that moment."""

    def __init__(self, layers: int) -> None:
        self.held_bytes = [0] * layers
        self.peak_bytes = 0

    def record(self, layer: int, held_bytes: int, transient_bytes: int) -> None:
        self.held_bytes[layer] = held_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self.held_bytes) + transient_bytes)


_TAG = "kv_layer"  # the attribute by which a staged key tensor names its layer


class CompressedLayer(CacheLayerMixin):
    """Keys and values are staged by `update` and taken in by `answer`, which the attention function calls.

    Batch x kv head is the state's rows, a GQA group its g. `seen` counts slots, pads included, because generate()
    derives positions from it; the state's own clocks count real tokens per row.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        method: Method,
        index: int,
        layers: int,
        context: int | None,
        seed: int,
        requests: Sequence[int] | None,
        meter: Meter,
    ) -> None:
        super().__init__()
        self.method = method
        self.index = index
        self.state: State | None = None
        self.seen = 0
        self.batch = 0
        self.staged_bytes = 0
        self.tap: Callable[[Tensor, Tensor, Tensor, float, float | None], None] | None = None  # sees what is answered
        self._meter = meter
        self._layers, self._context, self._seed = layers, context, seed
        self._requests = requests

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
        if self.staged_bytes:
            raise RuntimeError(
                "a second forward came before the first one's attention was answered: this model does not use "
                "kvfloor's attention; call kvfloor.hf.prepare(model) first"
            )
        self.is_initialized = True
        keys = key_states.view_as(key_states)  # a tensor object of its own, so that the tag is not the caller's
        setattr(keys, _TAG, weakref.ref(self))
        self.staged_bytes = sum(x.numel() * x.element_size() for x in (key_states, value_states))
        return keys, value_states

    def get_seq_length(self, *args: Any) -> int:
        """Slots seen (pads included), not tokens stored."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(slots seen and new, 0). Until transformers 5.3 the argument is the tensor of cache positions."""
        n = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.seen + n, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.12

    def reset(self) -> None:
        self.state, self.seen, self.batch, self.staged_bytes = None, 0, 0, 0
        self._meter.record(self.index, 0, 0)

    def crop(self, *args: Any) -> None:
        raise ValueError("a compressed cache cannot be cropped: evicted tokens cannot come back; use a fresh cache")

    def offload(self) -> None:
        raise ValueError("a compressed cache is not offloaded: its state is small and stays on the model's device")

    def prefetch(self) -> None:
        """Nothing is ever offloaded."""

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
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """query (B, H, n, d), staged key and value (B, Hkv, n, .) -> (B, H, n, dv); commits what was staged.

        padding: bool (B, slots), None if every token is real.
        """
        batch, heads, n, d = query.shape
        kv_heads, dv = key.shape[1], value.shape[-1]
        g = heads // kv_heads
        try:
            if self.state is None:
                self.state = self._open(batch, kv_heads, d, dv, g, scale, softcap, key)
                self.batch = batch
            state = self.state
            if n == 1 and self.seen and not state.sealed:
                state.seal()  # the first decoded token: the prompt is over
            present = None
            if padding is not None:
                present = padding[:, self.seen : self.seen + n].to(torch.bool)
                present = None if bool(present.all()) else present.repeat_interleave(kv_heads, 0)
            if self.tap is not None:
                self.tap(query, key, value, scale, softcap)
            out = state.step(
                query.reshape(batch * kv_heads, g, n, d),
                key.reshape(batch * kv_heads, n, d),
                value.reshape(batch * kv_heads, n, dv),
                present,
            )
            held_bytes = state.nbytes
            copied_bytes = state.peak_nbytes - held_bytes
            self._meter.record(self.index, held_bytes, copied_bytes + self.staged_bytes)
            self.seen += n
        finally:
            self.staged_bytes = 0
        return out.reshape(batch, heads, n, dv)

    def _open(
        self, batch: int, kv_heads: int, d: int, dv: int, g: int, scale: float, softcap: float | None, key: Tensor
    ) -> State:
        requests = range(batch) if self._requests is None else self._requests
        if len(requests) != batch:
            raise ValueError(f"{len(requests)} request ids were given for a batch of {batch}; give one per item")
        ids = [_row_id(request, self.index, head) for request in requests for head in range(kv_heads)]
        spec = Spec(
            batch * kv_heads,
            d,
            dv,
            scale,
            softcap,
            key.dtype,
            key.device,
            seed=self._seed,
            row_ids=ids,
            places=[(self.index, head) for _ in requests for head in range(kv_heads)],
        )
        return resolve(self.method, spec, layers=self._layers, length=self._context, g=g).open(spec)


def _row_id(request: int, layer: int, head: int) -> int:
    """A row's identity: the same request draws the same numbers in any batch."""
    digest = hashlib.sha256(f"{request}/{layer}/{head}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
