"""Register every method, policy, summary and selector in one table, and find their classes by name.

A method is a way to cache tokens. Some methods are composed of a policy (chooses the tokens to evict), a summary (keeps
a compressed form of evicted tokens) and a selector (chooses the held tokens that a query reads). In this file a part is
any of the four. The choices of the command line, the docs' tables and the tests that run for every method all follow
from `TABLE`. A part may also be given as `module:Class`, which is imported, so that third parties can add parts.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass, is_dataclass

from kvfloor.core.exact import Exact
from kvfloor.core.method import Method
from kvfloor.core.policy import Policy
from kvfloor.core.selector import Everything, Selector
from kvfloor.core.summary import Drop, Summary
from kvfloor.methods.compaction.compact import Compact
from kvfloor.methods.policies.expected import Expected
from kvfloor.methods.policies.farthest_key import FarthestKey
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.key_difference import KeyDifference
from kvfloor.methods.policies.key_norm import KeyNorm
from kvfloor.methods.policies.last_query import LastQuery
from kvfloor.methods.policies.leverage import RidgeLeverage
from kvfloor.methods.policies.milestones import Milestones
from kvfloor.methods.policies.observation import Observation
from kvfloor.methods.policies.random import Random
from kvfloor.methods.policies.sinks import Sinks
from kvfloor.methods.policies.window import Window
from kvfloor.methods.selectors.best_first import BestFirst
from kvfloor.methods.selectors.hierarchical import Hierarchical
from kvfloor.methods.selectors.pages import Pages
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.selectors.zcurve import ZCurve
from kvfloor.methods.sketches.balance import Balance
from kvfloor.methods.sketches.quantized import Quantized
from kvfloor.methods.sketches.subgen import SubGen
from kvfloor.methods.sketches.window_sample import WindowSample
from kvfloor.methods.summaries.clusters import ClusterMeans
from kvfloor.methods.summaries.low_rank import Less
from kvfloor.methods.summaries.moments import Moments
from kvfloor.methods.summaries.nystrom import Nystrom
from kvfloor.methods.summaries.taylor import Taylor
from kvfloor.methods.summaries.value_sample import ValueSample
from kvfloor.methods.summaries.value_sum import ValueSum
from kvfloor.methods.tiered.tiered import Tiered


@dataclass(frozen=True)
class Shorthand:
    """Hold the text of a policy and its summary that a name of its own stands for, and the paper that it is after."""

    text: str
    paper: str


KINDS: dict[str, type] = {"method": Method, "policy": Policy, "summary": Summary, "selector": Selector}

TABLE: dict[str, type] = {
    part.name: part
    for part in (
        Exact,
        Tiered,
        Window,
        Sinks,
        Random,
        HeavyHitters,
        LastQuery,
        Observation,
        Milestones,
        KeyNorm,
        KeyDifference,
        RidgeLeverage,
        Expected,
        FarthestKey,
        Drop,
        ValueSum,
        ValueSample,
        ClusterMeans,
        Less,
        Moments,
        Nystrom,
        Taylor,
        Everything,
        TopK,
        Pages,
        BestFirst,
        Hierarchical,
        ZCurve,
        Quantized,
        SubGen,
        Balance,
        WindowSample,
        Compact,
    )
}

ALIASES: dict[str, str] = {
    "recency": "window",
    "streaming_llm": "sinks",
    "heavy_hitters": "h2o",
    "last_query": "tova",
    "observation": "snapkv",
    "milestones": "raas",
    "key_norm": "knorm",
    "key_difference": "keydiff",
    "leverage": "ridge_leverage",
    "expected_attention": "expected",
    "farthest_key": "k_center",
    "unmasked": "value_sum",
    "algorithm_1": "window_sample",
    "low_rank": "less",
    "momentkv": "moments",
    "one_pass": "taylor",
    "quest": "pages",
    "hierarchical": "hip",
    "zcurve": "zeta",
    "clustergen": "subgen_sketch",
    "balance_kv": "balance",
    "kivi": "quant",
    "attention_matching": "compact",
}

SHORTHANDS: dict[str, Shorthand] = {
    "subgen": Shorthand("sinks+clusters(m=64)", "after Zandieh et al. 2024, SubGen (arXiv 2402.06082)"),
}

# Left out of the table because no model's cache can use them: methods of another attention law, and the method that
# attains a barrier's floor.
VARIANTS: dict[str, str] = {
    "tensor": "kvfloor.methods.variants.tensor:TensorAttention",
    "subgen_tensor": "kvfloor.methods.variants.subgen_tensor:SubGenTensor",
    "public_bits": "kvfloor.game.engine.public_bits:PublicBits",
}

# Left out of the table because it is no method of one layer: it chooses one for each layer of a model.
CHOOSERS: dict[str, str] = {"auto": "kvfloor.methods.mixed.auto:Auto"}


def kind(part: type) -> str:
    """Return the kind of a part's class: "method", "policy", "summary" or "selector".

    Raises ValueError for any other class.
    """
    for name, base in KINDS.items():
        if issubclass(part, base):
            return name
    raise ValueError(f"{part.__module__}:{part.__qualname__} is no Method, Policy, Summary or Selector")


def lookup(name: str, kinds: tuple[str, ...] = tuple(KINDS)) -> type:
    """Return the class that `name` stands for: a registered name, an alias, or `module:Class`, which is imported.

    kinds   the allowed kinds: some of "method", "policy", "summary", "selector"
    Raises ValueError if the name is unknown (the error lists the known names), if the class cannot be imported, is of
    another kind, or is no dataclass.
    """
    imported = VARIANTS | CHOOSERS
    if ":" in name or name in imported:
        part = _imported(imported.get(name, name))
    else:
        found = TABLE.get(ALIASES.get(name, name))
        if found is None:
            names = sorted(n for n, p in TABLE.items() if kind(p) in kinds)
            near = difflib.get_close_matches(name, [*TABLE, *ALIASES, *SHORTHANDS], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {' or '.join(kinds)} {name!r}; there are {', '.join(names)}{hint}")
        part = found
    if kind(part) not in kinds:
        raise ValueError(f"{name} is a {kind(part)}; a {' or '.join(kinds)} is needed here")
    if not is_dataclass(part):
        raise ValueError(f"{name} must be a frozen dataclass, whose fields are its arguments")
    return part


def _imported(name: str) -> type:
    module, _, attribute = name.partition(":")
    try:
        part = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as cause:
        raise ValueError(f"{name} cannot be imported: {cause}") from None
    except Exception as cause:  # whatever the user's own module raises
        raise ValueError(f"{name} cannot be imported: {type(cause).__name__}: {cause}") from cause
    if not isinstance(part, type):
        raise ValueError(f"{name} is a {type(part).__name__}; give a class")
    return part
