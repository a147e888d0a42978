"""RaaS: the page that no query has needed for longest leaves, against plain loops and wrong lines of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.core.policy import Held, Queries
from kvfloor.methods.policies.milestones import Milestones
from tests.literal import Rule, Token, keeps_alike, kept_by, run
from tests.support import Draw, Stream, opened, positions, stream, wrong


class Raas(Rule):
    def __init__(self, policy: Milestones, scale: float = 0.5, softcap: float | None = None) -> None:
        super().__init__(scale, policy.sinks)
        self.policy, self.softcap = policy, softcap

    def page(self, position: int) -> tuple[int, int]:
        """(1 for the answer, 0 for the prompt; which page of it)."""
        start = self.prompt if self.policy.prompt == "keep" else 0
        return (0, position // self.policy.page) if position < start else (1, (position - start) // self.policy.page)

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        if self.policy.prompt == "keep" and not self.prompt:
            return
        pages: dict[tuple[int, int], list[Token]] = {}
        for token in held:
            pages.setdefault(self.page(token.position), []).append(token)
        estimate = dict.fromkeys(pages, 0.0)
        for head in q:
            bounds = {}
            for name, tokens in pages.items():
                low, high = torch.stack([t.k for t in tokens]).aminmax(dim=0)
                bound = self.scale * sum(
                    max(float(x * a), float(x * b)) for x, a, b in zip(head, low, high, strict=True)
                )
                bounds[name] = bound if self.softcap is None else self.softcap * math.tanh(bound / self.softcap)
            total = sum(math.exp(b) for b in bounds.values())
            for name, bound in bounds.items():
                estimate[name] = max(estimate[name], math.exp(bound) / total)
        if self.policy.top is None:
            needed = [name for name in pages if estimate[name] > self.policy.alpha]
        else:
            needed = sorted(pages, key=estimate.__getitem__)[-math.ceil(len(pages) * self.policy.top) :]
        for name in needed:
            for token in pages[name]:
                token.marks["needed"] = position

    def worth(self, held: list[Token], seen: int, budget: int) -> list[Any]:
        time: dict[tuple[int, int], int] = {}
        for token in held:
            name = self.page(token.position)
            time[name] = max(time.get(name, 0), token.position, token.marks.get("needed", 0))
        return [(time[self.page(token.position)], self.page(token.position)) for token in held]

    def safe(self, token: Token, seen: int) -> bool:
        return token.position < self.sinks or self.page(token.position) == self.page(seen - 1)


def tokens(draw: Draw, n: int = 90, g: int = 2) -> Stream:
    return draw(2, g, n, 6, scale=2.0), draw(2, n, 6), draw(2, n, 6)


def agrees(
    policy: Milestones, draw: Draw, budget: Any = 14, block: int = 1, prompt: int | None = 21, g: int = 2
) -> bool:
    keeps = policy.prompt == "keep"
    prompt, spares = (prompt, "prompt") if keeps else (None, "nothing")
    return keeps_alike(policy, lambda row, b: Raas(policy), tokens(draw, g=g), budget, block, prompt, spares)


SMALL = Milestones(page=4, alpha=0.1, sinks=2)


@pytest.mark.parametrize("prompt", ["keep", "evict"])
@pytest.mark.parametrize(
    ("needed", "block"),
    [({"alpha": 0.1}, 1), ({"alpha": 0.4}, 3), ({"alpha": 0.003}, 9), ({"top": 0.5}, 9), ({"top": 0.2}, 1)],
    ids=str,
)
def test_what_is_kept_equals_the_papers_rule(draw: Draw, block: int, prompt: Any, needed: dict[str, float]) -> None:
    assert agrees(replace(SMALL, prompt=prompt, **needed), draw, block=block)


@pytest.mark.parametrize("prompt", [1, 3, 20, 24])
@pytest.mark.parametrize("g", [1, 3])
def test_a_prompt_of_any_length_and_a_budget_per_row(draw: Draw, prompt: int, g: int) -> None:
    assert agrees(SMALL, draw, budget=(11, 23), block=5, prompt=prompt, g=g)


@pytest.mark.parametrize("page", [1, 5, 16])
def test_pages_of_any_length(draw: Draw, page: int) -> None:
    assert agrees(replace(SMALL, page=page), draw, budget=20, block=7)


def test_a_soft_cap_bounds_the_estimate_too(draw: Draw) -> None:
    q, k, v = tokens(draw)
    policy = replace(SMALL, prompt="evict")
    state = opened("raas(page=4,alpha=0.1,sinks=2,prompt=evict,block=3)@14", 2, 6, scale=0.5, softcap=1.5)
    state.step(q, k, v)
    wanted = [kept_by(Raas(policy, softcap=1.5), 14, q[row], k[row], v[row], 3) for row in range(2)]
    assert positions(state) == wanted


# ---- wrong lines -----------------------------------------------------------------------------------------------


def mean_of_group(self: Milestones, held: Held, queries: Queries, *pages: Tensor) -> Tensor:
    heads = [replace(queries, q=queries.q[:, h : h + 1]) for h in range(queries.q.shape[1])]
    return torch.stack([Milestones._estimate(self, held, head, *pages) for head in heads]).mean(0)


def high_only(self: Milestones, held: Held, queries: Queries, *pages: Tensor) -> Tensor:
    return Milestones._estimate(self, held, replace(queries, q=queries.q.clamp_min(0)), *pages)


def whole_page(self: Milestones, held: Held, queries: Queries) -> tuple[Tensor, Tensor]:
    last = queries.position + self.page - 1 - (queries.position - self._start(held)) % self.page
    return Milestones._filling(self, held, replace(queries, position=last))


def newest_ties_leave(self: Milestones, held: Held) -> Tensor:
    index, _, _ = self._held_pages(held)
    return Milestones.priority(self, held) - 2 * index


def filling_page_leaves(self: Milestones, held: Held) -> Tensor:
    index, pages, _ = self._held_pages(held)
    stamp = held.columns["stamp"].to(torch.int64)
    return torch.zeros_like(pages).scatter_reduce(1, index, stamp, "amax").gather(1, index) * 1000.0 + index


WRONG = {
    "the group's mean estimate counts, not its largest": {"_estimate": mean_of_group},
    "a negative query entry is bounded by the largest key entry": {"_estimate": high_only},
    "nothing is ever needed: first in, first out": {
        "_needed": lambda self, estimate, pages, own: torch.zeros_like(estimate, dtype=torch.bool)
    },
    "pages are counted from the stream's start, one of them half prompt": {
        "_start": lambda self, held: torch.zeros_like(held.seen)
    },
    "among pages needed last at the same time the newer one leaves": {"priority": newest_ties_leave},
    "the page that is being filled is one like any other": {
        "priority": filling_page_leaves,
        "protected": lambda self, held, last: held.position < self.sinks,
    },
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_line_is_rejected(draw: Draw, mutant: str) -> None:
    assert not agrees(wrong(Milestones, **WRONG[mutant])(page=4, alpha=0.1, sinks=2), draw, block=9)


@pytest.mark.parametrize(("policy", "survivor"), [(Milestones, 8), (wrong(Milestones, _filling=whole_page), 16)])
def test_keys_after_a_query_do_not_count_in_its_own_page(policy: type[Milestones], survivor: int) -> None:
    """Query 20 needs the page of token 9; token 21, in the query's page, would outweigh it.

    The wrong line bounds a query's own page by keys that came after the query.
    """
    k = torch.zeros(1, 32, 4, dtype=torch.float64)
    k[0, 9, 0], k[0, 21, 0] = 8.0, 20.0
    q = torch.zeros(1, 1, 32, 4, dtype=torch.float64)
    q[0, 0, 20, 0] = 4.0
    kept = positions(run(policy(page=4, alpha=0.5, sinks=0, prompt="evict"), 16, q, k, k, block=4))[0]
    assert kept == [*range(survivor, survivor + 4), *range(20, 32)]


# ---- what is promised ------------------------------------------------------------------------------------------


def test_the_prompt_never_leaves_and_the_answer_has_its_budget(draw: Draw) -> None:
    state = opened("raas(page=4,block=4)@24", rows=2)
    method = state.method
    state.step(*stream(draw, 2, 1, 70))
    assert state.held.tolist() == [70, 70] and method.capacity(70) == 70
    state.seal()
    room = state.slots.k.shape[0]
    for i in range(60):
        state.step(*stream(draw, 2, 1, 1))
        seen = 71 + i
        assert max(state.held.tolist()) <= method.capacity(seen, prompt=70) <= 70 + 24 + 3
        for kept in positions(state):
            assert kept[:70] == list(range(70))
            filling = 70 + (seen - 71) // 4 * 4
            assert set(range(filling, seen)) <= set(kept)
    assert state.held.tolist() == [96, 96] and state.slots.k.shape[0] == room == 2 * (70 + 24 + 4)


def test_prompts_of_different_length_each_keep_their_own(draw: Draw) -> None:
    q, k, v = stream(draw, 2, 1, 80)
    present = torch.ones(2, 80, dtype=torch.bool)
    present[0, :25] = False
    state = opened("raas(page=4,sinks=0,block=4)@8", rows=2)
    state.step(q[:, :, :40], k[:, :40], v[:, :40], present[:, :40])
    state.seal()
    state.step(q[:, :, 40:], k[:, 40:], v[:, 40:])
    assert state.held.tolist() == [15 + 8 + 55 % 4, 40 + 8]
    alone = run(Milestones(page=4, sinks=0), 8, q[:1, :, 25:], k[:1, 25:], v[:1, 25:], scale=1.0, block=4, prompt=15)
    assert positions(state)[0] == positions(alone)[0]


def test_a_needed_page_outlives_newer_ones(draw: Draw) -> None:
    """Every tenth query returns to one milestone; the pages around it are forgotten."""
    k = torch.zeros(1, 200, 4, dtype=torch.float64)
    k[..., 1] = 1.0
    k[0, 33, 0] = 8.0
    q = torch.zeros(1, 1, 200, 4, dtype=torch.float64)
    q[0, 0, 40::10, 0] = 4.0
    policy = Milestones(page=4, alpha=0.5, sinks=0, prompt="evict")
    kept = positions(run(policy, 24, q, k, k))[0]
    assert {32, 33, 34, 35} <= set(kept) and not set(range(36, 160)) & set(kept)


@pytest.mark.parametrize("alpha", [1e-12, 1.0])
def test_a_useless_alpha_makes_it_first_in_first_out(draw: Draw, alpha: float) -> None:
    """Too small: all pages are needed all the time, and age decides. Too large: none ever is."""
    q, k, v = tokens(draw, n=60)
    kept = positions(run(Milestones(page=4, alpha=alpha, sinks=0, prompt="evict"), 16, q, k, v, block=4))
    assert kept == [list(range(44, 60))] * 2


def test_without_a_query_the_oldest_page_leaves(draw: Draw) -> None:
    _, k, v = tokens(draw, n=60)
    kept = positions(run(Milestones(page=4, sinks=4, prompt="evict"), 16, None, k, v, block=4))
    assert kept == [[0, 1, 2, 3, *range(48, 60)]] * 2


def test_memory_and_configuration_are_told_as_they_are() -> None:
    method = parse("raas@64")
    assert str(method) == "raas@64" and str(parse("raas(prefill=dense)@64")) == "raas@64"
    assert str(parse("raas(prompt=evict)@64")) == "raas(prompt=evict)@64"
    assert method.capacity(5000, prompt=300) == 300 + 64 + 31 and method.capacity(5000) == 5000
    assert not method.traits.constant_memory and parse("raas(prompt=evict)@64").traits.constant_memory
    with pytest.raises(ValueError, match="keeps the whole prompt, so its prefill is dense, not stream"):
        parse("raas(prefill=stream)@64")
    with pytest.raises(ValueError, match=r"keeps the whole prompt beside its budget, so '@64MiB' cannot bound"):
        parse("raas@64MiB")
    parse("raas(prompt=evict)@64MiB")
    with pytest.raises(ValueError, match=r"too small for raas: it protects 4 first, 16 newest .* at least 21"):
        parse("raas@20")
