"""Bounded: one eviction loop, against the papers' algorithms written token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Bounded, Spec, parse
from kvfloor.core.bounded import _lowest
from kvfloor.core.policy import Policy
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.methods.policies.heavy_hitters import HeavyHitters
from kvfloor.methods.policies.sinks import Sinks
from kvfloor.methods.policies.window import Window
from tests.literal import Rule, Token, kept_by
from tests.support import Draw, between, causal, close, filled, later, opened, stream
from tests.support import positions as kept


class Oldest(Rule):
    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        return [float(token.position) for token in held]


class Drawn(Rule):
    def __init__(self, row: int, sinks: int = 0, recent: int = 0) -> None:
        super().__init__(0.5, sinks, recent)
        self.draws = uniform(row_keys(0, torch.tensor([row]), "random policy"), torch.arange(200)).tolist()

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        return [self.draws[token.position] for token in held]


class Scored(Rule):
    def __init__(self, score: str, sinks: int = 0, recent: int = 0, decay: float = 1.0) -> None:
        super().__init__(0.5, sinks, recent)
        self.score, self.decay = score, decay

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        for token, weight in zip(held, self.weights(held, q).mean(0).tolist(), strict=True):
            token.marks["score"] = token.marks.get("score", 0.0) * self.decay + weight

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        return [t.marks["score"] / (seen - t.position if self.score == "mean" else 1) for t in held]


CASES: dict[str, Callable[[int], Rule]] = {
    "window@12": lambda row: Oldest(0.5),
    "sinks(3)@12": lambda row: Oldest(0.5, sinks=3),
    "random@12": lambda row: Drawn(row),
    "random(sinks=2,recent=4)@12": lambda row: Drawn(row, sinks=2, recent=4),
    "h2o(sinks=0,recent=0)@12": lambda row: Scored("sum"),
    "h2o@12": lambda row: Scored("sum", sinks=4, recent=6),
    "h2o(recent=3,sinks=1)@12": lambda row: Scored("sum", sinks=1, recent=3),
    "h2o(score=mean,sinks=0,recent=4)@12": lambda row: Scored("mean", recent=4),
    "h2o(score=decay,sinks=0,recent=4,decay=0.9)@12": lambda row: Scored("decay", recent=4, decay=0.9),
}


@pytest.mark.parametrize(("g", "block"), [(1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("text", CASES)
def test_answers_and_kept_tokens_equal_the_papers_algorithm(draw: Draw, text: str, g: int, block: int) -> None:
    q, k, v = stream(draw, 2, g, 80, 8)
    method = replace(parse(text), block=block)  # type: ignore[type-var]
    state = method.open(Spec(2, 8, 8, scale=0.5, dtype=torch.float64))
    out = state.step(q, k, v)
    for row in range(2):
        answers: list[Tensor] = []
        assert kept(state)[row] == kept_by(CASES[text](row), 12, q[row], k[row], v[row], block, answers=answers)
        close(out[row], torch.stack(answers, 1))


def test_the_maximum_of_a_group_decides_when_asked_for() -> None:
    """One query of the group wants token 0 strongly, the other not at all; token 1 has the better mean."""
    k = torch.tensor([[[4.0, 0.0, 0.0], [0.0, 2.0, 2.0], [0.0, 0.0, 0.0]]])
    q = torch.zeros(1, 2, 3, 3)
    q[0, 0, 2], q[0, 1, 2] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 3.0])
    kept_by = {}
    for group in ("max", "mean"):
        state = parse(f"h2o(sinks=0,recent=1,group={group},block=3)@2").open(Spec(1, 3, 3))
        state.step(q, k, torch.zeros(1, 3, 3))
        kept_by[group] = kept(state)[0]
    scores = torch.softmax(q[0, :, 2] @ k[0].T, -1)
    uniform_part = torch.tensor([1.0 + 1 / 2, 1 / 2])  # what queries 0 and 1, which are zero, gave tokens 0 and 1
    for group, joined in (("max", scores.amax(0)), ("mean", scores.mean(0))):
        total = uniform_part + joined[:2]
        assert kept_by[group] == [int(total.argmax()), 2]


@pytest.mark.parametrize("text", ["h2o(sinks=0,recent=0,block=4)@6", "h2o(score=mean,sinks=0,recent=0,block=4)@6"])
def test_equal_scores_let_the_older_token_go(text: str, draw: Draw) -> None:
    state = parse(text).open(Spec(1, 4, 4))
    state.append(draw(1, 24, 4, dtype=torch.float32), draw(1, 24, 4, dtype=torch.float32))
    assert kept(state) == [[18, 19, 20, 21, 22, 23]]


@given(st.data())
@settings(max_examples=40)
def test_protected_tokens_never_leave_and_the_budget_holds(data: st.DataObject) -> None:
    sinks, recent = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6))
    budget = sinks + recent + data.draw(st.integers(1, 5))
    block = data.draw(st.integers(1, 9))
    policy: Policy = HeavyHitters(
        recent=recent, sinks=sinks, score=data.draw(st.sampled_from(["sum", "mean", "decay"]))
    )
    method = Bounded(policy, budget=budget, block=block)
    state = method.open(Spec(2, 4, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    seen = 0
    for t in data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=5)):
        q, k, v = (torch.randn(2, *shape, 4, generator=generator) for shape in ((1, t), (t,), (t,)))
        state.step(q, k, v)
        seen += t
        wanted = set(range(min(sinks, seen))) | set(range(max(0, seen - recent), seen))
        limit = method.capacity(seen)
        assert limit is not None
        for positions in kept(state):
            assert wanted <= set(positions)
            assert len(positions) <= limit
            assert len(positions) == len(set(positions))
            if seen % block == 0:
                assert len(positions) == min(seen, budget)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("h2o@1", 9),
        ("h2o@8", 9),
        ("h2o(recent=10,sinks=3)@5", 14),
        ("sinks(4)@4", 5),
        ("random(sinks=1,recent=2)@3", 4),
    ],
)
def test_a_budget_too_small_names_the_least_one_that_works(text: str, needed: int) -> None:
    with pytest.raises(ValueError, match=f"needs at least {needed}$"):
        parse(text)
    head = text.partition("@")[0]
    parse(f"{head}@{needed}")
    with pytest.raises(ValueError, match="too small"):
        parse(f"{head}@{needed - 1}")


@pytest.mark.parametrize("text", ["h2o(recent=3,sinks=1)", "random"])
def test_rows_of_a_ragged_budget_equal_each_row_alone(draw: Draw, text: str) -> None:
    budgets = (5, 17, 9)
    q, k, v = stream(draw, 3, 2, 70, 8)
    spec = Spec(3, 8, 8, dtype=torch.float64, row_ids=[10, 11, 12])
    together = parse(f"{text}@{':'.join(map(str, budgets))}").open(spec)
    out = together.step(q, k, v)
    for row, budget in enumerate(budgets):
        alone = opened(f"{text}@{budget}", 1, 8, row_ids=[10 + row])
        wanted = alone.step(q[row : row + 1], k[row : row + 1], v[row : row + 1])
        torch.testing.assert_close(out[row], wanted[0], rtol=1e-12, atol=1e-13)
        assert kept(together)[row] == kept(alone)[0]


def test_ragged_budgets_free_real_bytes() -> None:
    spec = Spec(2, 16, 16)
    ragged, level = parse("window@10:1000").open(spec), parse("window@1000").open(spec)
    assert level.nbytes - ragged.nbytes == 990 * (32 * 4 + 8)


def test_selecting_rows_of_a_ragged_state_gives_one_that_travels(draw: Draw) -> None:
    q, k, v = stream(draw, 3, 1, 40, dtype=torch.float32)
    state = parse("h2o(recent=2,sinks=0,block=8)@4:9:6").open(Spec(3, 4, 4))
    state.step(q, k, v)
    state.select_rows(torch.tensor([1, 1, 2, 0]))
    assert str(state.method) == "h2o(recent=2,sinks=0,block=8)@9:9:6:4"
    again = state.method.from_bytes(state.to_bytes())
    q, k, v = stream(draw, 4, 1, 24, dtype=torch.float32)
    assert torch.equal(state.step(q, k, v), again.step(q, k, v))
    assert state.held.tolist() == [9, 9, 6, 4]


# ---- dense prefill ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["window(prefill=dense)@20", "h2o(prefill=dense)@20", "h2o(prefill=dense)@20:30"])
def test_a_dense_prefill_keeps_everything_until_the_seal_and_its_budget_after(draw: Draw, text: str) -> None:
    state = parse(text).open(Spec(2, 4, 4))
    for _ in range(5):
        state.step(*stream(draw, 2, 1, 33, dtype=torch.float32))
    assert state.held.tolist() == [165, 165]
    state.seal()
    assert state.held.tolist() == state.budget.tolist()  # type: ignore[attr-defined]


def test_sealing_a_dense_prefill_gives_the_bytes_back(draw: Draw) -> None:
    dense, stream_ = parse("h2o(prefill=dense)@20").open(Spec(2, 4, 4)), parse("h2o@20").open(Spec(2, 4, 4))
    tokens = stream(draw, 2, 1, 300, dtype=torch.float32)
    dense.step(*tokens)
    stream_.step(*tokens)
    assert dense.nbytes > stream_.nbytes
    dense.seal()
    assert dense.nbytes == stream_.nbytes
    assert dense.peak_nbytes > dense.nbytes


def test_a_dense_prefill_is_answered_exactly(draw: Draw) -> None:
    q, k, v = stream(draw, 2, 2, 150, 8)
    close(opened("h2o(prefill=dense)@20", 2, 8).step(q, k, v), causal(q, k, v))


@pytest.mark.parametrize("prefill", ["stream", "dense"])
def test_a_seal_inside_a_block_ages_scores_by_queries_and_not_by_places(draw: Draw, prefill: str) -> None:
    """decay ** (queries since): 13 queries before the seal, 19 after, in one block of 32."""
    q, k, v = stream(draw, 1, 1, 32, 8)
    state = opened(f"h2o(score=decay,decay=0.7,sinks=0,recent=0,prefill={prefill})@40", 1, 8)
    state.step(*between((q, k, v), 0, 13))
    state.seal()
    state.step(*between((q, k, v), 13))
    weights = torch.softmax((q[0, 0] @ k[0].T).masked_fill(later(32), -torch.inf), -1)
    wanted = (0.7 ** torch.arange(31, -1, -1, dtype=torch.float64)) @ weights
    score = state.slots.column("score", None, 32)[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(score.double(), wanted, rtol=1e-5, atol=1e-7)


def test_sealing_twice_is_sealing_once(draw: Draw) -> None:
    state = parse("h2o(prefill=dense)@20").open(Spec(1, 4, 4))
    state.step(*stream(draw, 1, 1, 50, dtype=torch.float32))
    state.seal()
    before = state.to_bytes()
    state.seal()
    assert state.to_bytes() == before


# ---- pins ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["window(block=4)@12", "h2o(sinks=0,recent=2,block=4)@12", "random(block=1)@12:14"])
def test_pinned_tokens_never_leave(draw: Draw, text: str) -> None:
    state = parse(text).open(Spec(2, 4, 4))
    state.pin(3, 7)
    state.append(draw(2, 10, 4, dtype=torch.float32), draw(2, 10, 4, dtype=torch.float32))
    state.pin(9, 11)
    state.step(*stream(draw, 2, 1, 90, dtype=torch.float32))
    for positions in kept(state):
        assert {3, 4, 5, 6, 9, 10} <= set(positions)
    assert all(held <= budget + 3 for held, budget in zip(state.held.tolist(), state.budget.tolist(), strict=True))


def test_pins_that_do_not_fit_the_budget_are_refused_and_change_nothing() -> None:
    state = parse("sinks(2)@8").open(Spec(1, 4, 4))
    state.pin(0, 3)
    with pytest.raises(ValueError, match="6 pinned tokens, and needs at least 9"):
        state.pin(10, 13)
    assert state.pins.tolist() == [[[0, 3]]]


def test_a_span_that_has_left_already_cannot_be_pinned(draw: Draw) -> None:
    state = parse("window(block=1)@8").open(Spec(1, 4, 4))
    state.append(draw(1, 20, 4, dtype=torch.float32), draw(1, 20, 4, dtype=torch.float32))
    with pytest.raises(ValueError, match="have left already"):
        state.pin(3, 5)
    state.pin(13, 15)
    state.pin(100, 104)


# ---- what learns, what travels -----------------------------------------------------------------------------------


def test_attend_teaches_the_policy_and_read_does_not(draw: Draw) -> None:
    state = opened("h2o(sinks=0,recent=0,block=8)@8")
    k, v = draw(1, 8, 4), draw(1, 8, 4)
    state.append(k, v)
    q = draw(1, 1, 6, 4, scale=3.0)
    before = state.to_bytes()
    state.read(q[:, 0])
    assert state.to_bytes() == before
    state.attend(q)
    score = state.slots.column("score", None, 8)[0].double()
    torch.testing.assert_close(score, torch.softmax(q[0, 0] @ k[0].T, -1).sum(0), rtol=1e-6, atol=1e-7)


def test_attend_and_read_give_the_same_answer(draw: Draw) -> None:
    state = opened("h2o@16", rows=2)
    state.step(*stream(draw, 2, 3, 50))
    q = draw(2, 3, 5, 4)
    wanted = state.read(q.flatten(1, 2)).mean.view(2, 3, 5, 4)
    assert torch.equal(state.attend(q), wanted)


@pytest.mark.parametrize("text", ["window(block=4)@4", "h2o(block=4,sinks=0)@4", "random(block=4)@4"])
def test_an_evicted_value_is_no_longer_in_the_message(text: str, draw: Draw) -> None:
    state = parse(text).open(Spec(1, 4, 4))
    v = draw(1, 64, 4, dtype=torch.float32)
    state.step(draw(1, 1, 64, 4, dtype=torch.float32), draw(1, 64, 4, dtype=torch.float32), v)
    sent = state.to_bytes()
    stay = set(kept(state)[0])
    for position in range(64):
        assert (v[0, position].numpy().tobytes() in sent) == (position in stay)


def test_a_selector_under_a_policy_reads_only_what_it_chose(draw: Draw) -> None:
    q, k, v = draw(1, 3, 4), draw(1, 10, 4), draw(1, 10, 4)
    state = filled("window|top_k(k=3)@10", k, v)
    logits = q[0] @ k[0].T
    unread = logits < logits.topk(3).values[:, -1:]
    wanted = torch.softmax(logits.masked_fill(unread, -torch.inf), -1) @ v[0]
    torch.testing.assert_close(state.read(q).mean[0], wanted)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"policy": "window"}, TypeError, "policy must be a Policy"),
        ({"policy": Window(), "summary": None}, TypeError, "summary must be a Summary"),
        ({"policy": Window(), "selector": 3}, TypeError, "selector must be a Selector"),
        ({"policy": Window(), "block": 0}, ValueError, "block must be a whole number >= 1"),
        ({"policy": Window(), "block": 2.5}, ValueError, "block must be a whole number >= 1"),
        ({"policy": Window(), "prefill": "lazy"}, ValueError, "stream or dense"),
        ({"policy": Window(), "budget": 0}, ValueError, "budget must be a whole number >= 1"),
        ({"policy": Window(), "budget": 3.5}, ValueError, "budget must be a whole number >= 1"),
        ({"policy": Window(), "budget": (4, True)}, ValueError, "budget must be a whole number >= 1"),
        ({"policy": Sinks(4), "budget": (9, 4)}, ValueError, "a budget of 4 tokens is too small for sinks"),
    ],
)
def test_an_impossible_configuration_is_refused(arguments: dict, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Bounded(**arguments)


@pytest.mark.parametrize("budget", [None, "25%", "64MiB"])
def test_an_unresolved_budget_does_not_open(budget: str | None) -> None:
    with pytest.raises(ValueError, match="budget"):
        Bounded(Window(), budget=budget).open(Spec(1, 4, 4))


def test_as_many_budgets_as_rows_are_needed() -> None:
    with pytest.raises(ValueError, match="2 budgets were given for 3 rows"):
        parse("window@4:5").open(Spec(3, 4, 4))


def test_no_more_than_budget_and_block_slots_are_ever_allocated(draw: Draw) -> None:
    state = parse("h2o(block=8)@12").open(Spec(2, 4, 4))
    opened = state.slots.k.shape[0]
    for t in (1, 7, 100, 3):
        state.step(*stream(draw, 2, 1, t, dtype=torch.float32))
        assert state.slots.k.shape[0] == opened == 2 * 20


def test_scores_stay_exact_where_bfloat16_sums_would_stall(draw: Draw) -> None:
    """One token takes all the attention 300 times; a bfloat16 sum of ones stops at 256."""
    state = parse("h2o(sinks=0,recent=1,block=1)@2").open(Spec(1, 4, 4, dtype=torch.bfloat16))
    k = torch.full((1, 301, 4), -30.0, dtype=torch.bfloat16)
    k[0, 0] = 30.0
    q = torch.ones(1, 1, 301, 4, dtype=torch.bfloat16)
    state.step(q, k, torch.zeros(1, 301, 4, dtype=torch.bfloat16))
    assert state.slots.column("score", None, 2).max().item() == 301.0
    assert math.isfinite(state.read(q[:, 0, :1]).log_mass.item())


def test_a_summary_is_given_the_real_queries_and_zeros_for_pads(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    state = opened("window(block=4)+value_sum@8", rows=2)
    given: list[Tensor] = []
    monkeypatch.setattr(type(state.summary), "on_queries", lambda self, q: given.append(q.clone()))
    q, k, v = stream(draw, 2, 3, 4)
    state.step(q, k, v, torch.tensor([[True] * 4, [True, True, False, False]]))
    whole = torch.cat(given, 2)
    assert torch.equal(whole[0], q[0]) and torch.equal(whole[1, :, :2], q[1, :, :2])
    assert not whole[1, :, 2:].any()


def test_an_answer_is_spared_from_an_empty_prompt_on(draw: Draw) -> None:
    """The prompt's tokens, none here, may stay in the budget; the tokens of the answer stay beside it."""
    state = opened("snapkv(window=2,kernel=1,sinks=0,decode=keep)@4", d=4)
    state.seal()
    state.append(draw(1, 80, 4), draw(1, 80, 4))
    assert kept(state) == [list(range(80))]


@pytest.mark.parametrize("values", [2, 5, 1000])
def test_the_lowest_priorities_leave_and_of_equal_ones_the_oldest(values: int) -> None:
    draw = torch.Generator().manual_seed(values)
    priority = torch.randint(0, values, (6, 40), generator=draw).double()
    position = torch.stack([torch.randperm(900, generator=draw)[:40] for _ in range(6)])
    count = torch.tensor([1, 7, 40, 3, 12, 39])
    lowest = _lowest(priority, position, count)
    for row in range(6):
        order = sorted(range(40), key=lambda i: (float(priority[row, i]), int(position[row, i])))
        assert set(lowest[row].nonzero().flatten().tolist()) == set(order[: int(count[row])])
