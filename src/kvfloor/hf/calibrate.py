"""Measure how many tokens each kv head tells apart on a calibration prompt, to divide a cache budget among the heads.

A head's queries are those of the query heads in its GQA group. A head tells tokens apart if the value of each could be
recovered from attention outputs of its queries that are only roughly right. Roughly right means, for values in [-1, 1],
that each number of an output is within 0.25 (`ETA`) of the exact one with probability 0.9 (`P`). A value counts as
recovered if at least two levels of each of its numbers can be told apart. A cache whose outputs are so right must then
store a separate value for each of the tokens. Tokens that the queries do not separate can form a group, of which one
common value could be recovered. A compressed layer is a layer with attention over all tokens, whose keys and values
kvfloor compresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.floors.measured import readable_after
from kvfloor.hf.allocate import Shares
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.ranks import ranks_of
from kvfloor.hf.recording import Recorded, Recorder
from kvfloor.hf.weights import input_device
from kvfloor.hf.wrappers import unwrapped

ETA, P = 0.25, 0.9  # error allowed in answers, of values in [-1, 1], and probability with which it must be kept
MOST_QUERIES = 256  # of the calibration prompt's newest half, per query head


def floor_shares(model: PreTrainedModel, prompt: Sequence[int] | Tensor, *, kept: float = 0.5) -> Shares:
    """Return each kv head's share of a cache budget: one tuple per compressed layer, with one share per kv head.

    A share is a multiple of the budget per head; the mean of all shares is 1.
    Law: for each head, let r be the number of groups of tokens of `prompt` whose common value could be recovered from
    the attention outputs of the head's queries (`kvfloor.floors.measured.readable_after`). A group has one or more
    tokens. Then share = kept + (1 - kept) * r / (mean of r over all heads).
    prompt   token ids (n,) or (1, n) of a typical prompt, its question included. The model runs over it with a cache
             that keeps every token; the head's queries are those of the prompt's newest 256 tokens, or of its second
             half if it has fewer than 512. The groups are of the tokens before these
    kept     share of the mean budget that every head gets in any case. With 0, a head that tells few tokens apart gets
             a very small budget. Such a budget is enough only if the cache keeps just these tokens. A head that
             averages over many tokens would lose most of them
    Collective on a sharded model: every rank measures its own kv heads, and gets the shares of all.
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
        model(ids.to(input_device(unwrapped(model))), past_key_values=cache, use_cache=True, logits_to_keep=1)
    parts = ranks_of(unwrapped(model)).gather(
        "floor_shares()", [distinguished(seen.of(layer.index)) for layer in layers]
    )
    return in_proportion([[need for line in layer for need in line] for layer in zip(*parts, strict=True)], kept)


def in_proportion(needs: Sequence[Sequence[float]], kept: float) -> Shares:
    """Return each head's share: kept + (1 - kept) * need / (mean of all needs). The mean of all shares is 1.

    needs: one sequence per layer, with one positive number (`need`) per kv head. Returns one tuple per layer, with one
    share per kv head.
    """
    mean = sum(map(sum, needs)) / sum(map(len, needs))
    return tuple(tuple(kept + (1 - kept) * need / mean for need in line) for line in needs)


def distinguished(seen: Recorded) -> list[int]:
    """Return, per kv head of a layer, how many groups of tokens its queries tell apart (at least 1).

    The queries are those of the prompt's newest 256 tokens (its second half at most), one per token and query head of
    the GQA group. A group is one or several tokens before these, whose common value could be recovered from the outputs
    of these queries (see the module). Each query also attends to the tokens after the groups' up to its own, and to its
    query head's sink if there is one.
    seen: the queries, keys and values of the layer on the calibration prompt, of one batch item; on a sharded model,
    those of this process's heads.
    """
    q, k, v = seen.by_row
    n = k.shape[1]
    found = readable_after(
        q.float(), k.float(), n - min(MOST_QUERIES, n // 2), scale=seen.scale, softcap=seen.softcap,
        sink=seen.sink_by_head, eta=ETA, p=P, dv=v.shape[-1], dtype=v.dtype,
    )  # fmt: skip
    return [max(1, one.groups) for one in found]
