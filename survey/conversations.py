"""Run a model on a left-padded batch longer than its sliding windows, in chunks and at once, with a second turn."""

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
    """Hold the result of one run: logits (tokens, vocabulary) of the real tokens compared, and the tokens chosen."""

    logits: Tensor
    tokens: Tensor


@torch.inference_mode()
def by_forwards(model: Any, cache: Cache | None) -> Heard:
    """Feed a prompt and a second turn, one chunk of slots per forward, and return the logits of every real token."""
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
    """Generate a greedy answer to a prompt and one to a second turn, and return the logits of every generated token.

    `prefill` holds arguments of generate() for the first turn only: generate() of transformers 5.2 starts at position 0
    again when it feeds a second turn in chunks.
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
    """Run `by_generate` with the prompt fed in chunks."""
    return by_generate(model, cache, prefill_chunk_size=CHUNK)


RUNS = (by_forwards, by_generate, in_chunks)


def prompt(slots: int) -> tuple[Tensor, Tensor]:
    """Return two rows of random tokens, the first one left-padded by 13, and their mask."""
    ids = torch.randint(2, VOCABULARY - 1, (2, slots), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    return ids, mask


def difference(mine: Heard, theirs: Heard) -> float:
    """Return the largest difference of two logits over the largest stock logit; infinity if the tokens differ."""
    if mine.tokens.shape != theirs.tokens.shape or not bool(torch.isfinite(mine.logits).all()):
        return float("inf")
    if not torch.equal(mine.tokens, theirs.tokens):
        return float("inf")
    return apart(mine, theirs)


def apart(mine: Heard, theirs: Heard) -> float:
    """Return the largest difference of two logits over the largest stock logit, even if the chosen tokens differ."""
    return float((mine.logits - theirs.logits).abs().max() / theirs.logits.abs().max())


def same_cache(given: Cache | None, out: Any) -> Cache:
    """Return the cache in the output of a forward or generate(); raise RuntimeError if it is not the `given` one."""
    if given is not None and out.past_key_values is not given:
        raise RuntimeError(f"a {type(given).__name__} was given, a {type(out.past_key_values).__name__} was used")
    return out.past_key_values


def check_bound(cache: CompressedCache) -> None:
    """Raise ValueError if a layer holds more tokens than its method's capacity."""
    for layer in cache.compressed:
        if layer.state is None:
            continue  # a layer that text never reaches, such as one that attends to images
        limit = layer.state.method.capacity(layer.seen)
        if limit is not None and int(layer.state.held.max()) > limit:
            raise ValueError(f"layer {layer.index} holds {layer.state.held.tolist()} tokens of {limit}")
