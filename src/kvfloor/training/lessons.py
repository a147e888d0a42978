"""Prepare the training data of LESS's kernels: evicted tokens, later queries and exact attention, layer by layer.

LESS (Dong et al. 2024) replaces the evicted tokens of a KV cache by a linear-attention state; its kernels are small
networks that map keys and queries to this state's features. A lesson is the training data from one text in one layer of
a model. An eviction policy has run over the text, so it is known when each token is evicted. The prompt is the context
of a text; some policies evict at its end. In shapes, a row is one kv head, P the number of kv heads, g of query heads
per kv head; d and dv are the widths of a key and a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvfloor.audit.plan import Item
from kvfloor.core.attend import attend
from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Drop
from kvfloor.hf import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.recording import Recorder
from kvfloor.tasks import TASKS

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Text:
    """Hold the token ids of a text in two parts: `context`, the prompt, and `rest`, a question with its answer."""

    context: list[int]
    rest: list[int]


@dataclass(frozen=True)
class Lesson:
    """Hold one text in one layer: keys and values of n tokens, and queries of the m tokens after the first eviction.

    A departure is a time at which tokens of any kv head are evicted; departures are numbered from 0.
    q               (P, g, m, d): the queries
    k, v            (P, n, d), (P, n, dv): keys and values of all tokens
    rank            (P, n): number of the departure at which each token is evicted; `departures` if never
    departures      how many departures there are
    gone            (m,): how many departures precede each query
    mean, log_mass  (P, g, m, dv), (P, g, m): attention over the tokens still held, and the log-sum-exp of their logits
    exact           (P, g, m, dv): attention over all tokens
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rank: Tensor
    departures: int
    gone: Tensor
    mean: Tensor
    log_mass: Tensor
    exact: Tensor


def texts(tokenizer: Any, items: Sequence[Item]) -> list[Text]:
    """Tokenize each item: return the token ids of its context, and those of its first question with the answer.

    An item is a context with at least one question and its right answer. `tokenizer` is the transformers tokenizer of
    the model.
    """

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids if text else []

    return [
        Text(
            tokenizer(item.context).input_ids,
            plain(item.turns[0].lead) + plain(" " + item.answer),
        )
        for item in items
    ]


def task_items(tokenizer: Any, samples: int, length: int, seed: int) -> list[Item]:
    """Draw items from the built-in tasks, `samples` in all, with contexts of at most `length` tokens.

    The tasks take turns: each gives one item, then each a second one, and so on. An item is a context with a question
    and its right answer. `tokenizer`, the model's, counts the tokens. `seed` decides all items.
    """

    def size(text: str) -> int:
        return len(tokenizer(text).input_ids)

    tasks = list(TASKS.values())
    drawn = (tasks[i % len(tasks)].generate(seed, i, length, count=size) for i in range(samples))
    return [Item(one.context, one.turns) for one in drawn]


def recorded(model: Any, material: Sequence[Text], layer: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Any, Any]]:
    """Yield (q, k, v, scale, softcap) of model layer `layer` for each text of `material`.

    q (kv heads, g, n, d), k (kv heads, n, d) and v (kv heads, n, dv) are taken after RoPE, while the model runs over
    the text with an exact cache; g is the size of the GQA group, n the number of tokens. scale is the factor on q.k,
    softcap the cap on logits or None.
    """
    for text in material:
        cache = CompressedCache(model.config, "exact")
        seen = Recorder(one for one in cache.compressed if one.index == layer)
        Dialogue.start(model, cache, 1).feed([text.context + text.rest])
        one = seen.of(layer)
        yield *one.by_row, one.scale, one.softcap


def departures(method: Bounded, spec: Spec, q: Tensor, k: Tensor, v: Tensor, prompt: int) -> Tensor:
    """Return the time (rows, n) at which the eviction policy `method` evicts each of a text's n tokens, per kv head.

    The time is the number of tokens that the cache had received by then, and n + 1 for a token that is never evicted.
    The first `prompt` tokens are the prompt. q (rows, g, n, d), k (rows, n, d) and v (rows, n, dv) are one layer's
    queries, keys and values; `spec` holds the sizes and constants of the layer's cache.
    """
    state = replace(method, summary=Drop()).open(spec)
    assert isinstance(state, BoundedState)
    n = k.shape[1]
    left = torch.full((spec.rows, n), n + 1)
    cuts = sorted({*range(method.block, n, method.block), prompt, n})
    for start, stop in zip([0, *cuts], cuts, strict=False):
        state.step(q[:, :, start:stop], k[:, start:stop], v[:, start:stop])
        if stop == prompt:
            state.seal()
        view = state.slots.view()
        held = torch.zeros(spec.rows, n + 1, dtype=torch.bool)
        position = view.position if view.live is None else view.position.masked_fill(~view.live, n)
        held.scatter_(1, position.cpu(), True)
        fresh = ~held[:, :stop] & (left[:, :stop] > n)
        left[:, :stop][fresh] = stop
    return left


def lesson(method: Bounded, layer: int, text: Text, taken: tuple[Tensor, Tensor, Tensor, Any, Any]) -> Lesson | None:
    """Return one text's training data for one layer's kernels; None if no query follows an eviction.

    method  the eviction policy with its budget
    layer   the layer's number in the model
    taken   (q, k, v, scale, softcap) of the layer on this text: queries (rows, g, n, d), keys (rows, n, d) and values
            (rows, n, dv) of all n tokens, the factor on q.k, and the cap on logits or None
    """
    q, k, v, scale, softcap = taken
    rows, g, n, d = q.shape
    places = [(layer, head) for head in range(rows)]
    spec = Spec(rows, d, v.shape[2], scale, softcap, k.dtype, places=places)
    left = departures(method, spec, q, k, v, len(text.context)).to(q.device)
    times, order = torch.unique(left.clamp_max(n), return_inverse=True)
    times = times[times < n]  # no query follows a token evicted with the last one
    if not len(times):
        return None
    first = int(times[0])
    asked = torch.arange(first, n, device=q.device)
    token = torch.arange(n, device=q.device)
    means, masses, exact = [], [], []
    for piece in asked.split(_QUERIES_AT_ONCE):
        flat = q[:, :, piece].flatten(1, 2)
        later = token > piece.unsqueeze(1)
        away = (left.unsqueeze(1) <= piece.unsqueeze(1)) | later  # (rows, m, n)
        mean, mass = attend(flat, k, v, scale, softcap, hide=away.repeat(1, g, 1))
        means.append(mean.unflatten(1, (g, -1)))
        masses.append(mass.unflatten(1, (g, -1)))
        exact.append(attend(flat, k, v, scale, softcap, hide=later.repeat(g, 1).unsqueeze(0))[0].unflatten(1, (g, -1)))
    gone = (times.unsqueeze(0) <= asked.unsqueeze(1)).sum(1)
    return Lesson(
        q[:, :, first:].float(),
        k.float(),
        v.float(),
        order.clamp_max(len(times)),
        len(times),
        gone,
        torch.cat(means, 2),
        torch.cat(masses, 2),
        torch.cat(exact, 2),
    )
