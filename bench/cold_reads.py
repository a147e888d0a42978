"""Time a decoded token by where tiered keeps its exact tokens, as multiples of the exact cache, on SmolLM2.

    python bench/cold_reads.py [--contexts 2048,8192] [--epsilons 0.02] [--tokens 16]

The exact cache reads the start of the text `speech`, and the others are given its keys and values, so all begin alike.
Each then decodes the same tokens, those of the text. Caches take turns token by token in one process, so the machine's
drift affects all of them; figures are medians. Columns:

ms          milliseconds of a decoded token
x exact     the same over that of `exact`
hot, cold   MB in memory, and on the host or the disk, of the whole cache
read        kB that a token read from the host or the disk, all layers together, on average over the decoded tokens
fetched     exact tokens fetched per decoded token, all layers and kv heads together

The file is in the folder for temporary files (TMPDIR). Its pages are in the system's page cache, as they were written
just before: what is timed is the way through the file, not a slow disk. Prints no figures while the tests of the timed
code fail.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from gate import green
from torch import Tensor

from kvfloor.audit.texts import excerpts
from kvfloor.hf import CompressedCache, prepare
from kvfloor.models import load

PLACES = ("device", "ram", "disk")
CHUNK = 256


@torch.inference_mode()
def fed(model: Any, cache: CompressedCache, ids: Tensor) -> None:
    for piece in ids.split(CHUNK, 1):
        model(piece, past_key_values=cache, logits_to_keep=1)


@torch.inference_mode()
def given(cache: CompressedCache, exact: CompressedCache, heads: int) -> None:
    """Append all tokens that `exact` holds to an empty cache of the same model, of `heads` query heads."""
    for layer, source in zip(cache.compressed, exact.compressed, strict=True):
        state = source.state
        assert state is not None and state.slots is not None
        view, spec = state.slots.view(), state.spec
        keys, values = cache.update(view.k.unsqueeze(0), view.v.unsqueeze(0), layer.index)
        asked = keys.new_zeros(1, heads, view.width, spec.d)
        layer.append(asked, keys, values, None, (spec.scale, spec.softcap))


def fetches(cache: CompressedCache) -> tuple[int, ...]:
    """Return the bytes read from a cold tier, and the exact tokens fetched, over all layers so far."""
    told = [entry["certified"] for entry in cache.report()]
    return tuple(sum(one[name] for one in told if one) for name in ("cold_bytes_read", "tokens_fetched"))


def timed(model: Any, ids: Tensor, context: int, epsilon: float, tokens: int) -> None:
    """Print a line for exact, and one for tiered at each place, with this context and these tokens decoded after it."""
    methods = {"exact": "exact"} | {place: f"tiered(epsilon={epsilon},cold={place})" for place in PLACES}
    caches = {name: CompressedCache(model, method) for name, method in methods.items()}
    fed(model, caches["exact"], ids[:, :context])
    for place in PLACES:
        given(caches[place], caches["exact"], model.config.num_attention_heads)
    before = {name: fetches(cache) for name, cache in caches.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for i in range(context, context + tokens):
        for name, cache in caches.items():
            begin = time.perf_counter()
            fed(model, cache, ids[:, i : i + 1])
            times[name].append((time.perf_counter() - begin) * 1e3)
    exact = statistics.median(times["exact"])
    for name, cache in caches.items():
        ms, told, after = statistics.median(times[name]), cache.bytes, fetches(cache)
        read, fetched = ((b - a) / tokens for a, b in zip(before[name], after, strict=True))
        print(
            f"{context:6} {epsilon:7g} {name:7} {ms:9.1f} {ms / exact:8.2f} {told['hot'] / 1e6:8.1f} "
            f"{told['cold'] / 1e6:8.1f} {read / 1e3:9.1f} {fetched:9.1f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="2048,8192")
    parser.add_argument("--epsilons", default="0.02")
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    if not green("tests/methods/tiered"):
        return 1
    contexts = [int(one) for one in options.contexts.split(",")]
    model, tokenizer = load("smollm2")
    prepare(model)
    text = excerpts(["speech"], [max(contexts)], options.tokens, lambda text: tokenizer(text, verbose=False).input_ids)
    ids = torch.tensor([text[0].context + text[0].continuation])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.dtype}, {options.tokens} tokens each")
    print("context epsilon cache          ms  x exact   hot MB  cold MB   read kB   fetched")
    for context in contexts:
        for epsilon in options.epsilons.split(","):
            timed(model, ids, context, float(epsilon), options.tokens)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
