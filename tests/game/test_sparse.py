"""The sparsity promise: measured against a dense softmax; policies see it and lose the same bits."""

import math

import pytest
import torch

from kvfloor import parse
from kvfloor.floors import row_bits, space
from kvfloor.game import play
from kvfloor.game.engine.decode import information, leak_ratio
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import sparse
from kvfloor.game.instances.sparse import Sparse
from tests.game.weighing import exact_state, weights

PAID = math.log2(4) + 20


def instance_of(n=96, d=32, bits=1, eta=0.5, family=None, dv=16):
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=0)
    return Sparse(**shared, n=n, public=keys_for(shared, n, family))


@pytest.mark.parametrize(("n", "d", "family"), [(96, 32, None), (200, 16, "sphere"), (150, 64, "reed_solomon")])
def test_the_measured_sparsity_is_that_of_the_dense_causal_softmax(n, d, family):
    instance = instance_of(n, d, family=family)
    q, k = instance.queries.double(), instance.keys.double()
    scores, causal = q @ k.T, torch.ones(n, n).tril().bool()
    weight = torch.where(causal, scores.exp(), 0.0)
    weight = weight / weight.sum(dim=1, keepdim=True)
    top = torch.where(causal, scores, -torch.inf).max(dim=1).values
    entries = causal.sum().item()
    told = instance.details()
    assert told["scores_near_zero"] == (causal & (scores.abs() < 1e-3 * top.unsqueeze(1))).sum().item() / entries
    assert told["softmax_near_zero"] == (causal & (weight < 1e-3)).sum().item() / entries
    assert told["least_top_weight"] == pytest.approx(weight.max(dim=1).values.min().item(), rel=1e-12)
    assert told["least_top_weight"] >= 1 / (1 + leak_ratio(1, 0.5))
    assert (weight.argmax(dim=1) == torch.arange(n)).all()


def test_a_long_stream_is_measured_on_a_spread_of_its_rows():
    instance = instance_of(700, 32)
    rows = torch.linspace(0, 699, 512).long().unique()
    scores = instance.queries[rows].double() @ instance.keys.double().T
    scores = scores.masked_fill(torch.arange(700) > rows.unsqueeze(1), -torch.inf)
    assert instance.details()["least_top_weight"] == pytest.approx(scores.softmax(1).max(1).values.min().item())


@pytest.mark.parametrize("bits", [1, 6])
def test_bobs_queries_give_their_rows_all_but_the_allowed_leak(bits):
    assert weights(instance_of(bits=bits)).diagonal().min() >= 1 / (1 + leak_ratio(bits, 0.5)) - 1e-5


def test_a_mutant_whose_attention_is_flat_is_measured_as_such(monkeypatch):
    monkeypatch.setattr(sparse, "spike_C", lambda *given: 1.0)
    assert instance_of().details()["least_top_weight"] < 1 / (1 + leak_ratio(1, 0.5))


def test_exact_decodes_everything():
    result = play("exact", barrier="sparse", n=200, d=32, bits=3, isolated=False)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(200 * 32 * 3 - PAID)
    assert result.floor_bits == row_bits(200, 32, 0.9, *information(3, 0.5)) > space(200, 32, values="binary").bits


@pytest.mark.parametrize("policy", ["window(block=1)@24", "sinks(count=4,block=1)@24", "random(block=1)@24"])
def test_keeping_a_quarter_of_the_tokens_keeps_a_quarter_of_the_bits(policy):
    result = play(policy, barrier="sparse", n=96, d=32, isolated=False)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    assert result.certified_bits == pytest.approx(24 * 32 - PAID, abs=16)


def test_a_policy_that_watches_perfectly_sparse_attention_loses_no_less():
    result = play("h2o(recent=8,sinks=0,block=1)@24", barrier="sparse", n=96, d=32, isolated=False)
    assert result.verdict == "breaks"
    assert result.row_success <= 24 / 96
    assert result.certified_bits <= 24 * 32


def test_alice_asks_for_each_token_as_it_comes_whatever_she_hides(monkeypatch):
    instance, asked = instance_of(), []
    state_type = type(parse("exact").open(instance.spec()))
    step = state_type.step
    monkeypatch.setattr(state_type, "step", lambda self, q, k, v: asked.append((q, k)) or step(self, q, k, v))
    for seed in (1, 2):
        exact_state(instance, Hidden(seed).levels(96, 16, 1).float().unsqueeze(0))
    (q, k), (other_q, other_k) = asked
    assert torch.equal(q, other_q) and torch.equal(k, other_k)
    assert torch.equal(q[0, 0], instance.queries) and torch.equal(k[0], instance.keys)
    length = (q[0, 0].double() * instance.keys.double()).sum(dim=1)
    assert torch.allclose(q[0, 0].double(), length.unsqueeze(1) * instance.keys.double(), atol=1e-4)


def test_streams_longer_than_a_piece_are_asked_for_at_the_right_place():
    instance = instance_of(1100, 32, dv=1)
    seen = []
    state = exact_state(instance, torch.zeros(1, 1100, 1))
    policy = parse("h2o(recent=8)@1200").open(instance.spec())
    for k, v in instance.stream(torch.zeros(1, 1100, 1), Hidden(0)):
        seen.append(k.shape[1])
        instance.take_in(policy, k, v)
    assert seen == [1024, 76]
    assert int(state.seen[0]) == 1100
    view = policy.slots.view()  # type: ignore[attr-defined]
    score = policy.slots.columns.score[:1088]  # whole blocks have been looked at
    assert torch.equal(view.position[0, :1088], torch.arange(1088))
    assert score.min() > 1 / (1 + leak_ratio(1, 0.5)) - 1e-3  # each token was asked for when it came
