"""List the presses of kvpress 0.5.5, each beside kvfloor's method of the same rule, or with why there is none.

A press is kvpress's word for an eviction rule. It compresses once, at the end of the prompt. kvfloor's methods do
likewise with `prefill=dense` and a block longer than the continuation, so that nothing is evicted after the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ONCE = "block=512,prefill=dense"
_EXPECTED = f"expected(heads=each,epsilon=0.0,recent=0,{ONCE})"
_TOVA = f"tova(sinks=0,recent=1,{ONCE})"
_LEVERAGE = "ridge_leverage(ridge=1e-05,centre=True,keys=unrotated,sinks=0,recent=0,block=512,prefill=dense)"


@dataclass(frozen=True)
class Pair:
    """Name a press with its arguments, and kvfloor's method without its budget.

    rule      "same": both keep the same tokens; "random": both draw them from the same distribution; "other": the rules
              differ, as `note` says, and the figures show by how much
    inner     the press that `press` wraps, if it is a wrapper
    eager     True if the press reads the attention matrix, which only eager attention returns
    ranks     True if kept keys are rotated anew, to their ranks among the kept tokens
    variant   name of kvpress's variant of the method's law (`variants.py`), if kvfloor's cache is to run that instead
    stepwise  True if the continuation is fed token by token: the press compresses while decoding, or its layers keep
              different numbers of tokens
    """

    press: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    rule: Literal["same", "random", "other"] = "same"
    note: str = ""
    inner: str = ""
    eager: bool = False
    ranks: bool = False
    variant: str = ""
    stepwise: bool = False

    @property
    def ours(self) -> str:
        """Return kvfloor's method as the table shows it, with the variant of its law or the cache's argument."""
        added = f" as {self.variant}" if self.variant else ' with positions="cache"' if self.ranks else ""
        return self.method + added

    @property
    def runs(self) -> bool:
        """Return True if the pair draws at random, so that several runs are compared."""
        return self.rule == "random" or "seed" in self.arguments

    @property
    def title(self) -> str:
        """Return the press with its arguments as kvpress writes them, without the compression ratio."""
        arguments = [f"{self.inner}()"] if self.inner else []
        return (
            f"{self.press}({', '.join([*arguments, *(f'{name}={value}' for name, value in self.arguments.items())])})"
        )


PAIRS = (
    Pair("KnormPress", {}, f"knorm(sinks=0,recent=0,{ONCE})"),
    Pair("KeyDiffPress", {}, f"keydiff(sinks=0,recent=0,{ONCE})"),
    Pair("StreamingLLMPress", {"n_sink": 4}, f"sinks(4,{ONCE})"),
    Pair("KeyRerotationPress", {}, f"sinks(4,{ONCE})", inner="StreamingLLMPress", ranks=True),
    Pair("SnapKVPress", {"window_size": 64, "kernel_size": 5}, "snapkv(window=64,kernel=5,pool=avg)"),
    Pair("SnapKVPress", {"window_size": 1, "kernel_size": 1}, _TOVA),
    Pair("ObservedAttentionPress", {}, f"h2o(score=mean,recent=0,sinks=0,{ONCE})", eager=True),
    Pair("ExpectedAttentionPress", {"n_sink": 0}, f"expected(heads=each,epsilon=0.0,sinks=0,recent=0,{ONCE})"),
    Pair(
        "ExpectedAttentionPress",
        {"n_sink": 4},
        _EXPECTED,
        "other",
        "kvpress takes shares of the attention to all tokens but the 4 sinks, kvfloor of that to all tokens, as the "
        "paper writes. So a query head that expects to look at the sinks has less weight here in its group's mean",
    ),
    Pair(
        "TOVAPress",
        {},
        _TOVA,
        "other",
        "kvpress averages over all query heads of a layer, as the authors' code does, and keeps the same tokens in all "
        "its kv heads; kvfloor averages over each kv head's own group. kvpress's `SnapKVPress(1, 1)` does so too",
    ),
    Pair("ExpectedAttentionPress", {"n_sink": 4}, _EXPECTED, variant="SharesWithoutSinks"),
    Pair("TOVAPress", {}, _TOVA, variant="MeanOverLayer"),
    Pair("RandomPress", {}, f"random({ONCE})", "random"),
    Pair(
        "RandomPress",
        {"seed": "run"},
        f"random({ONCE})",
        "other",
        "with a seed, kvpress restarts its generator in every layer, so that all layers keep the same tokens, and what "
        "one loses all lose; without a seed the layers draw independently, as here",
    ),
    Pair("LeverageScorePress", {}, _LEVERAGE, "random"),
)

STEPWISE = (
    Pair(
        "PrefillDecodingPress",
        {"interval": 16},
        "knorm(sinks=0,recent=0,block=16,prefill=dense)",
        inner="KnormPress",
        stepwise=True,
    ),
    Pair("PyramidKVPress", {"beta": 2}, "snapkv(window=64,kernel=5,pool=avg)", stepwise=True),
)  # fmt: skip

WITHOUT = {
    "AdaKVPress": "chooses the budgets of a layer's kv heads from the scores; here budgets are given (`budgets=`)",
    "BlockPress": "scores block by block over keys of a prompt that was attended to in full",
    "CAMPress": "merges evicted values while decoding, by the attention they received",
    "CURPress": "scores by the lengths of keys and values, each over the sum of its local window",
    "CapPress": "scores by the leverage of values, weighted by expected attention",
    "ChunkKVPress": "keeps or evicts whole chunks of the prompt",
    "ChunkPress": "gives each chunk of the prompt a budget of its own",
    "CompactorPress": "blends leverage with attention that is not causal; its leverage alone is a pair",
    "CompressionRatioDecodingPress": "keeps a share of all tokens seen, so memory grows with the answer",
    "CriticalAdaKVPress": "works as AdaKVPress, rescaled as in CriticalKVPress",
    "CriticalKVPress": "rescales scores by values after the output projection, which a cache does not see",
    "ComposedPress": "applies presses one after the other",
    "DMSPress": "evicts by a threshold instead of a budget",
    "DecodingPress": "compresses while decoding only; within PrefillDecodingPress it is a pair",
    "DuoAttentionPress": "needs patterns of heads from a hub",
    "EntropyGatedChunkKVPress": "keeps or evicts whole chunks of the prompt",
    "ExpectedAttentionStatsPress": "needs statistics of queries from a hub",
    "FastKVzipPress": "needs trained gates from a hub",
    "FinchPress": "needs a delimiter between context and question",
    "KVComposePress": "builds composite tokens from different tokens of each head",
    "KVgradPress": "needs gradients of a replayed context",
    "KVzapPress": "needs a trained model from a hub",
    "KVzipPress": "replays the context to score it",
    "LUKVPress": "needs budget curves made per model",
    "LagKVPress": "scores by the spread of the next partition of the prompt",
    "MergingPress": "folds evicted values into the kept token of the most similar key",
    "NonCausalAttnPress": "scores by attention within chunks that is not causal",
    "PerLayerCompressionPress": "runs with flash attention only; the same is `budgets=` here",
    "QFilterPress": "needs filters from a hub",
    "RestoreKVPress": "needs trained tokens from a hub",
    "SimLayerKVPress": "compresses lazy layers only, found by a threshold",
    "ThinKPress": "drops channels of keys instead of tokens",
}
"""Presses without a counterpart, and why."""
