"""Time a model's decoded token and a streamed prompt, kvfloor beside transformers: `python bench/generate.py`

decode   one forward of one token with a context of 32,000 tokens, the caches in turn, cache updates included. The model
         has 16 layers, hidden 1,024, 16 heads on 4 kv heads, 246 M random parameters. Stock is DynamicCache with sdpa,
         the default of transformers.
prefill  one layer's attention over 32,768 tokens (4 kv heads of width 64, a group of 4): states that stream it under a
         budget of 1,024 tokens, and causal sdpa over all of it.
Caches are filled with normal keys and values, not by a forward. Figures are medians; quote the ratios. Prints no
figures while the tests of the timed code fail.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable

import torch
from gate import green
from timing import interleaved
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvfloor import Spec, parse
from kvfloor.hf import CompressedCache, prepare

TIMED = ["tests/hf/test_exact.py", "tests/hf/test_compressed.py", "tests/hf/test_generate.py"]
OURS = ("exact", "sinks(4)@512", "h2o(recent=64)@512")
SHORT, CONTEXT, TOKENS = 128, 32_000, 64
ROWS, GROUP, WIDTH, PROMPT, BUDGET = 4, 4, 64, 32_768, 1024


def middle(dtype: torch.dtype) -> PreTrainedModel:
    """Build the random Llama whose size the speed targets are stated for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()


def filled(model: PreTrainedModel, method: str | None, n: int) -> Cache:
    """Return a cache with n normal tokens in every layer: the stock cache, or a method's."""
    config, source = model.config, torch.Generator().manual_seed(0)
    cache = DynamicCache(config=config) if method is None else CompressedCache(config, method)
    shape = (1, config.num_key_value_heads, n, config.hidden_size // config.num_attention_heads)
    for index in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, generator=source).to(model.dtype) for _ in range(2))
        if isinstance(cache, CompressedCache):
            g = config.num_attention_heads // config.num_key_value_heads
            layer = cache.compressed[index]
            state = layer.opening.open(index, index, k, shape[-1], g, shape[-1] ** -0.5, None)
            state.append(k[0], v[0])
            state.seal()
            layer.resume(state, {"seen": n, "batch": 1, "is_initialized": True}, model)
        else:
            cache.update(k, v, index)
    return cache


def decode(dtype: torch.dtype, tokens: int) -> None:
    """Print the time of one token with each cache."""
    stock, ours = middle(dtype), prepare(middle(dtype))
    runs = {"stock, 128 tokens": (stock, filled(stock, None, SHORT)), "stock": (stock, filled(stock, None, CONTEXT))}
    runs |= {method: (ours, filled(ours, method, CONTEXT)) for method in OURS}

    def one_token(model: PreTrainedModel, cache: Cache) -> None:
        with torch.no_grad():
            model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)

    times = interleaved({name: lambda run=run: one_token(*run) for name, run in runs.items()}, tokens)
    base, exact, short = (times[name] for name in ("stock", "exact", "stock, 128 tokens"))
    print(f"\none token, {str(dtype).removeprefix('torch.')}, context {CONTEXT:,} (median of {tokens})")
    for name, (_, cache) in runs.items():
        ms = times[name]
        held = cache.nbytes if isinstance(cache, CompressedCache) else sum(x.keys.nbytes * 2 for x in cache.layers)
        compared = f"{base / ms:6.2f}x stock {exact / ms:6.2f}x exact"
        print(f"  {name:<24} {ms:9.1f} ms   {compared}   {held / 2**20:8.1f} MiB")
    for method in OURS[1:]:
        print(f"  {method} over stock at 128 tokens: {times[method] / short:.3f}")


def prefill(repeats: int) -> None:
    """Print the time to stream a prompt through one layer's attention with a cache that is always bounded."""
    source = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, GROUP, PROMPT, WIDTH, generator=source)
    k, v = (torch.randn(ROWS, PROMPT, WIDTH, generator=source) for _ in range(2))
    spec = Spec(ROWS, WIDTH, WIDTH, WIDTH**-0.5)
    by_head = (q.reshape(1, ROWS * GROUP, PROMPT, WIDTH), k.unsqueeze(0), v.unsqueeze(0))
    peaks: dict[str, float] = {}

    def stream(method: str) -> None:
        state = parse(method).open(spec)
        state.step(q, k, v)
        peaks[method] = state.peak_nbytes / state.nbytes

    runs: dict[str, Callable[[], object]] = {"causal sdpa": lambda: sdpa(*by_head, is_causal=True, enable_gqa=True)}
    for method in (f"sinks(4)@{BUDGET}", f"h2o(recent=64)@{BUDGET}", f"sinks(4,block=128)@{BUDGET}", "exact"):
        runs[method] = lambda method=method: stream(method)
    times = interleaved(runs, repeats)
    base = times["causal sdpa"]
    print(f"\na prompt of {PROMPT:,} tokens, {ROWS} kv heads, group {GROUP}, d = {WIDTH} (median of {repeats})")
    for name, ms in times.items():
        peak = f"peak {peaks[name]:.2f}x its bytes at the end" if name in peaks else ""
        print(f"  {name:<24} {ms / 1e3:8.2f} s   {base / ms:6.2f}x sdpa   {peak}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("decode", "prefill"))
    given = parser.parse_args()
    if not green(*TIMED):
        return 1
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads")
    if given.only != "prefill":
        for dtype in (torch.float32, torch.bfloat16):
            decode(dtype, given.tokens)
            gc.collect()
    if given.only != "decode":
        prefill(given.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
