"""State the speed targets, and judge rows of a benchmark by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from kvfloor.bench.records import BenchRow

Judged = Literal["ratio", "ms", "slope", "tail", "peak"]


@dataclass(frozen=True)
class SpeedTarget:
    """Hold one bound on one field of a row.

    target  the target's number, such as "T1"
    words   what is asked, as a sentence without its full stop
    judged  the field of the row that is bounded
    least   True if the field must be at least the bound, False for at most; a slope's interval must hold the bound
    bound   the bound
    """

    target: str
    words: str
    judged: Judged
    least: bool
    bound: float

    @property
    def text(self) -> str:
        """Return the bound as text, such as ">= 0.6"."""
        if self.judged == "slope":
            return f"interval holds {self.bound:g}"
        bound = f"{self.bound:,.0f}" if self.bound >= 1000 else f"{self.bound:.4g}"
        return f"{'>=' if self.least else '<='} {bound}"


def _ratio(target: str, bound: float, words: str) -> SpeedTarget:
    return SpeedTarget(target, words, "ratio", True, bound)


TARGETS: Mapping[str, SpeedTarget] = {
    "share float32": _ratio("T1", 0.60, "A weighted read of a large state, float32: share of a plain read's speed"),
    "share bfloat16": _ratio("T1", 0.38, "A weighted read of a large state, bfloat16: share of a plain read's speed"),
    "stock 4096": _ratio("T2", 1.2, "A weighted read of 4,096 tokens: times as fast as stock attention"),
    "stock 32768": _ratio("T2", 2.0, "A weighted read of 32,768 tokens: times as fast as stock attention"),
    "weights": _ratio("T2", 1 / 1.25, "Different weights above and below: at most 1.25 times plain folded attention"),
    "exact float32": _ratio("T3", 3.0, "A token with `exact` at 32,000 tokens, float32: times as fast as stock"),
    "exact bfloat16": _ratio("T3", 1.6, "A token with `exact` at 32,000 tokens, bfloat16: times as fast as stock"),
    "budget stock": _ratio("T4", 9.0, "A token with a budget of 512 at 32,000 tokens: times as fast as stock"),
    "budget exact": _ratio("T4", 2.5, "A token with a budget of 512 at 32,000 tokens: times as fast as `exact`"),
    "budget short": _ratio("T4", 1 / 1.05, "A token with a budget of 512: at most 1.05 of stock's at 128 tokens"),
    "append slope": SpeedTarget("T5", "A token's cost does not grow with the tokens before it", "slope", True, 0.0),
    "append tail": SpeedTarget("T5", "The 99.99th percentile of a token's cost over its median", "tail", False, 10.0),
    "streamed": _ratio("T6", 3.0, "A prompt of 32,768 tokens streamed under 1,024: times as fast as causal sdpa"),
    "peak": SpeedTarget("T6", "The most bytes of a streamed prompt over those of its end", "peak", False, 1.125),
    "dense": _ratio("T6", 1.0, "A dense prompt of 32,768 tokens: never slower than causal sdpa"),
    "subgen": SpeedTarget("T7", "A token into 1,024 clusters in 32 rows: milliseconds", "ms", False, 0.15),
    "audit": SpeedTarget("T9", "The default audit of the built-in model: milliseconds", "ms", False, 180_000.0),
    "import": SpeedTarget("T9", "`import kvfloor` beyond `import torch`: milliseconds", "ms", False, 300.0),
    "help": SpeedTarget("T9", "`kvfloor --help`: milliseconds", "ms", False, 500.0),
    "kvpress prefill": _ratio("T10", 1.0, "A prompt with its compression: never slower than kvpress"),
    "kvpress token": _ratio("T10", 1.0, "A token after compression: never slower than kvpress"),
    "coded short": _ratio("T11", 1.0, "A token with 4 bits at 1k to 8k: never slower than `exact`"),
    "coded long": _ratio("T11", 1.5, "A token with 4 bits at 32,000 tokens: times as fast as `exact` in bfloat16"),
    "small 1024": _ratio("T12", 1.0, "SmolLM2 with `exact` at 1,024 tokens: no slower than stock"),
    "small 4096": _ratio("T12", 1.25, "SmolLM2 with `exact` at 4,096 tokens: at most 0.80 of stock's time"),
    "small budget": _ratio(
        "T12", 1 / 0.6, "SmolLM2 with a budget of 512 at 4,096 tokens: at most 0.60 of stock's time"
    ),
}
"""Map a short key, which parts name, to its target."""

ELSEWHERE = {
    "T8": "certified reads: `python bench/certified_read.py`",
    "T13": "inside vLLM: `make serve-bench`",
    "G1": "kernels on a GPU: `python bench/gpu.py`",
}
"""Map the other targets to what measures them."""


def judged(row: BenchRow, key: str | None) -> BenchRow:
    """Return the row with the target of this key, and whether its figure keeps the bound.

    The figure itself decides, whatever its interval; a slope is kept if its interval holds the bound. Returns the row
    itself if `key` is None.
    """
    if key is None:
        return row
    target = TARGETS[key]
    figure = getattr(row, target.judged)
    if figure is None:
        met = None
    elif target.judged == "slope":
        assert row.slope_interval is not None
        met = row.slope_interval[0] <= target.bound <= row.slope_interval[1]
    else:
        met = figure >= target.bound if target.least else figure <= target.bound
    return replace(row, target=target.target, asked=target.words, judged=target.judged, bound=target.text, met=met)
