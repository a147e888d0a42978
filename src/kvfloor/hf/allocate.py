"""Who gets how much of one budget: the same for all, less for deeper layers, or what each kv head's floor asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kvfloor.floors.measured import readable_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Multiples of one budget per compressed layer and kv head; one number is for all.
Shares = tuple[tuple[float, ...], ...]
Number = TypeVar("Number", int, float)

PYRAMID_SLOPE = 20  # PyramidKV's beta: the deepest layer gets 1 / beta of the mean, the first what that leaves
ETA, P = 0.25, 0.9  # additive error, of values in [-1, 1], and success probability at which heads' floors are taken
MOST_QUERIES = 256  # of the calibration prompt's newest, per query head


def pyramid(layers: int) -> Shares:
    """Shares that fall linearly with depth and have mean 1 (Cai et al. 2024, PyramidKV, arXiv 2406.02069)."""
    if layers == 1:
        return ((1.0,),)
    least = 1 / PYRAMID_SLOPE
    return tuple((2 - least - (2 - 2 * least) * i / (layers - 1),) for i in range(layers))


def floor_shares(model: PreTrainedModel, prompt: Sequence[int] | Tensor, *, kept: float = 0.5) -> Shares:
    """Shares that grow with the tokens of `prompt` that each kv head's own queries can read apart, of mean 1.

    Law: share = kept + (1 - kept) * readable / mean readable.
    prompt   token ids (n,) or (1, n) like the traffic, questions included. The model runs over it exactly; then the
             floor of each head's keys is searched with the queries of its newest tokens
             (`kvfloor.floors.measured.readable_by`)
    kept     what every head gets of the mean, whatever it reads. A head that reads few tokens apart can do with few
             bytes, but not every method finds them: one that averages over many tokens starves under eviction
    Raises ValueError for a prompt of fewer than two tokens and for `kept` outside [0, 1].
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"kept is a share of the mean budget, from 0 to 1, got {kept!r}")
    from kvfloor.hf.cache import CompressedCache

    ids = torch.as_tensor(prompt)
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"a calibration prompt is one row of at least two token ids, got shape {tuple(ids.shape)}")
    cache = CompressedCache(model.config, "exact")
    seen: dict[int, tuple[Any, ...]] = {}
    for layer in cache.compressed:
        layer.tap = lambda *what, i=layer.index: seen.__setitem__(i, what)
    with torch.inference_mode():
        model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    needs = [_readable(*seen[layer.index]) for layer in cache.compressed]
    mean = sum(map(sum, needs)) / sum(map(len, needs))
    return tuple(tuple(kept + (1 - kept) * need / mean for need in line) for line in needs)


def _readable(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> list[int]:
    """Tokens that each kv head's newest queries read apart: query (1, H, n, d), key and value (1, Hkv, n, .)."""
    kv_heads, n = key.shape[1], key.shape[2]
    asked = query.view(kv_heads, -1, n, query.shape[-1])[:, :, -min(n, MOST_QUERIES) :].flatten(1, 2).float()
    dv = value.shape[-1]
    found = (
        readable_by(
            key[0, head].float(), asked[head], eta=ETA, p=P, dv=dv, scale=scale, softcap=softcap, dtype=value.dtype
        )
        for head in range(kv_heads)
    )
    return [max(1, one.groups) for one in found]


def per_head(line: Sequence[Number], kv_heads: int, place: int) -> tuple[Number, ...]:
    """One layer's line of a table as one number per kv head; ValueError if it has another length."""
    if len(line) not in (1, kv_heads):
        raise ValueError(
            f"line {place} of the table has {len(line)} numbers for {kv_heads} kv heads; give one or {kv_heads}"
        )
    return tuple(line) * (kv_heads if len(line) == 1 else 1)


def spread(shares: Sequence[Sequence[float]], budget: int, least: int) -> list[tuple[int, ...]]:
    """Tokens per layer and head: `budget` on average, never fewer than `least`, above that in proportion to `shares`.

    The sum is exactly `budget` times the number of heads. Raises ValueError if `least` leaves nothing to share out.
    """
    flat = torch.tensor([share for line in shares for share in line], dtype=torch.float64)
    total = budget * len(flat)
    if budget < least:
        raise ValueError(f"a budget of {budget} tokens per kv head is too small to share out: each head needs {least}")
    low, high = 0.0, total / float(flat.max())
    for _ in range(200):  # the factor at which the heads above `least` use up the rest
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * flat).clamp_min(least).sum()) <= total else (low, middle)
    wanted = (low * flat).clamp_min(least)
    given = wanted.floor().to(torch.int64)
    spare = total - int(given.sum())
    given[torch.argsort(wanted - given, descending=True, stable=True)[:spare]] += 1
    cut = given.split([len(line) for line in shares])
    return [tuple(part.tolist()) for part in cut]
