"""Run attention over a stream of tokens in bounded memory, and bound from below the memory that any method needs.

A method is a way to keep a KV cache, such as `h2o@256`: H2O eviction down to 256 tokens per kv head. `parse` makes a
method from such a text, and `Method.open` makes an empty cache (a state) that runs it. The modules:
floors  computes lower bounds on memory
game    tests these bounds: hides random values in the tokens, and decodes them from the attention outputs of a method's
        cache, which needs many bytes for that
tasks   makes test samples
audit   measures methods on a model
hf      runs methods in transformers
models  loads models
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvfloor.version import __version__

# Names load on first use, so that `import kvfloor` and `kvfloor --help` do not wait for torch.
_HOMES = {
    "Bounded": "core.bounded",
    "BrokenState": "core.broken",
    "CorruptState": "core.message",
    "Exact": "core.exact",
    "Guarantee": "core.method",
    "Guarded": "core.policy",
    "Held": "core.policy",
    "Indexed": "core.selector",
    "Method": "core.method",
    "Partial": "core.partial",
    "Policy": "core.policy",
    "PolicyMemory": "core.policy",
    "Queries": "core.policy",
    "Selector": "core.selector",
    "SelectorState": "core.selector",
    "Spec": "core.spec",
    "State": "core.state",
    "Summary": "core.summary",
    "SummaryState": "core.summary",
    "Traits": "core.method",
    "check_method": "check",
    "parse": "methods.grammar",
    "resolve": "core.budget",
}
_MODULES = ("audit", "floors", "game", "hf", "models", "tasks")

if TYPE_CHECKING:
    from kvfloor import audit, floors, game, hf, models, tasks
    from kvfloor.check import check_method
    from kvfloor.core.bounded import Bounded
    from kvfloor.core.broken import BrokenState
    from kvfloor.core.budget import resolve
    from kvfloor.core.exact import Exact
    from kvfloor.core.message import CorruptState
    from kvfloor.core.method import Guarantee, Method, Traits
    from kvfloor.core.partial import Partial
    from kvfloor.core.policy import Guarded, Held, Policy, PolicyMemory, Queries
    from kvfloor.core.selector import Indexed, Selector, SelectorState
    from kvfloor.core.spec import Spec
    from kvfloor.core.state import State
    from kvfloor.core.summary import Summary, SummaryState
    from kvfloor.methods.grammar import parse

__all__ = [
    "Bounded",
    "BrokenState",
    "CorruptState",
    "Exact",
    "Guarantee",
    "Guarded",
    "Held",
    "Indexed",
    "Method",
    "Partial",
    "Policy",
    "PolicyMemory",
    "Queries",
    "Selector",
    "SelectorState",
    "Spec",
    "State",
    "Summary",
    "SummaryState",
    "Traits",
    "__version__",
    "audit",
    "check_method",
    "floors",
    "game",
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
