"""A stream cut in two: what each later query sees, and the floor of the built-in model's own heads."""

import pytest
import torch

from kvfloor import models, parse
from kvfloor.audit.measure import Bench
from kvfloor.audit.plan import task_work
from kvfloor.floors.measured import causal_mass, longest_query, readable_after, readable_within
from kvfloor.game.measured import play
from kvfloor.hf import prepare
from tests.floors.measured import read_oracle

CONTEXT = 160


@pytest.fixture(scope="module")
def traces():
    """What every layer of the built-in model saw of four samples."""
    model, tokenizer = models.load()
    bench = Bench(prepare(model), tokenizer, seed=0)
    return bench.prepare(task_work(["kv"], [CONTEXT], ["after"], 32, 0, bench.count)[0]).traces


def test_each_query_sees_its_own_token_and_those_before_it(draw):
    g, t, d = 3, 5, 4
    q, k, present = draw(g, t, d), draw(t, d), torch.tensor([False, True, True, False, True])
    found = causal_mass(q, k, scale=0.5, softcap=2.0, present=present).view(g, t)
    for head in range(g):
        for i in range(t):
            seen = (k[: i + 1][present[: i + 1]] @ q[head, i]) * 0.5
            wanted = torch.logsumexp(2.0 * torch.tanh(seen / 2.0), 0) if len(seen) else torch.tensor(-torch.inf)
            assert float(found[head, i]) == pytest.approx(float(wanted), abs=1e-12)


def test_weights_are_those_of_attention_over_the_whole_stream(draw):
    q, k, cut = draw(2, 3, 30, 6), draw(2, 30, 6), 20
    present = torch.rand(2, 30) > 0.2
    for row, found in enumerate(readable_after(q, k, cut, present=present, scale=0.8, eta=0.02, dv=8)):
        logits = 0.8 * torch.einsum("gid,jd->gij", q[row], k[row])
        hidden = torch.ones(30, 30, dtype=torch.bool).triu(1) | ~present[row]
        seen = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1)[:, cut:].reshape(30, 30)
        assert found.groups > 0
        for g in range(found.groups):
            mine = seen[found.asked[g], found.stream]
            assert float(found.weights[g]) == pytest.approx(float(mine[found.group == g].sum()), rel=1e-9)
            assert float(found.leaks[g]) == pytest.approx(float(mine[found.group > g].sum()), rel=1e-9, abs=1e-12)


def test_a_sink_takes_its_share_of_every_weight(draw):
    q, k, cut, sink = draw(2, 3, 30, 6), draw(2, 30, 6), 20, draw(2, 3) * 2.0
    for row, found in enumerate(readable_after(q, k, cut, sink=sink, scale=0.8, eta=0.02, dv=8)):
        logits = 0.8 * torch.einsum("gid,jd->gij", q[row], k[row])
        logits = logits.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf)
        with_sink = torch.cat([logits, sink[row].view(3, 1, 1).expand(3, 30, 1)], -1)
        seen = torch.softmax(with_sink, -1)[:, cut:, :-1].reshape(30, 30)
        for g in range(found.groups):
            mine = seen[found.asked[g], found.stream]
            assert float(found.weights[g]) == pytest.approx(float(mine[found.group == g].sum()), rel=1e-9)
            assert float(found.leaks[g]) == pytest.approx(float(mine[found.group > g].sum()), rel=1e-9, abs=1e-12)
        assert found.groups > 0 and play(parse("exact"), found, k[row]).decoded == 1.0
    nothing = readable_after(q, k, cut, sink=torch.full((2, 3), 40.0), scale=0.8, eta=0.02, dv=8)
    assert [found.bits for found in nothing] == [0.0, 0.0]


def test_the_longest_query_is_among_real_tokens(draw):
    q, present = draw(2, 3, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    q[0, 1, 2] *= 100.0
    present[0, 2] = False
    lengths = longest_query(q, present)
    assert float(lengths[0]) == float(q[0][:, present[0]].norm(dim=-1).max())
    assert float(lengths[1]) == float(q[1].norm(dim=-1).max())


@pytest.mark.parametrize(("cut", "q_tokens"), [(0, 30), (30, 30), (10, 29)])
def test_refusals_name_the_argument(draw, cut, q_tokens):
    with pytest.raises(ValueError, match=r"cut must|q must be"):
        readable_after(draw(1, 2, q_tokens, 4), draw(1, 30, 4), cut, eta=0.1, dv=4)


def test_heads_of_the_built_in_model_hold_survive_and_are_answered(traces):
    for trace in traces:
        cut = trace.k.shape[1] - trace.asked
        two = slice(0, 2)
        rows = readable_after(
            trace.q[two], trace.k[two], cut, present=trace.present[two], scale=trace.scale, eta=0.05, dv=64
        )
        for found, k in zip(rows, trace.k, strict=False):
            assert read_oracle.holds(found, k) and read_oracle.survives(found, k)
            exact = play(parse("exact"), found, k)
            assert exact.answered == exact.decoded == 1.0
            assert found.bits <= exact.hidden_bits <= 8 * exact.message_bytes


def test_a_window_that_forgets_what_a_head_reads_does_not_answer(traces):
    """The heads that copy look far back: a window of 32 of some 150 tokens cannot answer them."""
    failed = 0
    for trace in traces:
        radius = float(longest_query(trace.q, trace.present)[0])
        tokens = trace.present[0].nonzero()[:, 0]
        k = trace.k[0, tokens]
        found = readable_within(k, radius=radius, scale=trace.scale, eta=0.05, dv=64, others="present")
        assert read_oracle.holds(found, k)
        assert not play(parse("exact"), found, k).contradicts
        window = play(parse("window@32"), found, k)
        assert not window.contradicts
        failed += window.answered < 0.9
    assert failed == len(traces)
