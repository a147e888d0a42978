"""Convert budgets, given as tokens, a share of the context, or bytes of the whole cache, to tokens per row.

A row is one (batch item, kv head) stream. The context is the prompt; the cache has one state per layer. A method is the
configuration of a cache, the spec the sizes, dtype and constants of a layer's state. A protected token is one that the
method's policy never evicts.
"""

from __future__ import annotations

import re

import torch

from kvfloor.core.method import Budget, Method
from kvfloor.core.spec import Spec
from kvfloor.splitting import shortened
from kvfloor.validation import count

_PROBE = 1024
_MOST_TOKENS = 2**40
_LONGEST = 32  # characters of a share or a size
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FORMS = "a number of tokens (512), a share of the context (25%) or bytes (64MiB, 8MB)"


def parse_budget(text: str) -> Budget:
    """Parse and check the text of a budget: return "512" as an int, but "25%" and "64MiB" as text.

    Raises ValueError, naming the allowed forms, for any other text.
    """
    text = text.strip()
    if re.fullmatch(r"[0-9]+", text):
        digits = text.lstrip("0")
        if not digits:
            raise ValueError(f"a budget must be at least 1 token, got {text!r}")
        if len(digits) > 13 or int(digits) > _MOST_TOKENS:
            raise ValueError(f"a budget must be at most {_MOST_TOKENS} tokens, got {shortened(text)}")
        return int(digits)
    if len(text) <= _LONGEST and re.fullmatch(r"[0-9]+(\.[0-9]+)?%", text):
        if not 0 < float(text[:-1]) <= 100:
            raise ValueError(f"a budget as a share of the context must lie in (0, 100] %, got {text!r}")
        return text
    if size_bytes(text) is not None:
        return text
    raise ValueError(f"{shortened(text)} is not a budget: give {_FORMS}")


def size_bytes(text: str) -> int | None:
    """Return the number of bytes in a text such as "64MiB" or "8MB"; None if the text is not a size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?i?B)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or len(text) > _LONGEST:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()])


def tokens(budget: Budget | None, rows: int) -> list[int]:
    """Return a list with the budget of each of `rows` rows in tokens; raise ValueError for a share, bytes or None.

    Raises ValueError also if budgets are given per row for another number of rows.
    """
    if isinstance(budget, int):
        return [budget] * rows
    if isinstance(budget, tuple):
        if len(budget) != rows:
            raise ValueError(f"{len(budget)} budgets were given for {rows} rows; give one number, or one per row")
        return list(budget)
    if budget is None:
        raise ValueError("the method has no budget: write one after '@', for example '@512'")
    raise ValueError(f"the budget {budget!r} is not resolved: call kvfloor.resolve(method, spec, ...) first")


def resolve(method: Method, spec: Spec, *, layers: int = 1, length: int | None = None, g: int = 1) -> Method:
    """Return `method` with its budget converted from a share or bytes to tokens per row.

    spec     the rows of one layer, the widths of key and value, and the dtype
    layers   number of layers in the cache; each has one state for `spec`
    length   the context in tokens, needed for shares
    g        the GQA group: query heads per kv head (some policies keep queries)
    A budget in tokens stays as it is. A budget in bytes has to cover all that the states of all layers allocate:
    scores, positions and spare slots too. Raises ValueError for a method that no budget bounds, for a share without a
    length, and for bytes too few for the smallest budget.
    """
    if method.kinds != (method,):
        return method.each(lambda one: resolve(one, spec, layers=layers, length=length, g=g))
    budget = method.budget
    if not isinstance(budget, str):
        return method
    count("resolve", least=1, layers=layers, g=g, **({} if length is None else {"length": length}))
    parse_budget(budget)
    if budget.endswith("%"):
        if length is None:
            raise ValueError(f"@{budget} is a share of the context, whose length is not known here: give tokens")
        return with_budget(method, max(1, int(length * float(budget[:-1]) / 100)))
    total = size_bytes(budget)
    assert total is not None
    per_row = total / (layers * spec.rows)
    least = least_budget(method)
    floor = _row_bytes(method, least, spec, g)
    if floor > per_row:
        raise ValueError(
            f"@{budget} leaves {per_row:.0f} bytes for each of {layers} x {spec.rows} rows; {method} needs {floor} for "
            f"its smallest budget of {least} tokens: raise the budget"
        )
    # Memory is linear in the tokens, up to a method's rounding (SubGen's clusters): walk down from the line.
    slope = (_row_bytes(method, least + _PROBE, spec, g) - floor) / _PROBE
    affordable = least + int((per_row - floor) / slope)
    while affordable > least and _row_bytes(method, affordable, spec, g) > per_row:
        affordable -= 1
    return with_budget(method, affordable)


def least_budget(method: Method) -> int:
    """Return the smallest budget in tokens that the method accepts.

    For example, the budget of a method with a policy must exceed the number of protected tokens.
    """
    high = 1
    while not _accepts(method, high):
        high *= 2
        if high > _MOST_TOKENS:
            with_budget(method, high)  # raises the method's own reason
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _accepts(method, middle) else (middle, high)
    return high


def _accepts(method: Method, tokens: int) -> bool:
    try:
        return with_budget(method, tokens) is not None
    except ValueError:  # its protected tokens do not fit
        return False


def with_budget(method: Method, budget: Budget) -> Method:
    """Return a copy of `method` with this budget; raise ValueError if the method keeps every token."""
    bounded = method.with_budget(budget)
    if bounded is None:
        raise ValueError(f"{method} keeps every token: no budget bounds it")
    return bounded


def _row_bytes(method: Method, tokens: int, spec: Spec, g: int) -> int:
    """Return the bytes that one row allocates under a budget of `tokens`, measured on a state with one token.

    g: the GQA group, i.e. query heads per kv head (some policies keep queries).
    """
    places = None if spec.places is None else spec.places[:1]
    law = {"scale": spec.scale, "tied": spec.tied, "rotation": spec.rotation}
    one = Spec(rows=1, d=spec.d, dv=spec.dv, dtype=spec.dtype, places=places, **law)
    state = with_budget(method, tokens).open(one)
    q = torch.zeros(1, g, 1, spec.d)
    k = torch.zeros(1, 1, state.key_width).to(spec.dtype)
    v = k if spec.tied else torch.zeros(1, 1, state.value_width).to(spec.dtype)
    state.step(q.to(spec.dtype), k, v)
    return state.nbytes
