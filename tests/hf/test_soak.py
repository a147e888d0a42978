"""200,000 tokens through one cache: the process's memory does not grow with them, nor do the cache's bytes."""

from __future__ import annotations

import gc
import math
import os
import statistics
from pathlib import Path

import pytest
import torch

from kvfloor.hf import CompressedCache, prepare
from kvfloor.models import load

TOKENS, CHUNK, DECODED, MARKS = 200_000, 512, 16, 80
WARM = 40_000  # tokens after which buffers of all sizes have been asked for
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def slope(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least-squares slope and the half-width of its 95 % interval, from the means of ten stretches.

    Neighbouring measurements of a process's memory are alike; stretches are nearly independent.
    """
    size = len(x) // 10
    xs, ys = ([statistics.fmean(z[i : i + size]) for i in range(0, 10 * size, size)] for z in (x, y))
    fit = statistics.linear_regression(xs, ys)
    rest = [b - fit.slope * a - fit.intercept for a, b in zip(xs, ys, strict=True)]
    spread = math.sqrt(sum(r * r for r in rest) / 8)
    return fit.slope, 2.306 * spread / math.sqrt(9 * statistics.variance(xs))  # Student's t, 8 degrees of freedom


def test_the_slope_is_that_of_a_line_and_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    x = [float(i) for i in range(80)]
    for grows in (0.0, 0.5):
        y = [grows * a + float(torch.randn((), generator=draw)) for a in x]
        found, half = slope(x, y)
        assert abs(found - grows) <= half < 0.1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of the process")
@pytest.mark.parametrize("method", ["sinks(4)@512", "h2o(recent=64)@512"])
def test_memory_does_not_grow_over_200_000_tokens(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt comes in chunks, and after each some tokens are decoded one by one."""
    model, _ = load()
    prepare(model)
    cache = CompressedCache(model.config, method)
    draw = torch.Generator().manual_seed(0)
    tokens, memory, sizes = [], [], set()
    with torch.inference_mode():
        while cache.get_seq_length() < TOKENS:
            ids = torch.randint(2, model.config.vocab_size, (1, CHUNK), generator=draw)
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for _ in range(DECODED):
                out = model(out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, use_cache=True)
            sizes.add(cache.nbytes)
            if cache.get_seq_length() > WARM:
                gc.collect()
                tokens.append(cache.get_seq_length() / 1e5)
                memory.append(resident_bytes() / 2**20)
    found, half = slope(tokens, memory)
    told = f"{method}: {cache.get_seq_length():,} tokens, {max(sizes):,} bytes of cache, process {memory[-1]:.0f} MiB"
    kept = f"all keys and values would be {exact_mib(model):.0f} MiB"
    with capsys.disabled():
        print(f"\n{told}\n  slope {found:+.2f} +- {half:.2f} MiB per 100,000 tokens; {kept}")
    assert len(sizes) == 1
    assert abs(found) <= half, "the process grows, or shrinks, with the tokens"
    assert half < exact_mib(model) / 10, "the measurement is too coarse to tell a cache that keeps every token"


def exact_mib(model: torch.nn.Module) -> float:
    """MiB of the keys and values of 100,000 tokens."""
    config = model.config
    width = config.num_key_value_heads * config.head_dim * 2 * config.num_hidden_layers
    return 1e5 * width * model.dtype.itemsize / 2**20
