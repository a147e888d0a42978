"""Draw streams, feed them in pieces, open states from texts, and define attention, for many tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvfloor import Spec, State, parse

Draw = Callable[..., Tensor]
Stream = tuple[Tensor, Tensor, Tensor]
Part = TypeVar("Part")


def seeded(seed: int) -> Draw:
    """Return draw(*shape, dtype, scale), which draws standard normal numbers from one seeded generator."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return numbers


def stream(draw: Draw, rows: int, g: int, n: int, d: int = 4, dv: int | None = None, **how: Any) -> Stream:
    """Draw the queries (rows, g, n, d), keys (rows, n, d) and values (rows, n, dv) of n tokens."""
    return draw(rows, g, n, d, **how), draw(rows, n, d, **how), draw(rows, n, dv or d, **how)


def fitting(draw: Draw, state: State, g: int, n: int) -> Stream:
    """Draw n tokens of the widths that the state takes, in its spec's dtype."""
    rows, how = state.spec.rows, {"dtype": state.spec.dtype}
    q = draw(rows, g, n, state.spec.d, **how)
    return q, draw(rows, n, state.key_width, **how), draw(rows, n, state.value_width, **how)


def opened(text: str, rows: int = 1, d: int = 4, dv: int | None = None, **spec: Any) -> Any:
    """Open a state of the method with this text, of float64 unless a dtype is given."""
    return parse(text).open(Spec(rows, d, dv or d, **({"dtype": torch.float64} | spec)))


def filled(text: str, k: Tensor, v: Tensor | None = None, **spec: Any) -> Any:
    """Open a state of this text and append k (rows, n, d) and v (rows, n, dv), None: the keys as values."""
    v = k if v is None else v
    state = opened(text, len(k), k.shape[2], v.shape[2], **({"dtype": k.dtype} | spec))
    state.append(k, v)
    return state


def many(text: str, k: Tensor, v: Tensor, rows: int, **spec: Any) -> Any:
    """Append the same k (n, d) and v (n, dv) to many rows, which differ in their randomness alone."""
    return filled(text, k.expand(rows, -1, -1), v.expand(rows, -1, -1), **spec)


def fed(state: State, tokens: Stream, *cuts: int, present: Tensor | None = None) -> Tensor:
    """Step through the tokens (q, k, v) in pieces that end at the cuts, and return all answers."""
    q, k, v = tokens
    parts = [slice(*edges) for edges in pairwise(sorted({0, *cuts, k.shape[1]}))]
    marks = [() if present is None else (present[:, at],) for at in parts]
    return torch.cat(
        [state.step(q[:, :, at], k[:, at], v[:, at], *mark) for at, mark in zip(parts, marks, strict=True)], 2
    )


def between(tokens: Stream, start: int, stop: int | None = None) -> Stream:
    """Return the tokens from start to stop."""
    q, k, v = tokens
    return q[:, :, start:stop], k[:, start:stop], v[:, start:stop]


def later(n: int) -> Tensor:
    """Return a mask (n, n) that is True where a token comes after the query's."""
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
    hide: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return mean and log-mass of attention in float64, by torch's softmax and logsumexp; 0 and -inf if all is hidden.

    q (..., m, d), k (..., s, d), v (..., s, dv), log_weight (..., s), hide (..., m, s).
    """
    logits = q.double() @ k.double().mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if log_weight is not None:
        logits = logits + log_weight.double().unsqueeze(-2)
    if hide is not None:
        logits = logits.masked_fill(hide, -torch.inf)
    log_mass = torch.logsumexp(logits, -1)
    weights = torch.softmax(logits, -1).masked_fill((log_mass == -torch.inf).unsqueeze(-1), 0.0)
    return weights @ v.double(), log_mass


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Return the answers (rows, g, n, dv) of exact attention to a stream q (rows, g, n, d), k (rows, n, d), v."""
    return attention(q, k.unsqueeze(1), v.unsqueeze(1), scale, softcap, hide=later(k.shape[1]))[0]


def close(a: Tensor, b: Tensor) -> None:
    """Require equal float64 tensors but for rounding."""
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def require_mean(samples: Tensor, wanted: Tensor | float) -> None:
    """Require that each column's mean lies within 4.5 standard errors of `wanted`."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert bool(((samples.mean(0) - wanted).abs() <= 4.5 * error + 1e-12).all())


def require_drawn(picked: Tensor, cells: int, share: Tensor | None = None) -> None:
    """Require of numbers below `cells` that chi-square does not tell them from fair draws, or from these shares."""
    expected = picked.numel() * (torch.full((cells,), 1.0 / cells) if share is None else share)
    counts = torch.bincount(picked.flatten(), minlength=cells)
    assert float(((counts - expected) ** 2 / expected).sum()) < cells - 1 + 4 * math.sqrt(2 * (cells - 1))


def positions(state: Any) -> list[list[int]]:
    """Return the sorted positions that each row holds."""
    view, held = state.slots.view(), state.held.tolist()
    return [sorted(view.position[row, : held[row]].tolist()) for row in range(state.spec.rows)]


def wrong(part: type[Part], **methods: Any) -> type[Part]:
    """Make the class with other methods in the place of some of its own: one wrong line, to see it rejected."""
    return type(f"Wrong{part.__name__}", (part,), methods)
