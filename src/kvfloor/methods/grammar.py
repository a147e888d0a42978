"""Parse the text that names a method, which `str(method)` writes.

METHOD  =  policy(args) + summary(args) | selector(args) : store(args) @ budget
    or     method(args) | selector(args) : store(args) @ budget
    or     layers(METHOD, N*METHOD, ...)

A name of `SHORTHANDS` in `registry.py`, such as subgen, stands for a policy and its summary.
The characters + | : @ are part of the text. (args), + summary, | selector, : store and @ budget may each be left out.
The store may also follow the budget, as in h2o@512:k4v4. The budget
is the number of tokens that a row, i.e. one (batch item, kv head) stream, may hold; it may also be a share of the
context (25%) or a number of bytes (64MiB).
A policy chooses the tokens to evict, a summary keeps a compressed form of evicted tokens, a selector chooses the held
tokens that a query reads. A method of the second form, such as `exact` (keeps every token), takes neither policy nor
summary. The third form has one method for each layer of a model, N*METHOD for N adjacent layers. The table of names is
`TABLE` in `registry.py`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from typing import Any, cast

from kvfloor.core.bounded import Bounded
from kvfloor.core.budget import parse_budget
from kvfloor.core.exact import Exact
from kvfloor.core.method import Method
from kvfloor.core.policy import Policy
from kvfloor.core.selector import Everything
from kvfloor.core.store import Full
from kvfloor.core.summary import Drop
from kvfloor.methods.mixed.layered import Layered
from kvfloor.methods.registry import SHORTHANDS, kind, lookup
from kvfloor.methods.stores.coded import Coded
from kvfloor.methods.stores.kivi import Kivi
from kvfloor.splitting import outline, shortened, split_list, split_once

_LAYERS = r"layers\s*\("
_OPTIONS = ("block", "prefill")  # of Bounded, written among the policy's arguments


def parse(text: str) -> Method:
    """Return the method that a text such as "h2o(recent=64)+value_sum@512" describes.

    In this example, h2o is a policy, value_sum a summary, and 512 the budget in tokens per kv head.
    `str(method)` parses back to an equal method. Raises ValueError naming the part of the text that is unknown,
    malformed or not allowed at its place, and what is allowed there.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a method is text such as 'h2o(recent=64)@512', got {text!r}")
    if re.match(_LAYERS, text.strip()):
        return _layered(text.strip())
    body, at, budget_text = split_once(text.strip(), "@")
    body, store_text = without_store(body)
    if at and store_text is None:
        budget_text, store_text = without_store(budget_text)
    body, bar, selector_text = split_once(body, "|")
    body, plus, summary_text = split_once(_written_out(body, text), "+")
    options: dict[str, Any] = {}
    head = _build(body, ("policy", "method"), text, options)
    selector = _build(selector_text, ("selector",), text) if bar else None
    summary = _build(summary_text, ("summary",), text) if plus else None
    if isinstance(head, Policy):
        method: Method = Bounded(head, summary or Drop(), selector or Everything(), **options)
    else:
        method = _whole(head, summary, selector, options, text)
    if store_text is not None:
        method = _stored(method, store_text, text)
    if not at:
        return method
    parts = budget_text.split(":")
    budget = parse_budget(parts[0]) if len(parts) == 1 else tuple(_whole_number(p, text) for p in parts)
    bounded = method.with_budget(budget)
    if bounded is None:
        raise ValueError(f"{method} keeps every token, so '@{budget_text}' cannot bound it: leave the budget out")
    return bounded


def _layered(text: str) -> Layered:
    """Return the method of a text such as "layers(2*exact:k5v4,snapkv@25%)", with one method per layer."""
    if re.fullmatch(r"[^(]*\(_*\)", outline(text)) is None:
        raise ValueError(f"in {shortened(text)}: nothing follows layers(...); each layer's method has its own budget")
    methods: list[Method] = []
    for part in split_list(text[text.index("(") + 1 : -1]):
        found = re.fullmatch(r"(?:([0-9]{1,4})\s*\*)?(.*)", part, re.DOTALL)
        assert found is not None
        count = 1 if found[1] is None else int(found[1])
        if not count or re.match(_LAYERS, found[2]):
            raise ValueError(f"in {shortened(text)}: {shortened(part)} is no method of layers: write N*METHOD, N >= 1")
        methods += [parse(found[2])] * count
    return Layered(tuple(methods))


def without_store(text: str) -> tuple[str, str | None]:
    """Split "h2o:k4v4" into "h2o" and "k4v4", the text of a store; return (text, None) if no store ends it."""
    found = re.search(r":\s*(?:full|kivi[0-9]+|k[0-9]+v[0-9]+)\s*(?:\([^()]*\))?$", outline(text))
    if found is None:
        return text, None
    return text[: found.start()].strip(), text[found.start() + 1 :].strip()


def _written_out(body: str, whole: str) -> str:
    """Return "sinks+clusters(m=64)" for "subgen", and likewise for other shorthands; any other text as it is."""
    name = (re.match(r"[\w.:-]*", body) or [""])[0]
    shorthand = SHORTHANDS.get(name)
    if shorthand is None:
        return body
    if body != name:
        raise ValueError(
            f"in {shortened(whole)}: {name} stands for {shorthand.text!r} and takes nothing more: write that instead"
        )
    return shorthand.text


def _stored(method: Method, store_text: str, whole: str) -> Method:
    """Return `method` with the store that `store_text` names, such as "k4v4(first=0)"."""
    name, _, arguments = store_text.partition("(")
    name = name.strip()
    positional, named = _arguments(arguments.removesuffix(")"), store_text)
    kind = Kivi if name.startswith(Kivi.name) else Coded
    takes = {"full": set[str](), "kivi": {"group", "first"}}.get(name.rstrip("0123456789"), {"first", "recent"})
    if positional or set(named) - takes:
        raise ValueError(
            f"in {whole!r}: a store such as k4v4 takes first=N and recent=N, one such as kivi4 group=N and first=N, "
            f"full takes nothing, got {arguments!r}"
        )
    try:
        store = Full() if name == "full" else kind.parsed(name, **named)
        stored = None if store is None else method.with_store(store)
    except (TypeError, ValueError) as cause:
        raise ValueError(f"in {whole!r}: {cause}") from None
    if stored is None:
        raise ValueError(f"in {whole!r}: {method} has no slots whose store could be chosen: leave ':{name}' out")
    return stored


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
    composed = ("selector", "budget")  # given by marks of their own, as a store is
    own = [f for f in fields(cast(Any, part)) if f.init and f.name not in composed and str(f.type) != "Store"]
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
    """Hold the text of an argument that is itself a method, such as "sinks(4)@32" in store=sinks(4)@32.

    The type tells it from a bare word, such as "mean" in score=mean, whose text is a plain str.
    """


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
    """Return the value of an argument of a method's text; `node` is its syntax tree, as Python's `ast` parsed it.

    A literal gives the Python value that it stands for. A bare word, such as mean in score=mean, gives a str. A method,
    such as sinks(4)@32 in store=sinks(4)@32, gives its text as a `_Nested`. Raises ValueError for anything else.
    """
    if isinstance(node, ast.Name) and node.id not in ("True", "False", "None"):
        return node.id
    if isinstance(node, (ast.Call, ast.BinOp)):
        return _Nested(ast.unparse(node))
    return ast.literal_eval(node)


def default_method(name: str, budget: int = 64) -> Method:
    """Return a method that uses the policy, summary, selector or method registered as `name`, with default arguments.

    The result is "name@budget" for a policy, "window+name@budget" for a summary, "exact|name" for a selector, and
    "name" for a method; `budget` is in tokens. Tests and docs iterate over these methods.
    """
    part = lookup(name)
    texts = {"policy": "{0}@{1}", "summary": "window+{0}@{1}", "selector": "exact|{0}", "method": "{0}"}
    return parse(texts[kind(part)].format(name, budget))
