"""Compute the size of one request's KV cache in one layer, from the user's method and vLLM's configuration.

A method is the configuration of a compressed KV cache, and a state the cache of one request in one layer. vLLM gives
each state a block of memory. To learn the size of the block, it calls the backend with a layer's number of kv heads and
width of a key alone, without its configuration. So each layer, when it is made, puts its sizes into a table, and the
backend looks them up there.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvfloor.core.budget import resolve
from kvfloor.core.method import Method
from kvfloor.core.pool import block_bytes
from kvfloor.core.randomness import row_id
from kvfloor.core.spec import Spec
from kvfloor.vllm import settings


@dataclass(frozen=True)
class Served:
    """Hold the method and the sizes of the state of one request of one layer.

    method  the method, with its budget in tokens per kv head
    spec    sizes, dtype and constants; one row per kv head of this process
    g       query heads per kv head
    tokens  most tokens of a request
    first   index of this process's first kv head among all kv heads of the layer; 0 without tensor parallelism
    nbytes  bytes of the block that holds the state, i.e. of this process's kv heads
    """

    method: Method
    spec: Spec
    g: int
    tokens: int
    first: int
    nbytes: int

    def at(self, layer: int, device: torch.device) -> Spec:
        """Return `spec` for the layer with index `layer` in the model, on the device of the engine's memory.

        Its row ids, which seed random draws, are the same for every request, so no request depends on its neighbours.
        They are those of the first sequence of a batch in kvfloor's cache for transformers.
        """
        heads = range(self.first, self.first + self.spec.rows)
        return replace(
            self.spec,
            device=device,
            row_ids=[row_id(0, layer, head) for head in heads],
            places=[(layer, head) for head in heads],
        )


def size(config: Any, rank: int, heads: int, kv_heads: int, d: int, scale: float, softcap: float | None) -> Served:
    """Return the method and the sizes of a layer's states.

    config    vLLM's configuration (VllmConfig)
    rank      index of this process among those that share out each layer's heads (tensor parallelism)
    heads     query heads of this process; kv_heads: its kv heads
    d         width of a key and of a value
    scale     the factor on q.k; softcap: the cap on logits, or None
    The method is that of the environment variable KVFLOOR_METHOD. A budget in percent is a share of the longest request
    that the engine takes; a budget in bytes is for one request in all layers and processes. Raises ValueError for a
    method whose state does not fit a block of fixed size.
    """
    method = settings.method_asked()
    assert method is not None  # the backend is registered only if a method was asked for
    model, tokens = config.model_config, config.model_config.max_model_len
    whole, shards = model.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    first = rank * kv_heads if whole >= shards else rank * whole // shards
    spec = Spec(kv_heads, d, d, scale, softcap, model.dtype, places=[(0, first + head) for head in range(kv_heads)])
    everyone = replace(spec, rows=whole, row_ids=None, places=[(0, head) for head in range(whole)])
    g = heads // kv_heads
    try:
        method = resolve(method, everyone, layers=model.get_total_num_hidden_layers(), length=tokens, g=g)
        nbytes = block_bytes(method, spec, g, tokens)
    except ValueError as cause:
        raise ValueError(f"{settings.METHOD}={method}: {cause}") from None
    return Served(method, spec, g, tokens, first, nbytes)


class ServedTable:
    """Store an entry (`Served`) for each pair (kv heads, width of a key) that layers of the newest engine have."""

    def __init__(self) -> None:
        self._config: weakref.ref[Any] | None = None
        self._by_size: dict[tuple[int, int], Served] = {}

    def add(self, config: Any, served: Served) -> bool:
        """Add a layer's entry; return True if it is the first of this engine.

        config: the configuration of the engine that the layer belongs to. The first entry of an engine replaces all
        entries of an earlier engine. Raises ValueError if two layers with equal kv heads and key width need blocks of
        different sizes.
        """
        first = self._config is None or self._config() is not config
        if first:
            self._config, self._by_size = weakref.ref(config), {}
        key = (served.spec.rows, served.spec.d)
        if self._by_size.setdefault(key, served).nbytes != served.nbytes:
            raise ValueError(
                f"kvfloor cannot serve this: layers with {key[0]} kv heads of width {key[1]} have different numbers "
                f"of query heads"
            )
        return first

    def of(self, kv_heads: int, d: int) -> Served:
        """Return the entry of the layers with this number of kv heads and this width d of a key."""
        return self._by_size[kv_heads, d]


TABLE = ServedTable()
