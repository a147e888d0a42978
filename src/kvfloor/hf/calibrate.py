"""Divide a budget by the number of tokens that each kv head distinguishes, measured on a calibration prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.floors.measured import readable_by
from kvfloor.hf.allocate import Shares
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.recording import Recorded, Recorder

ETA, P = 0.25, 0.9  # additive error, of values in [-1, 1], and success probability at which heads' floors are taken
MOST_QUERIES = 256  # of the calibration prompt's newest, per query head


def floor_shares(model: PreTrainedModel, prompt: Sequence[int] | Tensor, *, kept: float = 0.5) -> Shares:
    """Return shares of mean 1 that grow with the tokens of `prompt` that each kv head's own queries distinguish.

    Law: share = kept + (1 - kept) * readable / mean readable.
    prompt   token ids (n,) or (1, n) like the traffic, questions included. The model runs over it with an exact cache;
             then the floor of each head's keys is searched with the queries of its newest tokens
             (`kvfloor.floors.measured.readable_by`)
    kept     share of the mean that every head gets in any case. A head that distinguishes few tokens can do with few
             bytes, but not every method finds those tokens: a head that averages over many tokens loses most of them
             to eviction
    Raises ValueError for a prompt of fewer than two tokens and for `kept` outside [0, 1].
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"kept is a share of the mean budget, from 0 to 1, got {kept!r}")
    ids = torch.as_tensor(prompt)
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"a calibration prompt is one row of at least two token ids, got shape {tuple(ids.shape)}")
    cache, layers = watched_cache(model.config)
    seen = Recorder(layers)
    with torch.inference_mode():
        model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    needs = [_readable(seen.of(layer.index)) for layer in layers]
    mean = sum(map(sum, needs)) / sum(map(len, needs))
    return tuple(tuple(kept + (1 - kept) * need / mean for need in line) for line in needs)


def _readable(seen: Recorded) -> list[int]:
    """Count the tokens that each kv head's newest queries distinguish."""
    q, k, v = seen.by_row
    asked = q[:, :, -MOST_QUERIES:].flatten(1, 2).float()
    law = {"scale": seen.scale, "softcap": seen.softcap, "dtype": v.dtype}
    found = (
        readable_by(k[head].float(), asked[head], eta=ETA, p=P, dv=v.shape[-1], **law) for head in range(k.shape[0])
    )
    return [max(1, one.groups) for one in found]
