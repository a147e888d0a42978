"""What the survey says to every model: a padded batch past every window, in chunks and at once, and a second turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvfloor.hf.cache import CompressedCache
from survey.tiny import VOCABULARY, WINDOW

PROMPT, PADS, TURN, ANSWER, CHUNK = 40, 13, 9, 6, 11  # tokens: the window is full before the first answer
assert PROMPT - PADS > WINDOW


@dataclass(frozen=True)
class Heard:
    """What a run gave: logits (tokens, vocabulary) at every real position looked at, and the tokens chosen."""

    logits: Tensor
    tokens: Tensor


@torch.inference_mode()
def by_forwards(model: Any, cache: Cache | None) -> Heard:
    """A prompt and a second turn, a chunk of slots per forward; every logit of a real token."""
    ids, mask = prompt(PROMPT + TURN)
    logits = []
    for start in range(0, ids.shape[1], CHUNK):
        stop = min(start + CHUNK, ids.shape[1])
        out: Any = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = same_cache(cache, out)
        logits.append(out.logits)
        if isinstance(cache, CompressedCache):
            check_bound(cache)
    whole = torch.cat(logits, 1)[mask.bool()]
    return Heard(whole, whole.argmax(-1))


@torch.inference_mode()
def by_generate(model: Any, cache: Cache | None, **prefill: Any) -> Heard:
    """A prompt, a greedy answer, a second turn, another answer; the logits of every answered token.

    `prefill` is for the first turn alone: generate() of transformers 5.2 starts at position 0 again if it is told to
    feed a second turn in chunks.
    """
    ids, mask = prompt(PROMPT)
    turn = torch.randint(2, VOCABULARY - 1, (2, TURN), generator=torch.Generator().manual_seed(5))
    logits: list[Tensor] = []
    for more, options in ((ids[:, :0], prefill), (turn, {})):
        ids = torch.cat([ids, more], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        out: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=ANSWER,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        ids, cache = out.sequences, same_cache(cache, out)
        logits += out.logits
    return Heard(torch.cat(logits), ids)


def in_chunks(model: Any, cache: Cache | None) -> Heard:
    """As `by_generate`, the prompt fed in chunks."""
    return by_generate(model, cache, prefill_chunk_size=CHUNK)


RUNS = (by_forwards, by_generate, in_chunks)


def prompt(slots: int) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, the first left-padded by 13, and their mask."""
    ids = torch.randint(2, VOCABULARY - 1, (2, slots), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    return ids, mask


def difference(mine: Heard, theirs: Heard) -> float:
    """Largest difference of two logits over the largest stock logit; infinite if other tokens were chosen."""
    if mine.tokens.shape != theirs.tokens.shape or not bool(torch.isfinite(mine.logits).all()):
        return float("inf")
    if not torch.equal(mine.tokens, theirs.tokens):
        return float("inf")
    return apart(mine, theirs)


def apart(mine: Heard, theirs: Heard) -> float:
    """Largest difference of two logits over the largest stock logit, whatever tokens were chosen."""
    return float((mine.logits - theirs.logits).abs().max() / theirs.logits.abs().max())


def same_cache(given: Cache | None, out: Any) -> Cache:
    """Return the cache that a forward or generate() went on with; RuntimeError if it is not the one it was given."""
    if given is not None and out.past_key_values is not given:
        raise RuntimeError(f"a {type(given).__name__} was given, a {type(out.past_key_values).__name__} was used")
    return out.past_key_values


def check_bound(cache: CompressedCache) -> None:
    """ValueError if a layer holds more tokens than its method's capacity."""
    for layer in cache.compressed:
        if layer.state is None:
            continue  # a layer that was not asked, such as one that looks at images
        limit = layer.state.method.capacity(layer.seen)
        if limit is not None and int(layer.state.held.max()) > limit:
            raise ValueError(f"layer {layer.index} holds {layer.state.held.tolist()} tokens of {limit}")
