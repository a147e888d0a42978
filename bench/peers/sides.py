"""Read a text with kvpress and with kvfloor: a dense prompt, one compression, then a continuation to score.

Positions are the tokens' places in the text on both sides, also after the compression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kvpress
import torch
from pairs import Pair
from parity_table import Reading
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfloor.audit.nats import figures
from kvfloor.audit.texts import Excerpt
from kvfloor.core.method import Method
from kvfloor.hf import CompressedCache
from kvfloor.hf.layer import Eviction


@dataclass(frozen=True)
class ExactReading:
    """Hold an excerpt, and the logits (scored, vocabulary) of its continuation with the exact cache."""

    excerpt: Excerpt
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, excerpt: Excerpt) -> ExactReading:
        cache, last = prompt(model, excerpt, DynamicCache())
        return cls(excerpt, score(model, cache, excerpt, last))

    def kl(self, logits: Tensor) -> Tensor:
        """Return the KL divergence (t,), in nats, of the first t predictions from the exact ones."""
        n = len(logits)
        ids = torch.tensor(self.excerpt.continuation[:n])
        return torch.tensor(figures([self.logits[:n]], [logits], [ids]).kl, dtype=torch.float64)


class Several(kvpress.BasePress):
    """Run many presses on one dense prompt, each on a cache of its own, by kvpress's own hook.

    A press sees the prompt's hidden states and all of its keys, and no other press's evictions, as in a run of its own.
    """

    def __init__(self, presses: list[kvpress.BasePress]) -> None:
        self.presses, self.caches = presses, [DynamicCache() for _ in presses]

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        for press in self.presses:
            press.post_init_from_model(model)

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for press, cache in zip(self.presses, self.caches, strict=True):
            cache.update(layer.keys, layer.values, module.layer_idx)
            press.forward_hook(module, input, kwargs | {"past_key_values": cache}, output)
        return output


def prompt(model: PreTrainedModel, excerpt: Excerpt, cache: Any) -> tuple[Any, Tensor]:
    """Feed the context to the cache; return the cache, and the logits (1, vocabulary) of the token after it."""
    return cache, model(torch.tensor([excerpt.context]), past_key_values=cache, logits_to_keep=1).logits[0]


def score(
    model: PreTrainedModel,
    cache: Any,
    excerpt: Excerpt,
    last: Tensor,
    start: int | None = None,
    steps: int | None = None,
) -> Tensor:
    """Return the logits (scored, vocabulary) that predict the continuation, `last` being those of its first token.

    start   position of the first token of the continuation; its place in the text unless given
    steps   feed this many tokens one by one; None: feed the whole continuation at once
    """
    start, tokens = len(excerpt.context) if start is None else start, torch.tensor([excerpt.continuation])
    at = torch.arange(start, start + tokens.shape[1]).unsqueeze(0)
    cuts = [slice(None)] if steps is None else [slice(i, i + 1) for i in range(steps)]
    parts = [model(tokens[:, i], position_ids=at[:, i], past_key_values=cache).logits[0] for i in cuts]
    return torch.cat([last, *parts])[:-1]


def press_of(pair: Pair, budget: int, context: int, run: int = 0) -> kvpress.BasePress:
    """Return the pair's press, set to keep `budget` of `context` tokens; `run` seeds a press with `seed="run"`."""
    ratio, arguments = 1 - budget / context, {**pair.arguments}
    if pair.inner == "KnormPress":
        decoding = kvpress.DecodingPress(kvpress.KnormPress(), arguments["interval"], target_size=budget)
        return kvpress.PrefillDecodingPress(kvpress.KnormPress(ratio), decoding)
    if pair.inner:
        return getattr(kvpress, pair.press)(getattr(kvpress, pair.inner)(ratio))
    if arguments.get("seed") == "run":
        arguments["seed"] = run
    return getattr(kvpress, pair.press)(compression_ratio=ratio, **arguments)


def record_scores(press: Any) -> list[Tensor]:
    """Return a list that gets the scores (kv heads, context) of each layer when the press computes them."""
    inner = getattr(press, "press", press)
    taken: list[Tensor] = []
    original = inner.score

    def score(*given: Any, **named: Any) -> Tensor:
        found = original(*given, **named)
        taken.append(found[0].detach().clone())
        return found

    inner.score = score
    return taken


def kept_tokens(whole: Tensor, left: Tensor) -> Tensor:
    """Return a mask (heads, n) of the rotated keys `whole` (1, heads, n, d) that are in `left` (1, heads, m, d).

    Every eighth entry is compared. Raises RuntimeError where these do not tell two tokens apart.
    """
    same = (left[0, :, :, None, ::8] == whole[0, :, None, :, ::8]).all(3)
    if not bool((same.sum(2) == 1).all()):
        raise RuntimeError("two tokens of the prompt have equal keys, so the kept ones cannot be told")
    return same.any(1)


@torch.no_grad()
def theirs(
    model: PreTrainedModel, presses: list[kvpress.BasePress], pairs: list[Pair], exact: ExactReading
) -> list[Reading]:
    """Read the excerpt under each press; a cache is scored without the press, which does nothing after the prompt."""
    scores = [record_scores(press) for press in presses]
    once = Several(presses)
    with once(model):
        whole, last = prompt(model, exact.excerpt, DynamicCache())
    model.set_attn_implementation("sdpa")
    readings = []
    for pair, cache, found in zip(pairs, once.caches, scores, strict=True):
        layers = list(zip(whole.layers, cache.layers, strict=True))
        if pair.ranks:  # the kept keys were rotated anew: take the tokens of the highest scores
            top = torch.stack(found).topk(layers[0][1].keys.shape[2], dim=-1).indices
            kept = torch.zeros_like(torch.stack(found), dtype=torch.bool).scatter(2, top, True)
        else:
            kept = torch.stack([kept_tokens(every.keys, layer.keys) for every, layer in layers])
        start = cache.get_seq_length() if pair.ranks else None
        readings.append(Reading(exact.kl(score(model, cache, exact.excerpt, last, start)), kept, found))
    return readings


@torch.no_grad()
def theirs_stepwise(model: PreTrainedModel, press: kvpress.BasePress, exact: ExactReading, steps: int) -> Reading:
    """Read the excerpt under a press that stays active while the continuation is fed token by token."""
    with press(model):
        cache, last = prompt(model, exact.excerpt, DynamicCache())
        return Reading(exact.kl(score(model, cache, exact.excerpt, last, steps=steps)))


@torch.no_grad()
def ours(model: PreTrainedModel, method: Method, exact: ExactReading, steps: int | None = None, **more: Any) -> Reading:
    """Read the excerpt under a method of kvfloor, on the prepared model; `more` are arguments of the cache."""
    config, n = model.config, len(exact.excerpt.context)
    kept = torch.ones(config.num_hidden_layers, config.num_key_value_heads, n, dtype=torch.bool)

    def leave(gone: Eviction) -> None:
        kept[gone.layer, gone.head, gone.position] = False

    cache = CompressedCache(model, method, context=n, on_evict=leave, **more)
    _, last = prompt(model, exact.excerpt, cache)
    cache.seal()
    cache.call_on_evict(None)
    return Reading(exact.kl(score(model, cache, exact.excerpt, last, steps=steps)), kept)
