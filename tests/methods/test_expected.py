"""Expected attention: its closed form against drawn queries, its statistics against all queries at once."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.policy import Held, Policy, Queries
from kvfloor.core.rotation import Rotation
from kvfloor.methods.policies.expected import Expected, QueryMoments
from kvfloor.methods.variants.visual import NextScale
from tests.literal import Rule, Token, keeps_alike, kept_by, run
from tests.support import Draw, between, fed, opened, positions, stream, wrong

PLAIN = Expected(sinks=0, recent=0)


class Expect(Rule):
    def __init__(self, policy: Expected, budget: int, scale: float = 0.5) -> None:
        super().__init__(scale, policy.sinks, policy.protected_last(budget))
        self.policy, self.asked = policy, []

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        if position >= self.sinks:
            self.asked.append(q)

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        heads = torch.stack(self.asked).transpose(0, 1)  # (g, asked, d)
        groups = [heads.flatten(0, 1)] if self.policy.heads == "pool" else list(heads)
        share = [0.0] * len(held)
        for queries in groups:
            mean = sum(queries) / len(queries)
            covariance = sum(torch.outer(q - mean, q - mean) for q in queries) / len(queries)
            z = [math.exp(self.scale * mean @ t.k + self.scale**2 * t.k @ covariance @ t.k / 2) for t in held]
            share = [s + x / sum(z) / len(groups) for s, x in zip(share, z, strict=True)]
        return [(s + self.policy.epsilon) * float(t.v.norm()) for s, t in zip(share, held, strict=True)]


def agrees(policy: Expected, draw: Draw, budget: Any = 12, block: int = 1) -> bool:
    tokens = draw(2, 3, 50, 5, scale=2.0) + torch.linspace(-1, 1, 5), draw(2, 50, 5), draw(2, 50, 4)
    return keeps_alike(policy, lambda row, b: Expect(policy, b), tokens, budget, block)


@pytest.mark.parametrize("heads", ["pool", "each"])
@pytest.mark.parametrize("block", [1, 7])
def test_what_is_kept_equals_the_papers_rule(draw: Draw, heads: Any, block: int) -> None:
    assert agrees(replace(PLAIN, heads=heads), draw, block=block)
    assert agrees(Expected(heads=heads, sinks=2, epsilon=0.3), draw, (9, 21), block)


def spread(factor: float) -> type[Expected]:
    def priority(self: Expected, held: Held) -> Tensor:
        other = held.memory.copied()
        other.spread = factor * other.spread
        return Expected.priority(self, replace(held, memory=other))

    return wrong(Expected, priority=priority)


def looking_at(look: Callable[[Held], Held]) -> type[Expected]:
    return wrong(Expected, priority=lambda self, held: Expected.priority(self, look(held)))


WRONG = {
    "every query is taken to be the mean one": spread(0.0),
    "the half in the exponent is forgotten": spread(2.0),
    "values do not count": looking_at(
        lambda held: replace(held, fetch=lambda name: torch.ones_like(held.v) if name == "v" else held.k)
    ),
    "slots that hold no token take their share": looking_at(
        lambda held: replace(held, filled=[held.position.shape[1]] * len(held.filled))
    ),
}


@pytest.mark.parametrize("mutant", WRONG)
@pytest.mark.parametrize("heads", ["pool", "each"])
def test_a_wrong_line_is_rejected(draw: Draw, mutant: str, heads: Any) -> None:
    assert not agrees(WRONG[mutant](sinks=0, recent=0, heads=heads, epsilon=0.05), draw, (9, 21), block=7)


HALF, PAIRS = Rotation((0.9, 0.23)), Rotation((0.7,), start=2, interleaved=True)  # of 4 entries; 0 and 1 are not turned


def matrix(rotation: Rotation, place: int, d: int = 4) -> Tensor:
    """The rotation by one place as a matrix: complex numbers, pair by pair."""
    out, pairs = torch.eye(d, dtype=torch.float64), len(rotation.frequencies)
    for i, frequency in enumerate(rotation.frequencies):
        a, b = (2 * i, 2 * i + 1) if rotation.interleaved else (i, i + pairs)
        a, b = a + rotation.start, b + rotation.start
        unit = cmath.exp(1j * place * frequency)
        out[a, a], out[a, b], out[b, a], out[b, b] = unit.real, -unit.imag, unit.imag, unit.real
    return out


class Future(Expect):
    """The paper's rule: q is given before its rotation, and its mean and covariance get the mean future rotation."""

    def __init__(self, policy: Expected, budget: int, rotation: Rotation, by_rank: bool) -> None:
        super().__init__(policy, budget)
        self.rotation, self.by_rank = rotation, by_rank

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        first = len(held) if self.by_rank else seen
        turns = sum(matrix(self.rotation, first + i) for i in range(self.policy.horizon)) / self.policy.horizon
        places = range(len(held)) if self.by_rank else [0] * len(held)
        keys = [matrix(self.rotation, place) @ t.k for place, t in zip(places, held, strict=True)]
        bare, self.asked = self.asked, [q @ turns.T for q in self.asked]
        worth = super().worth([replace(t, k=k) for t, k in zip(held, keys, strict=True)], seen, budget)
        self.asked = bare
        return worth


def predicts(policy: Expected, draw: Draw, rotation: Rotation, by_rank: bool, block: int = 7, shift: int = 0) -> bool:
    """Feed the policy queries rotated by their positions plus `shift`, or bare ones to be rotated by ranks."""
    q, k, v = draw(2, 3, 60, 4, scale=2.0) + torch.linspace(-1, 1, 4), draw(2, 60, 4, scale=1.5), draw(2, 60, 4)
    given, at = q, k
    if not by_rank:
        turns = torch.stack([matrix(rotation, place + shift) for place in range(60)])
        given, at = (torch.einsum("nij,...nj->...ni", turns, x) for x in (q, k))
    spec = Spec(2, 4, 4, 0.5, dtype=torch.float64, **{"rotation" if by_rank else "applied": rotation})
    state = parse(f"h2o(block={block})@16").with_budget(16)
    state = replace(state, policy=policy).open(spec)
    for start, stop in ((0, 23), (23, 60)):
        state.step(given[:, :, start:stop], at[:, start:stop], v[:, start:stop])
    wanted = []
    for row in range(2):
        unturned = at[row] if by_rank or not shift else torch.einsum("ij,nj->ni", matrix(rotation, -shift), at[row])
        wanted.append(kept_by(Future(policy, 16, rotation, by_rank), 16, q[row], unturned, v[row], block))
    return positions(state) == wanted


TURNED = Expected(sinks=2, recent=0, horizon=5, epsilon=0.02)


@pytest.mark.parametrize("rotation", [HALF, PAIRS], ids=["half", "pairs"])
@pytest.mark.parametrize("by_rank", [False, True], ids=["applied", "by rank"])
@pytest.mark.parametrize("heads", ["pool", "each"])
def test_future_queries_are_turned_as_in_the_paper(draw: Draw, rotation: Any, by_rank: bool, heads: Any) -> None:
    assert predicts(replace(TURNED, heads=heads), draw, rotation, by_rank)
    assert predicts(replace(TURNED, heads=heads, horizon=1), draw, rotation, by_rank, block=1)


def test_positions_from_another_start_change_nothing(draw: Draw) -> None:
    assert predicts(TURNED, draw, HALF, by_rank=False, shift=1000)


def unturned(self: Expected, held: Held, queries: Queries) -> dict[str, Tensor]:
    """Record queries as they are multiplied with keys: rotated to the past."""
    held.memory.take(held.rows, queries.q, queries.made & (queries.position >= self.sinks))
    return {}


MISTURNED = {
    "queries keep the rotation of the past": wrong(Expected, on_queries=unturned),
    "the mean alone is turned": wrong(
        Expected, future=lambda self, held: (Expected.future(self, held)[0], held.memory.gaussian(held.rows)[1])
    ),
    "the covariance alone is turned": wrong(
        Expected, future=lambda self, held: (held.memory.gaussian(held.rows)[0], Expected.future(self, held)[1])
    ),
    "the future begins at place 0": wrong(
        Expected,
        future=lambda self, held: Expected.future(self, replace(held, seen=0 * held.seen, count=0 * held.count)),
    ),
    "nothing is averaged": wrong(Expected, shared=lambda self, spec: Expected.shared(replace(self, horizon=1), spec)),
}


@pytest.mark.parametrize("by_rank", [False, True], ids=["applied", "by rank"])
@pytest.mark.parametrize("mutant", MISTURNED)
def test_a_wrong_turn_is_rejected(draw: Draw, mutant: str, by_rank: bool) -> None:
    policy: Policy = MISTURNED[mutant](sinks=2, recent=0, horizon=5, epsilon=0.02)
    assert not predicts(policy, draw, HALF, by_rank)  # pyright: ignore[reportArgumentType]


def test_the_closed_form_is_the_mean_over_drawn_queries(draw: Draw) -> None:
    """200,000 queries from the very Gaussian: the shares of E exp(scale q.k) agree to about a percent."""
    turn = draw(4, 4, scale=0.4)
    q = (draw(1, 1, 64, 4) @ turn + 0.5).contiguous()
    k, v = draw(1, 64, 4), torch.ones(1, 64, 1, dtype=torch.float64)
    state = run(replace(PLAIN, epsilon=0.0), 64, q, k, v, scale=0.7, block=64)
    held = state._held(None, 64)
    found = state.method.policy.priority(held)[0]
    mean, covariance = q[0, 0].mean(0), torch.cov(q[0, 0].T, correction=0)
    drawn = mean + draw(200_000, 4) @ torch.linalg.cholesky(covariance).T
    z = torch.exp(0.7 * drawn @ k[0].T).mean(0)
    torch.testing.assert_close(found, z / z.sum(), rtol=0.03, atol=0.0)
    wrong = torch.softmax(0.7 * k[0] @ mean, 0)  # the mutant that forgets how much queries vary
    assert float((wrong / (z / z.sum()) - 1).abs().max()) > 0.2


@pytest.mark.parametrize("heads", ["pool", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_statistics_are_those_of_all_queries_at_once(draw: Draw, heads: Any, dtype: torch.dtype) -> None:
    """A mean of 30 and a spread of 1: running sums of squares would lose four digits."""
    q, k = (draw(2, 3, 96, 4) + 30.0).to(dtype), draw(2, 96, 4, dtype=dtype)
    present = torch.rand(2, 96, generator=torch.Generator().manual_seed(1)) < 0.8
    state = parse(f"expected(heads={heads},block=8)@16").open(Spec(2, 4, 4, dtype=dtype))
    fed(state, between((q, k, k), 0, 40), 7, present=present[:, :40])
    state.seal()
    fed(state, between((q, k, k), 40), present=present[:, 40:])
    mean, covariance = state.memory.gaussian(None)
    for row in range(2):
        heard = int(present[row].sum()) // 8 * 8
        mine = q[row][:, present[row]][:, 4:heard].double()  # the sinks' queries are left out
        groups = [mine.flatten(0, 1)] if heads == "pool" else list(mine)
        assert int(state.memory.count[row]) == len(groups[0])
        for head, group in enumerate(groups):
            torch.testing.assert_close(mean[row, head].double(), group.mean(0), rtol=1e-6, atol=0.0)
            wanted = torch.cov(group.T, correction=0)
            torch.testing.assert_close(covariance[row, head].double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_mutant_that_sums_squares_in_float32_is_rejected() -> None:
    q = torch.randn(1, 1, 4096, 1, generator=torch.Generator().manual_seed(0)) + 3000.0
    memory = QueryMoments(Spec(1, 1, 1), pooled=True)
    for start in range(0, 4096, 32):
        memory.take(None, q[:, :, start : start + 32], torch.ones(1, 32, dtype=torch.bool))
    true = float(q.double().var(correction=0))
    assert abs(float(memory.gaussian(None)[1]) - true) < 0.01
    assert abs(float((q**2).mean() - q.mean() ** 2) - true) > 0.1


def test_what_attend_asks_is_heard_and_what_read_asks_is_not(draw: Draw) -> None:
    state = run(PLAIN, 16, *stream(draw, 1, 2, 16), block=8)
    before = state.to_bytes()
    q = draw(1, 2, 5, 4)
    state.read(q.flatten(1, 2))
    assert state.to_bytes() == before
    state.attend(q)
    assert state.memory.count.tolist() == [2 * (16 + 5)]
    with pytest.raises(ValueError, match="group was 2 so far and is 3"):
        state.attend(draw(1, 3, 5, 4))


def test_the_queries_of_a_scale_are_heard(draw: Draw) -> None:
    state = opened("expected(sinks=0)@16")
    driver = NextScale(state)
    for t in (1, 4, 9):
        driver.step(*stream(draw, 1, 2, t))
    assert state.memory.count.tolist() == [2 * 14]


def test_without_a_query_the_shortest_values_leave(draw: Draw) -> None:
    k, v = draw(1, 40, 4), draw(1, 40, 4)
    kept = positions(run(PLAIN, 12, None, k, v, block=8))[0]
    assert kept == sorted(v[0].norm(dim=-1).topk(12).indices.tolist())


def test_memory_is_counted_and_constant(draw: Draw) -> None:
    spec = Spec(2, 16, 16)
    sizes = {}
    for text in ("expected@32", "expected(heads=each)@32", "h2o@32"):
        state = parse(text).open(spec)
        state.step(*stream(draw, 2, 4, 1, 16, dtype=torch.float32))
        sizes[text] = state.nbytes
        for _ in range(3):
            state.step(*stream(draw, 2, 4, 50, 16, dtype=torch.float32))
        assert state.nbytes == sizes[text]
    # One mean and one covariance per row or per head, a count per row and one flag; no score per slot.
    moments = {heads: 2 * (many * (16 + 256) * 4 + 8) + 8 for heads, many in (("pool", 1), ("each", 4))}
    scores = 2 * 64 * 4
    assert sizes["expected@32"] == sizes["h2o@32"] - scores + moments["pool"]
    assert sizes["expected(heads=each)@32"] == sizes["h2o@32"] - scores + moments["each"]


def test_it_does_not_claim_what_weighing_values_costs() -> None:
    assert not parse("expected@32").traits.value_linear and parse("h2o@32").traits.value_linear
