"""Plan a model's memory before it runs: the bytes of its weights, and of its cache with and without compression.

For comparison a plan has the floor: the bytes that any compressor provably needs on worst-case keys and values.
"""

from kvfloor.planning.plan import Line, MemoryPlan, plan

__all__ = ["Line", "MemoryPlan", "plan"]
