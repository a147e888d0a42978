"""SnapKV: the last prompt queries vote, once, where the prompt ends; against plain loops and wrong lines of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.policy import Held, Queries
from kvfloor.methods.policies.observation import LastQueries, Observation
from tests.literal import Rule, Token, keeps_alike, run
from tests.support import Draw, fed, opened, positions, stream, wrong

SMALL = {"window": 5, "kernel": 3}


class Snap(Rule):
    def __init__(self, policy: Observation, scale: float = 0.5) -> None:
        super().__init__(scale, policy.sinks)
        self.policy, self.asked = policy, []

    def ask(self, held: list[Token], position: int, q: Tensor) -> None:
        self.asked.append((position, q))

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        window = self.recent = min(self.policy.window, budget // 2)
        g = len(self.asked[0][1]) if self.asked else 1
        votes = {token.position: [0.0] * g for token in held}
        for position, q in self.asked[-window:]:
            sees = [token for token in held if token.position <= position]
            for head, weights in enumerate(self.weights(sees, q).tolist()):
                for token, weight in zip(sees, weights, strict=True):
                    votes[token.position][head] += weight
        worth = []
        for token in held:
            near = range(token.position - self.policy.kernel // 2, token.position + self.policy.kernel // 2 + 1)
            around = [votes[p] for p in near if p in votes and p < seen - window] or [votes[token.position]]
            heads = [
                max(x) if self.policy.pool == "max" else sum(x) / self.policy.kernel for x in zip(*around, strict=True)
            ]
            worth.append(sum(heads) / g)
        return worth


def agrees(policy: Observation, draw: Draw, n: int = 60, prompt: int = 53, budget: Any = 16, block: int = 4) -> bool:
    tokens = draw(2, 3, n, 8, scale=2.0), draw(2, n, 8), draw(2, n, 8)
    spares = "answer" if policy.decode == "keep" else "nothing"
    return keeps_alike(
        policy, lambda row, b: Snap(policy), tokens, budget, block, prompt, spares=spares, prefill="dense"
    )


@pytest.mark.parametrize("decode", ["keep", "evict"])
@pytest.mark.parametrize(
    ("pool", "kernel", "sinks"), [("max", 1, 0), ("max", 3, 2), ("max", 7, 0), ("avg", 3, 0), ("avg", 7, 2)]
)
def test_what_is_kept_equals_the_papers_rule(draw: Draw, pool: Any, kernel: int, decode: Any, sinks: int) -> None:
    assert agrees(Observation(window=5, kernel=kernel, pool=pool, decode=decode, sinks=sinks), draw)


@pytest.mark.parametrize("decode", ["keep", "evict"])
def test_a_budget_per_row_and_a_window_wider_than_half_of_it(draw: Draw, decode: Any) -> None:
    assert agrees(Observation(window=10, kernel=3, decode=decode), draw, budget=(8, 23))


@pytest.mark.parametrize("prompt", [17, 31, 32, 53])
@pytest.mark.parametrize("cuts", [(), (1, 2, 30), tuple(range(1, 60))])
def test_neither_cuts_nor_blocks_matter_where_the_prompt_ends(draw: Draw, prompt: int, cuts: tuple[int, ...]) -> None:
    tokens = stream(draw, 1, 2, 60, 8)
    whole = positions(run(Observation(**SMALL), 12, *tokens, block=32, prompt=prompt))
    for block in (1, 8, 64):
        assert positions(run(Observation(**SMALL), 12, *tokens, block=block, prompt=prompt, cuts=cuts)) == whole


# ---- wrong lines -----------------------------------------------------------------------------------------------


def first_queries(self: Observation, held: Held, queries: Queries) -> dict[str, Tensor]:
    if int(held.memory.position.min()) < 0:
        Observation.on_queries(self, held, queries)
    return {}


WRONG = {
    "what the window's own tokens got spills over onto those beside them": wrong(
        Observation, _pooled=lambda self, votes, held, stop: Observation._pooled(self, votes, held, held.seen)
    ),
    "the group is averaged first and pooled then": wrong(
        Observation,
        _pooled=lambda self, votes, held, stop: Observation._pooled(self, votes.mean(1, keepdim=True), held, stop),
    ),
    "the window's queries see the tokens after them": wrong(
        Observation, _votes=lambda self, q, at, held: Observation._votes(self, q, at.clamp_min(1 << 20), held)
    ),
    "the first queries vote, not the last": wrong(Observation, on_queries=first_queries),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_line_is_rejected(draw: Draw, mutant: str) -> None:
    assert not agrees(WRONG[mutant](window=5, kernel=7), draw, n=53)


def test_pooling_over_slots_instead_of_positions_is_rejected(draw: Draw) -> None:
    """Tokens move in the arena once some have left, so the two differ from the answer's first block on."""

    def pooled(self: Observation, votes: Tensor, held: Held, stop: Tensor) -> Tensor:
        return torch.nn.functional.max_pool1d(votes, self.kernel, 1, self.kernel // 2)

    assert agrees(Observation(**SMALL, decode="evict"), draw)
    assert not agrees(wrong(Observation, _pooled=pooled)(**SMALL, decode="evict"), draw)


@pytest.mark.parametrize(("pool", "law"), [("avg", "avg_pool1d"), ("max", "max_pool1d")])
def test_a_dense_prompt_is_pooled_as_in_the_papers_code(draw: Draw, pool: Any, law: str) -> None:
    """Over slots in order, with zeros around, where every token before the window is held."""
    policy = Observation(window=5, kernel=7, pool=pool)
    q, k, v = draw(2, 3, 40, 8), draw(2, 40, 8), draw(2, 40, 8)
    state = run(policy, 16, q, k, v, block=64, prefill="dense")
    held, votes = state._held(None, 40), draw(2, 3, 40).abs()
    found = policy._pooled(votes, held, held.seen - 5)[..., :35]
    wanted = getattr(torch.nn.functional, law)(votes[..., :35], 7, 1, 3)
    torch.testing.assert_close(found, wanted)


# ---- the edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["snapkv@64", "snapkv(window=100)@64", "snapkv(window=5,kernel=1,pool=avg)@64"])
@pytest.mark.parametrize("prompt", [1, 3, 31, 64])
def test_a_prompt_within_the_budget_stays_whole(draw: Draw, text: str, prompt: int) -> None:
    state = opened(text, rows=2)
    state.step(*stream(draw, 2, 2, prompt))
    state.seal()
    assert positions(state) == [list(range(prompt))] * 2


def test_a_window_longer_than_the_prompt_lets_every_query_vote(draw: Draw) -> None:
    assert agrees(Observation(window=100, kernel=3), draw, n=20, prompt=20, budget=12)


def test_no_query_means_no_vote_and_the_newest_tokens_stay(draw: Draw) -> None:
    state = run(Observation(**SMALL), 12, None, draw(1, 40, 4), draw(1, 40, 4), prompt=40)
    assert positions(state) == [list(range(28, 40))]


def test_what_comes_after_the_prompt_stays_unless_it_is_asked_to_leave(draw: Draw) -> None:
    tokens = stream(draw, 1, 1, 140)
    kept = positions(run(Observation(**SMALL), 12, *tokens, block=8, prompt=40))[0]
    assert kept[12:] == list(range(40, 140)) and len(kept) == 112
    evicting = run(Observation(**SMALL, decode="evict"), 12, *tokens, block=8, prompt=40)
    assert evicting.held.tolist() == [12 + 140 % 8]


def test_the_window_stays_and_so_do_the_best_voted(draw: Draw) -> None:
    """One token that all the last queries point at, far back, keeps its neighbours with it."""
    k = draw(1, 64, 8, scale=0.1)
    q = torch.zeros(1, 1, 64, 8, dtype=torch.float64)
    k[0, 20, 0], q[0, 0, -4:, 0] = 5.0, 5.0
    kept = positions(run(Observation(window=4, kernel=3), 8, q, k, k, prompt=64))[0]
    assert {19, 20, 21, 60, 61, 62, 63} <= set(kept)


def test_padded_rows_vote_as_they_would_alone(draw: Draw) -> None:
    q, k, v = stream(draw, 2, 2, 50)
    present = torch.ones(2, 50, dtype=torch.bool)
    present[0, :17] = False
    state = opened("snapkv(window=5,kernel=3)@12", rows=2)
    fed(state, (q, k, v), 30, present=present)
    state.seal()
    alone = run(Observation(**SMALL), 12, q[:1, :, 17:], k[:1, 17:], v[:1, 17:], scale=1.0, block=32, prompt=33)
    assert positions(state)[0] == positions(alone)[0]


def test_a_streamed_prefill_never_holds_more_than_budget_and_block(draw: Draw) -> None:
    """Chunk by chunk the last queries so far decide; at the seal the prompt has its budget, and then it grows."""
    state = opened("snapkv(window=5,kernel=3,prefill=stream,block=8)@12")
    for _ in range(30):
        state.step(*stream(draw, 1, 2, 3))
        assert int(state.held) < 12 + 8
    state.seal()
    assert state.held.tolist() == [12] and set(range(85, 90)) <= set(positions(state)[0])
    state.step(*stream(draw, 1, 2, 50))
    assert state.held.tolist() == [62]


def test_memory_is_told_as_it_is() -> None:
    kept, evicting = parse("snapkv@64"), parse("snapkv(decode=evict)@64")
    assert kept.capacity(10**6, prompt=100) is None and not kept.traits.constant_memory
    assert evicting.capacity(10**6, prompt=100) == 100 and evicting.capacity(10**6, prompt=10) == 64 + 31
    assert parse("snapkv(decode=evict,prefill=stream)@64").traits.constant_memory
    for text in ("snapkv@64MiB", "snapkv(prefill=stream)@1GiB"):
        with pytest.raises(ValueError, match=r"keeps every token after the prompt .* cannot bound its bytes"):
            parse(text)
    parse("snapkv(decode=evict)@64MiB")


def test_the_seal_gives_back_the_queries_and_the_room(draw: Draw) -> None:
    state, window = opened("snapkv(window=5)@12", rows=2), opened("window@12", rows=2)
    state.step(*stream(draw, 2, 2, 300))
    before = state.nbytes
    state.seal()
    assert state.nbytes < before
    assert state.nbytes - window.nbytes == 2 * 8 + 2 * 8  # the prompt's length per row; the policy's two settings
    again = state.method.from_bytes(state.to_bytes())
    assert again.to_bytes() == state.to_bytes()


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiles_of_any_size_give_the_same_tokens(draw: Draw, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    tokens = stream(draw, 2, 3, 90, 8)
    whole = positions(run(Observation(**SMALL), 12, *tokens, prompt=90))
    monkeypatch.setattr("kvfloor.core.tiles.TILE_SLOTS", tile)
    assert positions(run(Observation(**SMALL), 12, *tokens, prompt=90)) == whole


@given(st.data())
def test_the_last_queries_are_the_last_that_were_asked(data: st.DataObject) -> None:
    window, rows, block = data.draw(st.integers(1, 6)), 2, data.draw(st.integers(1, 5))
    memory = LastQueries(Spec(rows, 1, 1), window, for_good=True)
    memory.group(1)
    asked: list[list[int]] = [[], []]
    for start in range(0, block * data.draw(st.integers(0, 6)), block):
        index = data.draw(st.sampled_from([[0], [1], [0, 1]]))
        position = torch.arange(start, start + block).repeat(len(index), 1)
        flags = st.lists(st.booleans(), min_size=block, max_size=block)
        made = torch.tensor([data.draw(flags) for _ in index])
        memory.take(
            None if len(index) == rows else torch.tensor(index),
            Queries(position[:, None, :, None] + 0.0, made, position, given=made),
        )
        for row, flags_ in zip(index, made.tolist(), strict=True):
            asked[row] += [start + j for j, flag in enumerate(flags_) if flag]
    for row in range(rows):
        wanted = ([-1] * window + asked[row])[-window:]
        assert memory.position[row].tolist() == wanted
        assert memory.q is not None
        assert [int(x) for x in memory.q[row, 0, :, 0]][window - min(window, len(asked[row])) :] == [
            p for p in wanted if p >= 0
        ]
