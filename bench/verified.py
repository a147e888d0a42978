"""Time verified decoding beside decoding from the exact cache, on SmolLM2 in float32: `python bench/verified.py`

Both take turns in one process. Figures are medians of ratios, not seconds. Prints no figures while the tests of the
timed code fail.
--text   contexts of the shipped texts, taken in once: greedy decoding goes on from there with each cache of its own
--drawn  contexts of normal keys and values, without a forward. One exact step, one drafted token and one verification
         are timed, which depend on lengths alone. The gain follows for every share of accepted drafts: a verification
         gives (1 - a^(k + 1)) / (1 - a) tokens if each of k drafts is accepted with probability a, independently
SmolLM2 was trained on 8,192 tokens. Its text beyond that is nonsense, and whether drafts of it are accepted says little
about a model that was trained for such lengths.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from gate import green
from timing import interleaved
from transformers import PreTrainedModel

from kvfloor.audit.texts import SHIPPED, excerpts
from kvfloor.core.exact import Exact
from kvfloor.hf import CompressedCache, VerifiedCache, VerifiedReport, generate_verified, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.verified.both import ExactAndBounded
from kvfloor.models import load

TIMED = ["tests/hf/test_verified.py", "tests/hf/test_verified_parts.py"]
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def exact_beside(model: PreTrainedModel, cache: VerifiedCache) -> CompressedCache:
    """Return an exact cache of the tokens that `cache`, of one batch item, holds; both share one copy of them."""
    made = CompressedCache(model, "exact")
    for layer, source in zip(made.compressed, cache.verified_layers, strict=True):
        assert isinstance(source.tokens, ExactAndBounded)
        state = source.tokens.exact
        state.seal()
        layer.resume(state, {"seen": len(cache.tokens[0]), "batch": 1, "is_initialized": True}, model)
    return made


def drawn(model: PreTrainedModel, method: str, n: int) -> VerifiedCache:
    """Return a cache with n normal tokens in every layer."""
    cache, source, config = VerifiedCache(model, method, context=n), torch.Generator().manual_seed(0), model.config
    d, kv_heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    g = config.num_attention_heads // kv_heads
    for index, layer in enumerate(cache.verified_layers):
        k, v = (torch.randn(1, kv_heads, n, d, generator=source) for _ in range(2))
        law = (index, index, k, d, g, d**-0.5, None)
        exact, bounded = Exact().open(layer.opening.open(*law).spec), layer.opening.open(*law)
        for state in (exact, bounded):
            state.append(k[0], v[0])
        bounded.seal()
        layer.tokens, layer.batch = ExactAndBounded(exact, bounded), 1
    cache.tokens = [[7] * n]
    return cache


def parts(model: PreTrainedModel, cache: VerifiedCache, drafts: list[int], repeats: int) -> tuple[float, list[float]]:
    """Return the times of a drafted token, and of verifying each number of drafts, over that of one exact step."""
    exact = exact_beside(model, cache)
    one = torch.full((1, 1), 7)

    def step() -> None:
        model(one, past_key_values=exact, use_cache=True)

    def drafted() -> None:
        cache.drop()
        cache.draft(model, one, 0)

    def verified(draft: int) -> Callable[[], object]:
        return lambda: cache.verify(model, one.expand(1, draft + 1))

    with torch.inference_mode():
        timed = {"exact": step, "draft": drafted} | {str(draft): verified(draft) for draft in drafts}
        steps = interleaved(timed, repeats)
    cache.drop()
    return steps["draft"] / steps["exact"], [steps[str(draft)] / steps["exact"] for draft in drafts]


def gain(accepted: float, draft: int, drafted: float, verified: float) -> float:
    """Return tokens per exact step's time, from the times of `parts`, if a draft is accepted with this probability."""
    return sum(accepted**i for i in range(draft + 1)) / (draft * drafted + verified)


def show_parts(n: int, cache: VerifiedCache, drafts: list[int], drafted: float, verified: list[float]) -> None:
    hot, cold = cache.hot_bytes / 2**20, cache.cold_bytes / 2**20
    print(f"\n{n:,} tokens: hot {hot:,.0f} MiB, cold {cold:,.0f} MiB; a draft takes {drafted:.2f} of an exact step")
    for draft, took in zip(drafts, verified, strict=True):
        gains = ", ".join(f"{share:.0%}: {gain(share, draft, drafted, took):.2f}x" for share in SHARES)
        print(f"  {draft} drafts: a verification {took:.2f}; {gains}", flush=True)


def from_text(model: PreTrainedModel, ids: list[int], method: str, draft: int, tokens: int, turns: int) -> None:
    """Print the figures of one context, the token ids `ids`."""
    cache = VerifiedCache(model, method, context=len(ids))
    told = generate_verified(model, torch.tensor([ids]), cache, draft=draft, max_new_tokens=1, eos_token_id=())
    assert isinstance(told, torch.Tensor)
    beside = exact_beside(model, cache)
    for layer in beside.compressed:  # each goes on with its own
        assert layer.state is not None
        layer.state = layer.state.clone()
    exact = Dialogue(model, beside, torch.ones(1, len(ids), dtype=torch.int64))
    exact.feed([told[0, -1:].tolist()])
    ratios: list[float] = []
    reports: list[VerifiedReport] = []
    for turn in range(turns + 1):  # the first is not counted
        begin = time.perf_counter()
        exact.answer(tokens, None)
        middle = time.perf_counter()
        given = {"draft": draft, "max_new_tokens": tokens, "eos_token_id": ()}
        told, report = generate_verified(model, told, cache, return_report=True, **given)
        if turn:
            ratios.append((middle - begin) / (time.perf_counter() - middle))
            assert isinstance(report, VerifiedReport)
            reports.append(report)
    made, rounds = (sum(sum(getattr(one, name)) for one in reports) for name in ("tokens", "rounds"))
    print(f"\n{len(ids):,} tokens of text, {draft} drafts: {statistics.median(ratios):.2f}x exact", end="")
    print(
        f" ({min(ratios):.2f} to {max(ratios):.2f}), {(made - turns) / rounds:.2f} tokens per verification", flush=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--text", default="4096,8192", help="tokens, with commas")
    parser.add_argument("--drawn", default="4096,8192,16384,32768", help="tokens, with commas")
    parser.add_argument("--method", default="snapkv@1024")
    parser.add_argument("--draft", default="2,4,8", help="drafts per verification, with commas")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    if not green(*TIMED):
        return 1
    torch.set_num_threads(given.threads)
    model, tokenizer = load("smollm2")
    prepare(model)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.method}")
    drafts = [int(text) for text in given.draft.split(",")]
    for n in map(int, filter(None, given.drawn.split(","))):
        cache = drawn(model, given.method, n)
        show_parts(n, cache, drafts, *parts(model, cache, drafts, 2 * given.turns))
        del cache
    contexts = [int(text) for text in filter(None, given.text.split(","))]
    each = -(-max(contexts, default=0) // len(SHIPPED))
    texts = excerpts(SHIPPED, [each], 0, lambda text: tokenizer(text).input_ids) if contexts else []
    ids = [token for text in texts for token in text.context]
    for n, draft in itertools.product(contexts, drafts):
        from_text(model, ids[:n], given.method, draft, given.tokens, given.turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
