"""Time how long a cache takes to read a prompt: by the model, and from a record of it: `python bench/shared_prompt.py`

The prompt is 1,024 tokens of a shipped text and the model SmolLM2, which is fetched by name if it is not there. Methods
that compress only at the prompt's end are filled from one recorded run of the model (`kvfloor.hf.intake`). Figures are
medians in seconds, compression included; quote the ratios. The last column counts the layers in which both caches keep
the same tokens. Prints no figures while the tests of the timed code fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from gate import green
from timing import interleaved

from kvfloor.audit.measure import CHUNK_SLOTS
from kvfloor.audit.texts import excerpts
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.intake import Room, record_intake
from kvfloor.models import load

TIMED = ["tests/hf/test_intake.py"]
METHODS = ("snapkv@25%", "k_center@25%", "expected(prefill=dense)@25%", "h2o(prefill=dense)@25%")
TOKENS, ROUNDS = 1024, 3


def main() -> None:
    if not green(*TIMED):
        sys.exit(1)
    model, tokenizer = load("smollm2")
    prepare(model)
    prompt = excerpts(["speech"], [TOKENS], 1, lambda text: tokenizer(text, verbose=False).input_ids)[0].context

    def opened(method: str) -> Dialogue:
        return Dialogue.start(model, CompressedCache(model, method, context=TOKENS), 1)

    intake = record_intake(opened("exact"), [prompt], CHUNK_SLOTS, Room())
    assert intake is not None

    def by_model(method: str) -> Callable[[], Any]:
        return lambda: fed(opened(method), lambda dialogue: dialogue.feed([prompt], CHUNK_SLOTS))

    def from_record(method: str) -> Callable[[], Any]:
        return lambda: fed(opened(method), intake.give)

    print(f"{'method':30} {'model':>8} {'record':>8} {'ratio':>6} {'same layers':>12}")
    for method in METHODS:
        both = {"model": by_model(method), "record": from_record(method)}
        one, other = (run().compressed for run in both.values())
        same = sum(torch.equal(a.state.slots.position, b.state.slots.position) for a, b in zip(one, other, strict=True))
        times = interleaved(both, ROUNDS)
        slow, fast = (times[name] / 1e3 for name in both)
        print(f"{method:30} {slow:8.2f} {fast:8.2f} {slow / fast:6.1f} {same:>6} of {len(one)}")


def fed(dialogue: Dialogue, feed: Callable[[Dialogue], object]) -> Any:
    """Feed the prompt by `feed`, end it, and return the cache."""
    feed(dialogue)
    cache: Any = dialogue.cache
    cache.seal()
    return cache


if __name__ == "__main__":
    main()
