"""Streaming attention in bounded memory, beside the proof of how little memory is possible."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Names load on first use, so that `import kvfloor` and `kvfloor --help` do not wait for torch.
_HOMES = {
    "Bounded": "bounded",
    "BrokenState": "broken",
    "Exact": "exact",
    "Guarantee": "method",
    "Method": "method",
    "Partial": "partial",
    "Spec": "method",
    "State": "state",
    "Traits": "method",
    "CorruptState": "message",
    "parse": "registry",
    "resolve": "budget",
    "check_method": "check",
}
_MODULES = ("audit", "barriers", "floors", "hf", "models", "tasks")

if TYPE_CHECKING:
    from kvfloor import audit, barriers, floors, hf, models, tasks
    from kvfloor.bounded import Bounded
    from kvfloor.broken import BrokenState
    from kvfloor.budget import resolve
    from kvfloor.check import check_method
    from kvfloor.exact import Exact
    from kvfloor.message import CorruptState
    from kvfloor.method import Guarantee, Method, Spec, Traits
    from kvfloor.partial import Partial
    from kvfloor.registry import parse
    from kvfloor.state import State

__all__ = [
    "Bounded",
    "BrokenState",
    "CorruptState",
    "Exact",
    "Guarantee",
    "Method",
    "Partial",
    "Spec",
    "State",
    "Traits",
    "__version__",
    "audit",
    "barriers",
    "check_method",
    "floors",
    "hf",
    "models",
    "parse",
    "resolve",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"kvfloor.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"kvfloor.{name}")
    raise AttributeError(f"kvfloor has no {name!r}")
