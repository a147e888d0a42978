"""Next-scale steps: block-wise causal over any method, whatever its budget."""

import pytest
import torch

from kvfloor import Partial, Spec, parse
from kvfloor.game.engine.public_bits import PublicBits
from kvfloor.game.keys.families import FAMILIES
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE
from kvfloor.methods.variants import NextScale, tokens_in
from kvfloor.methods.variants.visual import scale_by_scale
from tests.support import opened

SIDES = (1, 2, 3, 4)
ROWS, G, D, DV = 2, 3, 5, 4
TOKENS = tokens_in(SIDES)


def pyramid(dtype=torch.float64, tokens=TOKENS):
    noise = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, G, tokens, D, generator=noise, dtype=torch.float64)
    k = torch.randn(ROWS, tokens, D, generator=noise, dtype=torch.float64)
    v = torch.randn(ROWS, tokens, DV, generator=noise, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def scale_of():
    return torch.repeat_interleave(torch.arange(len(SIDES)), torch.tensor([side**2 for side in SIDES]))


def dense(q, k, v, seen, scale=1.0):
    """Softmax attention of every query over the tokens that seen (t, t) lets it see."""
    scores = (scale * q @ k.unsqueeze(1).transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v.unsqueeze(1)


def driven(method, q, k, v, sides=SIDES, **spec):
    state = parse(method).open(Spec(rows=q.shape[0], d=D, dv=DV, dtype=q.dtype, **spec))
    driver, answers, held = NextScale(state), [], []
    parts = zip(*(scale_by_scale(sides, x) for x in (q, k, v)), strict=True)
    for at in parts:
        answers.append(driver.step(*at))
        held.append(state.held.tolist())
    return torch.cat(answers, dim=2), state, held


@pytest.mark.parametrize("law", [{}, {"scale": 0.4}])
def test_a_pyramid_driven_scale_by_scale_is_dense_block_causal_attention(law):
    q, k, v = pyramid()
    out, state, _ = driven("exact", q, k, v, **law)
    scale = scale_of()
    assert torch.allclose(out, dense(q, k, v, scale.unsqueeze(1) >= scale, **law), atol=1e-12)
    assert state.seen.tolist() == [TOKENS] * ROWS


def test_a_mutant_that_is_causal_token_by_token_is_another_law():
    q, k, v = pyramid()
    out, _, _ = driven("exact", q, k, v)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert not torch.allclose(out, dense(q, k, v, causal), atol=1e-2)
    stepped = opened("exact", ROWS, D, DV).step(q, k, v)
    assert torch.allclose(stepped, dense(q, k, v, causal), atol=1e-12)


def test_a_mutant_that_takes_a_scale_in_before_it_answers_counts_it_twice(monkeypatch):
    def early(self, q, k, v):
        self.state.append(k, v)
        past = self.state.read(q.flatten(1, 2))
        return past.merge(Partial.over(q.flatten(1, 2), k, v, self.state.spec)).mean.view(*q.shape[:3], DV)

    q, k, v = pyramid()
    monkeypatch.setattr(NextScale, "step", early)
    out, _, _ = driven("exact", q, k, v)
    scale = scale_of()
    assert not torch.allclose(out, dense(q, k, v, scale.unsqueeze(1) >= scale), atol=1e-3)


@pytest.mark.parametrize("budget", [4, 8])
def test_a_window_answers_from_its_newest_tokens_and_the_whole_own_scale(budget):
    """Whatever the budget, every token is readable by its own scale; the past is what the window still holds."""
    q, k, v = pyramid()
    out, _, held = driven(f"window(block=1)@{budget}", q, k, v)
    scale, start = scale_of(), torch.tensor([0, 1, 5, 14])
    place = torch.arange(TOKENS)
    seen = (scale.unsqueeze(1) >= scale) & (place >= start[scale].unsqueeze(1) - budget)
    assert torch.allclose(out, dense(q, k, v, seen), atol=1e-12)
    assert held == [[min(budget, n)] * ROWS for n in (1, 5, 14, 30)]


@pytest.mark.parametrize("name", TABLE)
def test_any_method_is_driven_and_keeps_its_capacity(name):
    method, sides = default_method(name, budget=32), (2, 4, 8, 3)
    n = tokens_in(sides)
    q, k, v = pyramid(torch.float32, tokens=n)
    out, state, held = driven(str(method), q, k, v, sides)
    assert out.shape == (ROWS, G, n, DV) and torch.isfinite(out).all()
    most = method.capacity(n, prompt=n)  # nothing was sealed
    assert most is None or all(max(rows) <= most for rows in held)
    assert state.seen.tolist() == [n] * ROWS
    twin = state.method.from_bytes(state.to_bytes())
    one, two = (NextScale(each).step(q[:, :, :1], k[:, :1], v[:, :1]) for each in (state, twin))
    assert torch.equal(one, two)


def test_the_first_scale_is_answered_by_itself():
    q, k, v = pyramid()
    state = opened("window@16", ROWS, D, DV)
    out = NextScale(state).step(q[:, :, :9], k[:, :9], v[:, :9])
    assert torch.allclose(out, dense(q[:, :, :9], k[:, :9], v[:, :9], torch.ones(9, 9).bool()), atol=1e-12)


def test_order_within_a_scale_does_not_matter():
    q, k, v = pyramid()
    scale, noise = scale_of(), torch.Generator().manual_seed(3)
    order = torch.argsort(scale + torch.rand(TOKENS, generator=noise, dtype=torch.float64) * 0.9)
    one, _, _ = driven("exact", q, k, v)
    two, _, _ = driven("exact", q[:, :, order], k[:, order], v[:, order])
    assert torch.allclose(one[:, :, order], two, atol=1e-12)


@pytest.mark.parametrize(("asked", "kept"), [([1.0, 0.0], [0, 2, 3]), ([0.0, 1.0], [1, 2, 3])])
def test_a_policy_that_watches_learns_from_the_scales_queries(asked, kept):
    """Two past tokens, a scale that asks for one of them: when room is needed the other one leaves."""
    state = parse("h2o(recent=1,sinks=0,block=1)@3").open(Spec(rows=1, d=2, dv=1, scale=10.0))
    driver, east_north, both = NextScale(state), torch.eye(2).unsqueeze(0), torch.ones(1, 1, 2)
    state.append(east_north, torch.zeros(1, 2, 1))
    q = torch.tensor(asked).view(1, 1, 1, 2)
    driver.step(q, both, torch.zeros(1, 1, 1))
    slots = state.slots  # type: ignore[attr-defined]
    weight = (10 * torch.cat([east_north, both], dim=1)[0] @ q.flatten()).softmax(0)
    assert torch.allclose(slots.columns.score[:3], weight)
    driver.step(q, both, torch.zeros(1, 1, 1))
    assert sorted(slots.view().position[0].tolist()) == kept


def test_a_policy_that_does_not_watch_is_not_shown_the_queries(monkeypatch):
    q, k, v = pyramid()
    state = opened("window@16", ROWS, D, DV)
    monkeypatch.setattr(type(state), "attend", lambda self, q: pytest.fail("a window does not watch"))
    NextScale(state).step(q[:, :, :4], k[:, :4], v[:, :4])


def test_a_refused_scale_leaves_the_state_as_it_was():
    q, k, v = pyramid()
    state = opened("h2o(recent=2)@12", ROWS, D, DV)
    driver = NextScale(state)
    driver.step(q[:, :, :4], k[:, :4], v[:, :4])
    before = state.to_bytes()
    q, k, v = q[:, :, 4:8], k[:, 4:8], v[:, 4:8]
    for bad, message in (
        ((q[0], k, v), r"q must have shape \(rows=2, g, t, 5\), got \(3, 4, 5\)"),
        ((q, k[:, :3], v), "a scale of 4 queries needs as many keys and values, got"),
        ((q, k, v[:, :3]), "a scale of 4 queries needs as many keys and values"),
        ((q, k[0], v), "a scale of 4 queries needs"),
        ((q[..., :3], k, v), "q must have shape"),
        ((q, k[..., :3], v), "k must have shape"),
        ((q, k, v * torch.nan), "v has NaN"),
        ((q * torch.inf, k, v), "q has NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            driver.step(*bad)
        assert state.to_bytes() == before
    with pytest.raises(TypeError, match=r"k must be torch\.float64"):
        driver.step(q, k.float(), v)
    assert state.to_bytes() == before


def test_what_the_state_refuses_is_refused():
    method = PublicBits("sphere", 5, 0)
    state = method.open(Spec(rows=1, d=D, dv=DV))
    keys = FAMILIES["sphere"](5, D, 0).float().unsqueeze(0)
    NextScale(state).step(torch.zeros(1, 1, 4, D), keys[:, :4], torch.zeros(1, 4, DV))
    before = state.to_bytes()
    with pytest.raises(ValueError, match="these keys differ"):
        NextScale(state).step(torch.zeros(1, 1, 1, D), -keys[:, 4:], torch.zeros(1, 1, DV))
    assert state.to_bytes() == before


def test_sides_and_tokens():
    assert tokens_in((1, 2, 3)) == 14 and tokens_in(()) == 0
    with pytest.raises(ValueError, match="side must be a whole number >= 1, got 0"):
        tokens_in((1, 0))
    x = torch.arange(14.0).view(14, 1)
    assert [part.flatten().tolist() for part in scale_by_scale((1, 2, 3), x)] == [
        [0.0], [1.0, 2.0, 3.0, 4.0], [float(i) for i in range(5, 14)],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"scales \(1, 2\) have 5 tokens, got 14"):
        scale_by_scale((1, 2), x)
