"""Find which kv heads of a model sharded by tensor parallelism this process holds, and gather from all processes.

transformers shards a model over several processes (`DistributedConfig(tp_size=...)`, `tp_plan="auto"`), called ranks:
each computes with its own slice of every weight. Where the plan slices the key projections, rank r of n holds the r-th
of n equal runs of every layer's kv heads, and its cache receives the keys of these alone. Where a plan gathers the keys
(OLMo 2), every rank holds all kv heads, and its cache receives the keys of all.

A collective call is one that every rank makes, in the same order: each waits for the others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Out = TypeVar("Out")

WAIT_SECONDS = 120
"""How long a collective call waits for the other ranks before it raises."""

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")  # modules whose output holds the keys, fused or not
_QUERY_PROJECTIONS = ("q_proj", "q_b_proj")


class Ranks:
    """Hold this process's rank among the `count` processes that share a model's kv heads, and gather from all of them.

    With a count of 1, this process holds all kv heads, and no call waits for other processes.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank, self.count, self._group = rank, count, group

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        if self.count > 1:
            raise ValueError(
                f"this cache holds 1/{self.count} of the kv heads of a model sharded over {self.count} ranks: save the "
                f"whole with cache.save(path), on every rank, instead of pickling it"
            )
        return Ranks, ()

    def gather(self, what: str, mine: Out) -> list[Out]:
        """Return a list of the objects `mine` that the ranks pass, in the order of ranks. A collective call.

        mine: this rank's object, whose tensors must be on the CPU. what: name of the call, for errors. Raises
        RuntimeError if other ranks make another call, or none within WAIT_SECONDS.
        """
        if self.count == 1:
            return [mine]
        told: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(told, (what, mine), group=self._group)
        except RuntimeError as cause:
            self._alone(what, cause)
        return self._same(what, told)

    def gather_first(self, what: str, mine: Out) -> list[Out] | None:
        """Return on rank 0 what `gather` returns, and None on the other ranks.

        A collective call, with the arguments and the errors of `gather`.
        """
        if self.count == 1:
            return [mine]
        told: list[Any] | None = [None] * self.count if self.rank == 0 else None
        try:
            dist.gather_object((what, mine), told, dst=dist.get_global_rank(self._group, 0), group=self._group)
        except RuntimeError as cause:
            self._alone(what, cause)
        return None if told is None else self._same(what, told)

    def agree(self, what: str, call: Callable[[], Out]) -> Out:
        """Return `call()`; if it fails on any rank, raise on every rank. A collective call.

        what: name of the call, for errors. `call` itself must make no collective call. Raises the exception of `call`
        on a rank where it failed, and RuntimeError naming that rank on the others.
        """
        if self.count == 1:
            return call()
        out, fault = None, None
        try:
            out = call()
        except Exception as cause:
            fault = cause
        told = self.gather(what, None if fault is None else f"{type(fault).__name__}: {fault}")
        if fault is not None:
            raise fault
        failed = next(((rank, line) for rank, line in enumerate(told) if line is not None), None)
        if failed is not None:
            raise RuntimeError(f"{what} failed on rank {failed[0]}: {failed[1]}")
        return out  # type: ignore[return-value]

    def _same(self, what: str, told: list[Any]) -> list[Any]:
        other = next(((rank, called) for rank, (called, _) in enumerate(told) if called != what), None)
        if other is not None:
            raise RuntimeError(
                f"rank {self.rank} calls {what} and rank {other[0]} calls {other[1]}: figures of the whole cache are "
                f"collective, so every rank makes the same calls in the same order"
            )
        return [mine for _, mine in told]

    def _alone(self, what: str, cause: Exception) -> NoReturn:
        raise RuntimeError(
            f"{what} is about the whole cache, whose kv heads {self.count} ranks hold, and some rank did not make the "
            f"same call within {WAIT_SECONDS} seconds: call it on every rank, not on one"
        ) from cause


ALONE = Ranks()
_known: weakref.WeakKeyDictionary[PreTrainedModel, Ranks] = weakref.WeakKeyDictionary()


def ranks_of(model: PreTrainedModel | PreTrainedConfig) -> Ranks:
    """Return the ranks among which a model's kv heads are divided, found at the first call for the model.

    The first call for a sharded model is collective: it connects the ranks. A configuration stands for the model to
    which it belongs, if `kvfloor.hf.prepare` has prepared this model; for any other configuration the result is a
    single rank.
    Raises ValueError for a model that is sharded in a way that a compressed cache cannot follow.
    """
    if isinstance(model, PreTrainedConfig):
        return next((ranks for known, ranks in _known.items() if known.config is model), ALONE)
    if model not in _known:
        _known[model] = _found(model)
    return _known[model]


def _found(model: PreTrainedModel) -> Ranks:
    _refuse(model)
    count = getattr(model, "_tp_size", None) or 1
    if count == 1 or not _styles(model, _KEY_PROJECTIONS) & {"colwise"}:
        return ALONE
    mesh: Any = model._device_mesh
    group = (mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh).get_group()
    return Ranks(dist.get_rank(group), count, _waiting(tuple(dist.get_process_group_ranks(group))))


@functools.cache
def _waiting(ranks: tuple[int, ...]) -> Any:
    """Return a process group of these global ranks that exchanges objects on the CPU and waits WAIT_SECONDS at most."""
    wait = timedelta(seconds=WAIT_SECONDS)
    return dist.new_group(list(ranks), timeout=wait, backend="gloo", use_local_synchronization=True)


def _refuse(model: PreTrainedModel) -> None:
    """Raise ValueError if a compressed cache cannot follow the way in which transformers sharded this model."""
    name, count = type(model).__name__, getattr(model, "_tp_size", None) or 1
    if getattr(model, "_pp_stage", None) is not None:
        raise ValueError(
            f"{name} is split into pipeline stages (pp_size), each with a part of the cache: shard it by tensor "
            f"parallelism (tp_size), or give its layers to several devices (device_map)"
        )
    if count == 1:
        return
    if "sequence_parallel" in (model.tp_plan or {}).values():
        raise ValueError(f"{name} is sharded along its sequence (sequence_parallel): leave that out of its tp_plan")
    keys, queries = (_styles(model, names) for names in (_KEY_PROJECTIONS, _QUERY_PROJECTIONS))
    if "colwise" in queries and "colwise" not in keys:
        raise ValueError(
            f"{name} shards its query heads over {count} ranks and not its keys, as latent attention (MLA) does: every "
            f"rank would evict by the attention of its own queries alone. Load it whole, or with a device_map"
        )
    decoder = model.config.get_text_config(decoder=True)
    heads = getattr(decoder, "num_key_value_heads", None) or getattr(decoder, "num_attention_heads", None)
    if "colwise" in keys and isinstance(heads, int) and heads % count:
        raise ValueError(
            f"{name} has {heads} kv heads, which {count} ranks cannot share evenly: choose a number of ranks that "
            f"divides {heads}"
        )


def _styles(model: PreTrainedModel, names: tuple[str, ...]) -> set[str]:
    """Return the styles in which the model's plan shards modules of these names; "colwise" divides outputs by heads."""
    return {style for path, style in (model.tp_plan or {}).items() if path.rpartition(".")[2] in names}


def full(weight: Tensor) -> Tensor:
    """Return a weight as one complete tensor, also if it is sharded: a DTensor, of which each rank holds a slice.

    For a sharded weight this is a collective call.
    """
    whole = getattr(weight, "full_tensor", None)
    return weight if whole is None else whole()
