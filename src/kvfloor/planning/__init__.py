"""Plan a model's memory before it runs: the bytes of its weights, and of its KV cache with and without compression.

For comparison a plan also has the floor: the bytes that any compression method provably needs on worst-case keys and
values.
"""

from kvfloor.planning.plan import Line, MemoryPlan, plan
from kvfloor.planning.window_law import WindowLaw, fit_window_law

__all__ = ["Line", "MemoryPlan", "WindowLaw", "fit_window_law", "plan"]
