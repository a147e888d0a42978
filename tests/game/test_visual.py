"""The scale pyramid: a whole map of queries at once, every one a spike."""

import math

import pytest
import torch

from kvfloor import parse
from kvfloor.floors import row_bits
from kvfloor.game import play
from kvfloor.game.engine.decode import information, leak_ratio
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import visual
from kvfloor.game.instances.visual import Visual, doubling
from kvfloor.game.keys.public import PublicKeys
from kvfloor.methods.variants.visual import tokens_in
from tests.game.weighing import exact_state, weights

PAID = math.log2(4) + 20


def instance_of(sides=(1, 2, 4, 6), d=32, bits=1, eta=0.5, dv=8):
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=0)
    return Visual(**shared, sides=sides, public=keys_for(shared, tokens_in(sides)))


def played(text="exact", **given):
    return play(text, **({"barrier": "visual", "sides": (1, 2, 4, 6), "d": 32, "isolated": False} | given))


@pytest.mark.parametrize("sides", [(1, 2, 4, 6), (5, 3), (4,), (2, 2, 2)])
@pytest.mark.parametrize(("bits", "eta"), [(1, 0.5), (1, 0.9), (5, 0.5)])
def test_every_query_of_bobs_map_gives_its_row_all_but_the_allowed_leak(sides, bits, eta):
    """Bob's own map of zero tokens is read by his queries too."""
    weight = weights(instance_of(sides, bits=bits, eta=eta))
    assert weight.diagonal().min() >= 1 / (1 + leak_ratio(bits, eta)) - 1e-5
    assert weight.sum(dim=1).max() < 1


def test_a_mutant_that_forgets_bobs_own_zero_tokens_leaks_too_much(monkeypatch):
    spike_C = visual.spike_C
    monkeypatch.setattr(visual, "spike_C", lambda n, z, *rest: spike_C(n, 0, *rest))
    assert weights(instance_of((1, 20), d=512)).diagonal().min() < 1 / (1 + 0.125)


def test_the_answers_are_dense_block_causal_attention_in_float64():
    instance, hidden = instance_of((1, 2, 3)), Hidden(1)
    levels = hidden.levels(14, 8, 1)
    state = exact_state(instance, levels.float().unsqueeze(0))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        aim = PublicKeys.aim
        patch.setattr(PublicKeys, "aim", lambda *given: asked.append(aim(*given)) or asked[0])
        told = instance.ask(state, None)
    queries, keys = asked[0][0].double(), torch.cat([instance.keys.double(), torch.zeros(9, 32).double()])
    values = torch.cat([levels.double(), torch.zeros(9, 8).double()])
    assert torch.allclose(told.double(), (queries @ keys.T).softmax(1) @ values, atol=1e-5)


def test_alice_streams_scale_by_scale_with_queries_that_tell_nothing(monkeypatch):
    steps = []
    step = visual.NextScale.step
    monkeypatch.setattr(visual.NextScale, "step", lambda self, q, k, v: steps.append((q, k, v)) or step(self, q, k, v))
    instance, values = instance_of(), torch.rand(1, 57, 8)
    state = exact_state(instance, values)
    assert [k.shape[1] for _, k, _ in steps] == [1, 4, 16, 36]
    assert not any(q.any() for q, _, _ in steps)
    assert torch.equal(torch.cat([k for _, k, _ in steps], dim=1)[0], instance.keys)
    assert torch.equal(torch.cat([v for _, _, v in steps], dim=1), values)
    steps.clear()
    before = state.to_bytes()
    instance.answers(state, torch.zeros(57), torch.arange(57))
    assert state.to_bytes() == before
    assert [tuple(q.shape) for q, _, _ in steps] == [(1, 1, 36, 32)] * 2  # two maps of 36 for 57 rows
    assert not any(k.any() or v.any() for _, k, v in steps)


@pytest.mark.parametrize("bits", [1, 6])
def test_exact_decodes_every_token_of_every_map(bits):
    result = played(bits=bits)
    assert (result.n, result.hidden_bits) == (57, 57 * 32 * bits)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(57 * 32 * bits - PAID)
    assert result.floor_bits == row_bits(57, 32, 0.9, *information(bits, 0.5))
    assert result.details == {
        "sides": [1, 2, 4, 6], "rows_read_at_once": 36, "rows_if_the_last_scale_asks": 21,
        "family": result.details["family"],
    }  # fmt: skip
    assert played(sides=(3,)).details["rows_if_the_last_scale_asks"] == 0


def test_a_window_keeps_its_newest_rows_and_bobs_map_does_not_push_them_out_before_it_is_answered():
    result = played("window(block=1)@20", d=64)
    assert (result.verdict, result.row_success) == ("breaks", pytest.approx(20 / 57))
    assert result.certified_bits == pytest.approx(20 * 64 - PAID, abs=16)


@pytest.mark.parametrize(("n", "sides"), [(1, (1,)), (4, (1,)), (5, (1, 2)), (84, (1, 2, 4)), (341, (1, 2, 4, 8, 16))])
def test_the_default_pyramid_doubles_while_it_fits(n, sides):
    assert doubling(n) == sides
    assert tokens_in(sides) <= n < tokens_in([*sides, 2 * sides[-1]])
    assert played(sides=None, n=n).details["sides"] == list(sides)


def test_any_method_plays():
    for text in ("quant(bits=8)", "subgen_sketch(delta=0.5,t=4,s=64)", "window+value_sum@64", "exact|top_k(k=8)"):
        result = played(text)
        assert result.verdict in ("holds", "breaks") and result.certified_bits <= result.hidden_bits


def test_a_pyramid_from_json_is_the_same():
    instance = instance_of()
    assert Visual(**{**vars(instance), "sides": [1, 2, 4, 6]}) == instance
    assert parse("exact") == instance.lift(parse("exact"))
