"""Describe every registered method in words, for `kvfloor methods` and the generated docs.

A method is a way to cache tokens. Some methods, such as `exact` (keeps every token), are registered as a whole. Others
are composed of registered parts: a policy (chooses the tokens to evict), a summary (keeps a compressed form of evicted
tokens), a selector (chooses the held tokens that a query reads) and a store (keeps keys and values in full, or coded in
few bits). A guarantee is a proved error bound; traits are the
properties that a method promises, such as constant memory.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from typing import Any

from kvfloor.core.method import Method, Traits
from kvfloor.core.spec import Spec
from kvfloor.methods.grammar import default_method, parse
from kvfloor.methods.registry import ALIASES, SHORTHANDS, TABLE, VARIANTS, kind, lookup
from kvfloor.methods.stores.coded import Coded, Coding
from kvfloor.methods.stores.kivi import Kivi

_ASSUMED = {"radius": "1.0", "spread": "4.0", "horizon": "1000"}  # examples of what a theorem may need


def rows() -> list[dict[str, Any]]:
    """Return one dict per method, policy, summary, selector and shorthand, and two for the stores of coded tokens.

    The keys of a dict are name, kind, about (the first sentence of the docstring), paper, guarantee, memory
    ("constant", "constant under a budget" or "grows with the stream"), traits, aliases. The values are text, except
    traits and aliases, which are lists of text. The stores' names are examples. The last dicts are of the
    kind "variant". These are methods that no
    model can use as its cache, mostly because they compute another attention, such as one over pairs of tokens.
    Variants with an argument that has no default are left out.
    """
    variants = [name for name in VARIANTS if all(_has_default(f) for f in fields(lookup(name)))]
    stores = [_store_row("k4v4", Coded, "sinks:k4v4@64"), _store_row("kivi4", Kivi, "exact:kivi4")]
    parts = [_row(name, kind(TABLE[name])) for name in TABLE]
    return [*parts, *map(_shorthand_row, SHORTHANDS), *stores, *(_row(x, "variant") for x in variants)]


def _has_default(field: Field[Any]) -> bool:
    return not field.init or field.default is not MISSING or field.default_factory is not MISSING


def _row(name: str, label: str) -> dict[str, Any]:
    part = lookup(name)
    method = parse(name) if label == "variant" else default_method(name)
    about, paper = _first_sentence(part.__doc__ or ""), getattr(part, "paper", "") or "-"
    return _entry(name, label, about, paper, _guarantee(name, part, method), method)


def _shorthand_row(name: str) -> dict[str, Any]:
    """Return the dict of a name that stands for a composition."""
    method = parse(name)
    return _entry(name, "shorthand", f"Stand for {method}.", SHORTHANDS[name].paper, "none", method)


def _store_row(name: str, store: type[Coding], text: str) -> dict[str, Any]:
    """Return the dict of the store of this name and class, whose traits are those of the method `text`."""
    guarantee = _guarantee(name, store, parse(f"exact:{name}"))
    return _entry(name, "store", _first_sentence(store.__doc__ or ""), store.paper, guarantee, parse(text))


def _entry(name: str, label: str, about: str, paper: str, guarantee: str, method: Method) -> dict[str, Any]:
    """Return a dict of `rows`; memory and traits are those of `method`."""
    return {
        "name": name,
        "kind": label,
        "about": about,
        "paper": paper,
        "guarantee": guarantee,
        "memory": _memory(method),
        "traits": _claims(method.traits),
        "aliases": sorted(alias for alias, target in ALIASES.items() if target == name),
    }


def _first_sentence(text: str) -> str:
    """Return the text up to its first full stop, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<! al)\. ", paragraph)[0].rstrip(".:") + "."


def _guarantee(name: str, part: type, method: Method) -> str:
    """Return the guarantee of a registered class as text; "none" if it has none.

    An example is "l2, relative to ||softmax||_2 ||V||_op: Zandieh et al. 2024, given radius": the norm in which the
    error is bounded, and the source of the proof. Some theorems assume a bound that the user must give as an argument,
    such as `radius` (on the lengths of keys and queries) or `spread` (on how far values differ). The names of these
    arguments then follow after "given".
    name    the registered name
    part    its class: a method, policy, summary or selector
    method  a method that uses this class, with default arguments
    """
    spec = Spec(rows=1, d=4, dv=4)
    stated, given = method.guarantee(spec) or method.open(spec).guarantee(), ""
    if stated is None:
        needed = [f.name for f in fields(part) if f.name in _ASSUMED]
        if needed:
            options = ",".join(f"{argument}={_ASSUMED[argument]}" for argument in needed)
            more = ",groups=31" if any(f.name == "groups" for f in fields(part)) else ""
            forms = {"summary": f"window+{name}({options}{more})@64"}
            stated = parse(forms.get(kind(part), f"{name}({options}{more})")).guarantee(spec)
            given = f", given {' and '.join(needed)}"
    return "none" if stated is None else f"{stated.norm}: {stated.source}{given}"


def _memory(method: Method) -> str:
    if method.traits.constant_memory:
        return "constant"
    bounded = method.with_budget(64) if method.budget is None else None
    if bounded is not None and bounded.traits.constant_memory:
        return "constant under a budget"
    return "grows with the stream"


def _claims(traits: Traits) -> list[str]:
    """Return a method's traits as a list of words, such as ["reference=softmax", "normalised", "constant_memory"].

    The first word tells the kind of attention that the method approximates. The others are the names of the properties
    that the method promises.
    """
    promised = [f.name for f in fields(traits) if f.name != "reference" and getattr(traits, f.name)]
    return [f"reference={traits.reference}", *promised]
