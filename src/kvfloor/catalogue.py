"""The methods table in words, made from the registry: for `kvfloor methods` and the generated docs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvfloor.method import Spec, Traits
from kvfloor.registry import ALIASES, TABLE, default_method, kind


def rows() -> list[dict[str, Any]]:
    """One row per entry: name, kind, paper, guarantee, memory, traits, aliases, and the first line of its docs."""
    table = []
    for name, part in TABLE.items():
        method = default_method(name)
        stated = method.guarantee(Spec(rows=1, d=64, dv=64))
        table.append(
            {
                "name": name,
                "kind": kind(part),
                "about": (part.__doc__ or "").strip().splitlines()[0],
                "paper": getattr(part, "paper", "") or "-",
                "guarantee": "none" if stated is None else f"{stated.norm}: {stated.source}",
                "memory": "constant" if method.traits.constant_memory else "grows with the stream",
                "traits": _claims(method.traits),
                "aliases": sorted(alias for alias, target in ALIASES.items() if target == name),
            }
        )
    return table


def _claims(traits: Traits) -> list[str]:
    """Traits in words: the reference law, then every promise made."""
    promised = [f.name for f in fields(traits) if f.name != "reference" and getattr(traits, f.name)]
    return [f"reference={traits.reference}", *promised]
