"""Plan a model's memory before it runs: weights, exact cache, methods under their budgets, and the provable floor."""

from kvfloor.planning.plan import Line, MemoryPlan, plan

__all__ = ["Line", "MemoryPlan", "plan"]
