"""CompressedCache: what is passed to `generate(past_key_values=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvfloor.hf.layer import CompressedLayer, Meter
from kvfloor.method import Method, standard_law
from kvfloor.registry import parse


class CompressedCache(Cache):
    """A cache whose full-attention layers remember by a kvfloor method; other layers keep transformers' own.

    config    the model's configuration
    method    a Method or its text, e.g. "h2o(recent=64)@512"; budgets in bytes are for the whole cache
    context   tokens that a share such as "@25%" refers to
    seed      of the method's own randomness
    requests  one id per batch item, which keys that randomness; 0, 1, 2, ... unless given
    One cache serves one request (or one batch) at a time, on a model that went through `prepare`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        method: Method | str,
        *,
        context: int | None = None,
        seed: int = 0,
        requests: Sequence[int] | None = None,
    ) -> None:
        self.method = parse(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a kvfloor Method or its text, got {type(method).__name__}")
        standard_law(self.method, "a model's cache")
        stock = DynamicCache(config=config).layers
        types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"] * len(stock)
        full = [
            type(layer) is DynamicLayer and kind == "full_attention" for layer, kind in zip(stock, types, strict=False)
        ]
        if not any(full):
            raise ValueError(f"{type(config).__name__} has no full-attention layer: there is nothing to compress")
        self._meter = Meter(len(stock))
        super().__init__(
            layers=[
                CompressedLayer(self.method, i, sum(full), context, seed, requests, self._meter) if whole else layer
                for i, (whole, layer) in enumerate(zip(full, stock, strict=True))
            ]
        )

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that a kvfloor state serves."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def seal(self) -> None:
        """Mark the prompt's end now; the first one-token forward does so otherwise."""
        for layer in self.compressed:
            if layer.state is not None:
                layer.state.seal()

    @property
    def nbytes(self) -> int:
        """Bytes of all compressed layers' states, measured on their storages, and of what is staged."""
        return sum((layer.state.nbytes if layer.state else 0) + layer.staged_bytes for layer in self.compressed)

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that states, growth copies and staged tokens took together so far."""
        return self._meter.peak_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes that one more query token would touch, over all compressed layers."""
        return sum(layer.state.bytes_read for layer in self.compressed if layer.state)

    def report(self) -> list[dict[str, Any]]:
        """One entry per compressed layer: slots seen, whole tokens held per row, bytes."""
        return [
            {
                "layer": layer.index,
                "seen": layer.seen,
                "held": layer.state.held.tolist() if layer.state else [],
                "state_bytes": layer.state.nbytes if layer.state else 0,
                "staged_bytes": layer.staged_bytes,
            }
            for layer in self.compressed
        ]
