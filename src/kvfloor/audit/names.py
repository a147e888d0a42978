"""What the text of a setting says: its method, its budget, and whether it is one of the baselines.

A setting is the text `str(method)` gives, e.g. `h2o(recent=64)@256`, `sinks(4)+less(rank=8)@25%` or
`quant(bits=4)`.
"""

import re

BASELINES = {
    "exact": "keeps every token at full precision",
    "random": "keeps a random sample of the tokens: the control every idea must beat",
    "window": "keeps the most recent tokens (recency)",
    "sinks": "keeps the first tokens and the most recent ones",
    "quant": "keeps every token at 8 or 4 bits",
}
"""Bare method name -> what it does, for the methods every audit compares with."""


def split_setting(setting: str) -> tuple[str, str | None]:
    """`(method, budget)` of a setting; the budget is the text after the last `@`, None without one."""
    method, at, budget = setting.rpartition("@")
    return (method, budget) if at else (setting, None)


def bare_name(setting: str) -> str:
    """The setting's method without arguments and budget: `sinks(4)+less(rank=8)@256` -> `sinks+less`."""
    return re.sub(r"\([^()]*\)", "", split_setting(setting)[0])


def is_baseline(setting: str) -> bool:
    """Whether a setting is one of the baselines; a composition such as `window+value_sum` is not."""
    return bare_name(setting) in BASELINES
