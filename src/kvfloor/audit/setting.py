"""Define a setting: one method under one budget, with the names that an audit's rows and report use for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvfloor.core.method import Method, budget_text, part_name
from kvfloor.core.selector import Everything
from kvfloor.core.summary import Drop


@dataclass(frozen=True)
class BudgetedMethod:
    """Hold a setting: a parsed method with its budget, and the texts that name it.

    method    the method, whose budget may be tokens, a share of the context, or bytes
    baseline  True if every audit includes the setting, as a reference
    asked     True if the user asked for the setting, by itself or as a method under the audit's budgets
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
        """Return the names of the method's parts without arguments, e.g. `h2o` or `sinks+less|pages:k4v4`.

        First comes the eviction policy, or the method if it is not made of parts. After `+` comes the part that
        summarises evicted tokens, after `|` the part that selects which kept tokens a query reads, and after `:` the
        bits per number of keys and values, if they are coded.
        """
        policy, summary, selector, store = self.method.parts
        name = part_name(policy or self.method)
        if summary is not None and not isinstance(summary, Drop):
            name += f"+{part_name(summary)}"
        if selector is not None and not isinstance(selector, Everything):
            name += f"|{part_name(selector)}"
        if store is not None and f":{store}" in self.text:
            name += f":{str(store).partition('(')[0]}"
        return name
