"""Candidates that were tried, against plain loops in float64; and the table of what was kept and dropped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import torch
from torch import Tensor

from characterize.frontier import read
from characterize.lib.candidates import ChunkVotes, LagRelative, has_scores, save_scores
from characterize.newer_evictors import FIELDS, MODULE, SOURCE, Trial, TriedFigures, received, table
from kvfloor.hf.recording import Recorded
from tests.support import Draw, opened, positions, stream

Tokens = tuple[Tensor, Tensor, Tensor]


def sealed(text: str, tokens: Tokens, **spec) -> list[list[int]]:
    """The positions that each row holds once the prompt has ended."""
    state = opened(f"{MODULE}{text}", rows=len(tokens[1]), d=tokens[1].shape[2], **spec)
    state.step(*tokens)
    state.seal()
    return [sorted(row) for row in positions(state)]


def lag_scores(x: list[list[float]], lag: int, sinks: int) -> dict[int, float]:
    """LagKV's score of one row's keys or values, by position."""
    found = {}
    for start in range(sinks, len(x) - 2 * lag + 1, lag):
        after = list(zip(*x[start + lag : start + 2 * lag], strict=True))
        spread = []
        for token in x[start : start + lag]:
            scaled = [(c - min(of)) / (max(of) - min(of)) for c, of in zip(token, after, strict=True)]
            spread.append(math.exp(stdev(scaled)))
        found |= {start + i: one / sum(spread) for i, one in enumerate(spread)}
    return found


def lag_kept(k: Tensor, v: Tensor, budget: int, lag: int, sinks: int) -> list[int]:
    keys, values = lag_scores(k.tolist(), lag, sinks), lag_scores(v.tolist(), lag, sinks)
    score = {p: keys[p] + values[p] for p in keys}
    rank = {p: sum(score[p] > score[o] for o in score if (o - sinks) // lag == (p - sinks) // lag) for p in score}
    first = sorted(score, key=lambda p: (rank[p], p))[: len(k) - budget]
    return sorted(set(range(len(k))) - set(first))


def test_lag_relative_keeps_what_the_paper_keeps(draw: Draw) -> None:
    tokens = stream(draw, 2, 2, 45, 6)
    found = sealed("LagRelative(sinks=2,recent=0,lag=8,block=4)@29", tokens)
    assert found == [lag_kept(k, v, 29, 8, 2) for k, v in zip(tokens[1], tokens[2], strict=True)]


def test_a_lag_that_is_compared_with_its_own_partition_is_told(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LagRelative._scores
    monkeypatch.setattr(LagRelative, "_scores", lambda self, x, inside: right(self, x, inside.roll(8, 1)))
    with pytest.raises(AssertionError):
        test_lag_relative_keeps_what_the_paper_keeps(draw)


def chunk_kept(q: Tensor, k: Tensor, budget: int, window: int, chunk: int) -> list[int]:
    n = len(k)
    votes = torch.zeros(n, dtype=torch.float64)
    for i in range(n - window, n):
        for head in q:
            votes[: i + 1] += torch.softmax(k[: i + 1] @ head[i], 0)
    votes[n - window :] = 0
    score = [float(votes[p // chunk * chunk : (p // chunk + 1) * chunk].sum()) for p in range(n)]
    first = sorted(range(n - window), key=lambda p: (round(score[p], 12), p))[: n - budget]
    return sorted(set(range(n)) - set(first))


def test_chunks_stay_or_leave_whole(draw: Draw) -> None:
    tokens = stream(draw, 2, 2, 43, 6)
    found = sealed("ChunkVotes(window=3,chunk=5,block=4)@18", tokens)
    assert found == [chunk_kept(q, k, 18, 3, 5) for q, k in zip(tokens[0], tokens[1], strict=True)]
    assert all(sum(p // 5 == c for p in row) in (0, 5) for row in found for c in range(8))


def test_single_votes_are_told_from_those_of_chunks(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkVotes, "_pooled", lambda self, votes, held, stop: votes)
    with pytest.raises(AssertionError):
        test_chunks_stay_or_leave_whole(draw)


def test_values_go_to_the_next_kept_tokens(draw: Draw) -> None:
    """Without votes beyond the mean, every evicted value arrives in full, shared by the m kept tokens after it."""
    k = torch.zeros(1, 24, 4, dtype=torch.float64)
    q, v = torch.zeros(1, 1, 24, 4, dtype=torch.float64), draw(1, 24, 4)
    state = opened(f"{MODULE}MergedValues(window=4,kernel=1,m=2,block=4)@12")
    state.step(q, k, v)
    state.seal()
    wanted = v[0].clone()
    for gone in range(12):  # equal votes: the oldest leave, and the next two kept tokens are 12 and 13
        wanted[12:14] += v[0, gone] / 2
    view = state.slots.view()
    order = view.position[0].argsort()
    torch.testing.assert_close(view.v[0, order], wanted[12:])


def test_scores_of_a_file_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    score = torch.arange(20.0).flip(0).repeat(2, 1)
    score[1, 17] = 100.0
    assert not has_scores("made_up")
    save_scores("made_up", {"3": score})
    assert has_scores("made_up")
    found = sealed("Reread(sinks=1,recent=2,scores=made_up,block=4)@6", stream(draw, 2, 1, 20), places=((3, 0), (3, 1)))
    assert found == [[0, 1, 2, 3, 18, 19], [0, 1, 2, 17, 18, 19]]


def test_attention_received_later_is_that_of_plain_softmax(draw: Draw) -> None:
    q, k, context = draw(1, 4, 30, 6, dtype=torch.float32), draw(1, 2, 30, 6, dtype=torch.float32), 12
    most, total = received(Recorded(q, k, k, 0.4, None, 30), context)
    for head in range(2):
        weights = [
            torch.softmax(0.4 * k[0, head, : i + 1].double() @ q[0, h, i].double(), 0)[:context]
            for h in (2 * head, 2 * head + 1)
            for i in range(context, 30)
        ]
        torch.testing.assert_close(most[head].double(), torch.stack(weights).amax(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(total[head].double(), torch.stack(weights).sum(0), rtol=1e-5, atol=1e-6)


def test_a_row_has_its_difference_and_its_place_on_the_frontier() -> None:
    def figures(share: float, kl: float) -> TriedFigures:
        return TriedFigures(share, ((kl, 3 * kl) * 256,) * 2, ((1, 0) * 256,) * 2)

    least = min(point.share for point in read(SOURCE)[0])
    found = {
        "snapkv@25%": figures(least / 2, 0.2),
        "?Better@25%": figures(least / 2, 0.1),
        "worse@9": figures(1.0, 1.0),
    }
    trials = (Trial("a", "snapkv@25%"), Trial("b", "?Better@25%", "snapkv@25%"), Trial("c", "worse@9", "snapkv@25%"))
    rows = [dict(zip(FIELDS, row, strict=True)) for row in table(found, trials)]
    assert [row["frontier"] for row in rows] == ["", "yes", ""]
    cheating = table(found, (trials[0], replace(trials[1], cheats=True), trials[2]))
    assert [row[-1] for row in cheating] == ["yes", "", ""]
    assert [row["kl"] for row in rows] == pytest.approx([0.4, 0.2, 2.0])
    assert rows[0]["more"] == "" and rows[1]["more"] == pytest.approx(-0.2) and rows[2]["more"] == pytest.approx(1.6)
    assert [row["same_top"] for row in rows] == [0.5] * 3 and rows[1]["setting"] == "Better@25%"
