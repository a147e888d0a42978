"""Register every method in one table and parse the text that names a method.

    METHOD  =  policy(args) + summary(args) | selector(args) @ budget
            |  method(args) | selector(args) @ budget

CLI choices, the docs' tables, the conformance matrix and the report all follow from `TABLE`. A part may also be
written `module:Class`, which is imported: third parties add their own parts this way.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
from dataclasses import fields, is_dataclass
from typing import Any, cast

from kvfloor.core.bounded import Bounded
from kvfloor.core.budget import parse_budget
from kvfloor.core.exact import Exact
from kvfloor.core.method import Method
from kvfloor.core.policy import Policy
from kvfloor.core.selector import Everything, Selector
from kvfloor.core.summary import Drop, Summary
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
from kvfloor.methods.summaries.low_rank import Less
from kvfloor.methods.summaries.moments import Moments
from kvfloor.methods.summaries.taylor import Taylor
from kvfloor.methods.summaries.value_sample import ValueSample
from kvfloor.methods.summaries.value_sum import ValueSum
from kvfloor.splitting import split_once

KINDS: dict[str, type] = {"method": Method, "policy": Policy, "summary": Summary, "selector": Selector}

TABLE: dict[str, type] = {
    part.name: part
    for part in (
        Exact,
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
        Less,
        Moments,
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
    "clustergen": "subgen",
    "balance_kv": "balance",
    "kivi": "quant",
}

# Left out of the table because no model's cache can use them: methods of another attention law, and the method that
# attains a barrier's floor.
VARIANTS: dict[str, str] = {
    "tensor": "kvfloor.methods.variants.tensor:TensorAttention",
    "subgen_tensor": "kvfloor.methods.variants.subgen_tensor:SubGenTensor",
    "public_bits": "kvfloor.game.engine.public_bits:PublicBits",
}

_OPTIONS = ("block", "prefill")  # of Bounded, written among the policy's arguments


def kind(part: type) -> str:
    """Return the kind of a part: "method", "policy", "summary" or "selector"."""
    for name, base in KINDS.items():
        if issubclass(part, base):
            return name
    raise ValueError(f"{part.__module__}:{part.__qualname__} is no Method, Policy, Summary or Selector")


def parse(text: str) -> Method:
    """Return the method that the text describes.

    `str(method)` parses back to an equal method. Raises ValueError naming the part that is unknown, malformed or out
    of place, and the parts that are allowed.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a method is text such as 'h2o(recent=64)@512', got {text!r}")
    body, at, budget_text = split_once(text.strip(), "@")
    body, bar, selector_text = split_once(body, "|")
    body, plus, summary_text = split_once(body, "+")
    options: dict[str, Any] = {}
    head = _build(body, ("policy", "method"), text, options)
    selector = _build(selector_text, ("selector",), text) if bar else None
    summary = _build(summary_text, ("summary",), text) if plus else None
    if isinstance(head, Policy):
        method: Method = Bounded(head, summary or Drop(), selector or Everything(), **options)
    else:
        method = _whole(head, summary, selector, options, text)
    if not at:
        return method
    parts = budget_text.split(":")
    budget = parse_budget(parts[0]) if len(parts) == 1 else tuple(_whole_number(p, text) for p in parts)
    bounded = method.with_budget(budget)
    if bounded is None:
        raise ValueError(f"{method} keeps every token, so '@{budget_text}' cannot bound it: leave the budget out")
    return bounded


def _whole(head: Method, summary: Any, selector: Any, options: dict[str, Any], text: str) -> Method:
    if summary is not None:
        raise ValueError(f"in {text!r}: {head} is a whole method; '+' adds a summary to an eviction policy only")
    if options:
        raise ValueError(f"in {text!r}: {', '.join(options)} are options of eviction policies, not of {head}")
    if selector is None:
        return head
    if not isinstance(head, Exact):
        raise ValueError(f"in {text!r}: '|' needs exact or an eviction policy before it, not {head}")
    return Exact(selector)


def _whole_number(text: str, whole: str) -> int:
    budget = parse_budget(text) if re.fullmatch(r"[0-9]*[1-9][0-9]*", text) else None
    if not isinstance(budget, int):
        raise ValueError(f"in {whole!r}: budgets per row are whole numbers >= 1 joined by ':', got {text!r}")
    return budget


def _build(text: str, kinds: tuple[str, ...], whole: str, options: dict[str, Any] | None = None) -> Any:
    match = re.fullmatch(r"([\w.:-]+)\s*(?:\((.*)\))?", text, re.DOTALL)
    if match is None:
        raise ValueError(f"in {whole!r}: {text!r} is not name or name(arg=value, ...)")
    name, arguments = match[1], match[2] or ""
    part: Any = lookup(name, kinds)
    positional, named = _arguments(arguments, text)
    if options is not None and issubclass(part, Policy):
        options.update({key: named.pop(key) for key in _OPTIONS if key in named})
    own = [f for f in fields(cast(Any, part)) if f.init and f.name not in ("selector", "budget")]
    allowed = [f.name for f in own]
    unknown = [key for key in named if key not in allowed]
    if unknown or len(positional) > len(allowed):
        takes = ", ".join(allowed + (list(_OPTIONS) if issubclass(part, Policy) else [])) or "no arguments"
        raise ValueError(f"{name} does not take {', '.join(unknown) or f'{len(positional)} values'}; it takes {takes}")
    takes_methods = {f.name for f in own if "Method" in str(f.type)}
    given = dict(zip(allowed, positional, strict=False)) | named
    if any(isinstance(value, _Nested) and name not in takes_methods for name, value in given.items()):
        raise ValueError(_malformed(text))
    try:
        return part(*positional, **named)
    except TypeError as cause:
        raise ValueError(f"in {text!r}: {cause}") from None


class _Nested(str):
    """Mark an argument that is the text of a method, as opposed to a literal or a word."""


def _malformed(text: str) -> str:
    return f"in {text!r}: the arguments must be numbers or words, each once, as in recent=64, score=mean"


def _arguments(text: str, whole: str) -> tuple[list[Any], dict[str, Any]]:
    if not text.strip():
        return [], {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):  # a parenthesis closed early
            raise ValueError("not one list of arguments")
        named = {k.arg or "**": _value(k.value) for k in call.keywords}
        if len(named) != len(call.keywords):
            raise ValueError("an argument is given twice")
        return [_value(a) for a in call.args], named
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(_malformed(whole)) from None


def _value(node: ast.expr) -> Any:
    """Return the value of a literal; a bare word (score=mean) or a method (store=sinks(4)@32) as a string."""
    if isinstance(node, ast.Name) and node.id not in ("True", "False", "None"):
        return node.id
    if isinstance(node, (ast.Call, ast.BinOp)):
        return _Nested(ast.unparse(node))
    return ast.literal_eval(node)


def lookup(name: str, kinds: tuple[str, ...] = tuple(KINDS)) -> type:
    """Return the class of a name, an alias or `module:Class`.

    Raises ValueError listing the known names where the name is unknown, the class is of another kind or is no
    dataclass.
    """
    if ":" in name or name in VARIANTS:
        part = _imported(VARIANTS.get(name, name))
    else:
        found = TABLE.get(ALIASES.get(name, name))
        if found is None:
            names = sorted(n for n, p in TABLE.items() if kind(p) in kinds)
            near = difflib.get_close_matches(name, [*TABLE, *ALIASES], 1)
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


def default_method(name: str, budget: int = 64) -> Method:
    """Return a runnable method that contains one entry of the table.

    Tests, docs and the conformance matrix iterate over these methods.
    """
    part = lookup(name)
    texts = {"policy": "{0}@{1}", "summary": "window+{0}@{1}", "selector": "exact|{0}", "method": "{0}"}
    return parse(texts[kind(part)].format(name, budget))
