"""Define a setting: one method under one budget, with the names that an audit's rows and report use for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvfloor.core.method import Method, budget_text, part_name
from kvfloor.core.selector import Everything
from kvfloor.core.summary import Drop


@dataclass(frozen=True)
class BudgetedMethod:
    """Hold a parsed method with its budget, and make its names; no other code parses these again.

    method     the method, with a budget in tokens, as a share of the context, or in bytes
    baseline   True if the setting is a reference that belongs to every audit
    asked      True if the user listed its method, with or without a budget
    """

    method: Method
    baseline: bool = False
    asked: bool = False

    @cached_property
    def text(self) -> str:
        """Return the whole setting, e.g. `h2o(recent=64)@256`."""
        return str(self.method)

    @cached_property
    def budget(self) -> str | None:
        """Return the budget as it was given, e.g. `256`, `25%` or `8MiB`; None without one."""
        return None if self.method.budget is None else budget_text(self.method.budget)

    @cached_property
    def configuration(self) -> str:
        """Return the setting without its budget, e.g. `h2o(recent=64)`."""
        return self.text if self.budget is None else self.text.removesuffix(f"@{self.budget}")

    @cached_property
    def name(self) -> str:
        """Return the method's parts without their arguments, e.g. `h2o` or `sinks+less|pages`."""
        policy, summary, selector = self.method.parts
        name = part_name(policy or self.method)
        if summary is not None and not isinstance(summary, Drop):
            name += f"+{part_name(summary)}"
        if selector is not None and not isinstance(selector, Everything):
            name += f"|{part_name(selector)}"
        return name
