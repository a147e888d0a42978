"""Keep one layer's tokens twice: exactly, to verify drafted tokens, and in a bounded state, to draft them.

A row is one (batch item, kv head) stream. Committed tokens are those that both memories hold. Uncommitted ones, such as
drafted tokens, are in neither: callers hold their keys and values, and attention to them is merged with attention to
the committed ones. So nothing is ever taken back. In shapes, g is the GQA group, u uncommitted tokens and n queries per
row, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from torch import Tensor

from kvfloor.core.bounded import Bounded, BoundedState
from kvfloor.core.exact import ExactState
from kvfloor.core.partial import Partial
from kvfloor.core.state import State


class ExactAndBounded:
    """Hold the committed tokens of a full-attention layer in two states, an exact one and a bounded one."""

    def __init__(self, exact: State, bounded: State) -> None:
        self.exact, self.bounded = exact, bounded

    @property
    def hot_bytes(self) -> int:
        """Return the bytes of the bounded state, which every drafted token reads."""
        return self.bounded.nbytes

    @property
    def cold_bytes(self) -> int:
        """Return the bytes of the exact state, which is read once per verification."""
        return self.exact.nbytes

    def take(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Partial:
        """Append a prompt's tokens to both states, and return exact attention of its queries: a `Partial` (rows, g, n).

        q (rows, g, n, d), k (rows, n, d), v (rows, n, dv). present: bool (rows, n), False for padding; None: no padding
        """
        part = self.exact.step_partial(q, k, v, present)
        _feed(self.bounded, q, k, v, present)
        return part

    def attend(self, q: Tensor, k: Tensor, v: Tensor, drafting: bool) -> Partial:
        """Return attention of q over the committed tokens and causally over uncommitted ones: a `Partial` (rows, g, n).

        Nothing changes: no policy learns from these queries.
        q         (rows, g, n, d), the queries of the last n uncommitted tokens; n is u, or 1
        k, v      (rows, u, d) and (rows, u, dv), the uncommitted tokens
        drafting  True: the committed tokens are those of the bounded state; False: those of the exact one
        """
        rows, g, n, d = q.shape
        flat = q.reshape(rows, g * n, d)
        past = (self.bounded if drafting else self.exact).read(flat).shaped(rows, g, n)
        if n == 1:
            newest = Partial.over(flat, k, v, self.exact.spec).shaped(rows, g, n)
        else:
            newest = Partial.causal(q, k, v, self.exact.spec)
        return past.merge(newest)

    def commit(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> None:
        """Append verified tokens to both states; the bounded state's policy may learn from their queries.

        Shapes are those of `take`.
        """
        self.exact.append(k, v, present)
        _feed(self.bounded, q, k, v, present)

    def seal(self) -> None:
        """Mark the end of the prompt; methods that compress the prompt do so now."""
        self.bounded.seal()


def _feed(state: State, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> None:
    """Append tokens to a state, with those of their queries that it may learn from.

    q (rows, g, n, d), k (rows, n, d), v (rows, n, dv), present (rows, n) or None. Tokens whose queries have no
    influence on the state are appended without attention, which costs less.
    """
    n = k.shape[1]
    first = n - min(n, _asked(state, n))
    if first:
        state.append(k[:, :first], v[:, :first], None if present is None else present[:, :first])
    if first < n:
        state.step(q[:, :, first:], k[:, first:], v[:, first:], None if present is None else present[:, first:])


def _asked(state: State, n: int) -> int:
    """Return how many of the newest n queries the state may learn from."""
    if isinstance(state, ExactState) and state.selection is None:
        return 0
    if not isinstance(state, BoundedState) or state.summary is not None or state.selection is not None:
        return n
    if not state.learns_from_queries:
        return 0
    method = state.method
    if isinstance(method, Bounded) and method.answers_prompt_exactly and not state.sealed:
        newest = method.prompt_queries
        return n if newest is None else newest + method.block
    return n
