"""Tensor attention's instances: pairs of tokens as keys, with four caches and with two."""

import math

import pytest
import torch

from kvfloor import parse
from kvfloor.floors import row_bits
from kvfloor.game import play
from kvfloor.game.engine.decode import information, leak_ratio
from kvfloor.game.engine.instance import agreed
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import tensor
from kvfloor.game.instances.tensor import FourCaches, TwoCaches
from kvfloor.methods.variants import TensorAttention
from tests.game.weighing import exact_state, weights

PAID = math.log2(4) + 20


def played(text="exact", **given):
    return play(text, **({"barrier": "tensor", "n": 48, "d": 64, "isolated": False} | given))


def four(n=12, d=48, bits=1, eta=0.5, dv=8, dtype="float32"):
    return FourCaches(**agreed(d=d, dv=dv, bits=bits, eta=eta, seed=0, dtype=dtype), n=n)


def two(n=8, d=64, bits=1, dv=8):
    return TwoCaches(**agreed(d=d, dv=dv, bits=bits, eta=0.5, seed=0), n=n)


def khatri_rao(a, b):
    """Row (j1, j2) is a[j1] * b[j2], by two loops."""
    return torch.stack([first * second for first in a.double() for second in b.double()])


# ---- the instances against the explicit n^2 definition --------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(6, 32), (12, 48), (20, 96)])
@pytest.mark.parametrize(("bits", "eta"), [(1, 0.5), (1, 0.0), (1, 0.9), (5, 0.5)])
def test_every_query_gives_its_pair_all_but_the_allowed_leak(n, d, bits, eta):
    instance = four(n, d, bits, eta)
    queries, gaps = instance.aimed(torch.arange(instance.rows))
    weight = (queries.double() @ khatri_rao(*instance.keys).T).softmax(dim=1)
    pair = [(i, 0) for i in range(1, n)] + [(0, i) for i in range(1, n)]
    on_pair = weight[torch.arange(instance.rows), torch.tensor([i * n + j for i, j in pair])]
    assert on_pair.min() >= 1 / (1 + leak_ratio(bits, eta))
    keys = khatri_rao(*instance.keys) / d**0.5
    naive = 1 - (keys @ keys.T - 2 * torch.eye(n * n)).max(dim=1).values
    assert torch.allclose(gaps, naive[[i * n + j for i, j in pair]])


def test_the_keys_are_signs_and_the_two_sets_differ():
    k1, k2 = four(30).keys
    assert set(torch.cat([k1, k2]).unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(k1, k2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_answers_are_those_of_the_explicit_definition(dtype):
    instance, hidden = four(dtype=dtype), Hidden(1)
    levels = hidden.levels(22, 8, 1)
    state = exact_state(instance, levels.view(1, 22, 8).to(instance.spec().dtype))
    queries = instance.aimed(torch.arange(22))[0]
    one = torch.ones(1, 8)
    values = khatri_rao(torch.cat([one, levels[:11]]), torch.cat([one, levels[11:]]))
    dense = (queries.double() @ khatri_rao(*instance.keys).T).softmax(dim=1) @ values
    assert torch.allclose(instance.ask(state, None).double(), dense, atol=1e-5)
    assert torch.equal((dense > 0.5).long(), levels)


def test_a_mutant_that_asks_for_the_wrong_pair_is_rejected(monkeypatch):
    aimed = FourCaches.aimed
    monkeypatch.setattr(FourCaches, "aimed", lambda self, row: aimed(self, (row + 1) % self.rows))
    assert weights(four()).diagonal().min() < 0.5
    assert played().verdict == "breaks"


def test_weights_on_one_hot_rows_say_the_same_of_the_unmutated_query():
    assert weights(four()).diagonal().min() >= 1 / (1 + 0.125) - 1e-5
    assert weights(two()).diagonal().min() >= 1 / (1 + 0.125) - 1e-5


def test_two_caches_stream_all_products_as_unit_keys():
    instance = two()
    assert (instance.rows, instance.length) == (64, 64)
    assert torch.allclose(instance.keys.norm(dim=1), torch.ones(64))
    assert torch.equal(instance.keys.sign(), khatri_rao(*(k.sign() for k in four(8, 64).keys)).float())
    for n in (8, 16):
        queries = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor, "by_reading", lambda state, copy, q, queries=queries: queries.append(q))
            two(n, 128).answers(None, torch.zeros(n * n), torch.arange(n * n))  # type: ignore[arg-type]
        weight = (queries[0].double() @ two(n, 128).keys.double().T).softmax(dim=1).diagonal()
        assert weight.min() >= 1 / (1 + 0.125)


# ---- what methods keep ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "dtype"), [(1, "float32"), (8, "float32"), (1, "bfloat16")])
def test_exact_decodes_both_values_of_every_token(bits, dtype):
    result = played(bits=bits, dtype=dtype, dv=32)
    assert (result.n, result.hidden_bits) == (2 * 47, 2 * 47 * 32 * bits)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(result.hidden_bits - PAID)
    assert result.floor_bits == row_bits(94, 32, 0.9, *information(bits, 0.5))
    assert result.details == {"caches": 4, "tokens": 48, "pairs": 2304}
    assert result.method == "tensor"


def test_two_caches_hide_a_row_in_every_pair():
    result = played(caches=2, n=150, d=128, dv=8, bits=1)
    assert result.details == {"caches": 2, "tokens": 12, "pairs": 144}
    assert (result.n, result.verdict) == (144, "holds")
    assert result.certified_bits == pytest.approx(144 * 8 - PAID)
    assert result.method == "exact"


def what_is_left(rows, kept, dv):
    """At the least: where a lost row's answer looks like a row too, the certificate pays for which ones are right."""
    return kept * dv - PAID - math.log2(math.comb(rows, kept)) - 16


def test_keeping_token_0_and_some_others_keeps_both_values_of_those():
    """sinks(count=1)@12 of 48 tokens: token 0 and 11 newest, so 2 * 11 of 94 rows."""
    result = played("sinks(count=1,block=1)@12")
    assert (result.verdict, result.row_success) == ("breaks", pytest.approx(22 / 94))
    assert what_is_left(94, 22, 64) < result.certified_bits <= 22 * 64 - PAID
    assert result.method == "tensor(store=sinks(count=1,block=1))@12"


def test_a_window_loses_token_0_and_with_it_every_pair_that_hides_bits():
    result = played("window(block=1)@47")
    assert (result.verdict, result.row_success, result.certified_bits) == ("breaks", 0.0, 0.0)


def test_a_window_of_pairs_keeps_its_own_rows():
    result = played("window(block=1)@36", caches=2, n=144, d=128)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    assert what_is_left(144, 36, 128) < result.certified_bits <= 36 * 128 - PAID


@pytest.mark.parametrize(
    ("text", "caches"),
    [
        ("exact", 4), ("tensor", 4), ("window@64", 4), ("h2o(recent=8)@64", 4), ("tensor(store=random)@64", 4),
        ("quant(bits=8)", 2), ("subgen_sketch(delta=0.5,t=4,s=64)", 2), ("window+value_sum@64", 2),
        ("exact|top_k(k=16)", 2),
    ],
)  # fmt: skip
def test_a_method_that_keeps_whole_tokens_plays_four_caches_any_other_two(text, caches):
    assert played(text).details["caches"] == caches


def test_budgets_in_shares_of_the_context_are_of_its_tokens():
    assert played("sinks(count=1,block=1)@25%").method == "tensor(store=sinks(count=1,block=1))@12"


def test_a_long_stream_is_sampled(monkeypatch):
    monkeypatch.setattr(tensor, "_ALL_ROWS_UP_TO", 90)
    monkeypatch.setattr(tensor, "_ROWS_SAMPLED", 60)
    result = played()
    assert (result.rows_asked, result.certificate, result.verdict) == (60, "sampled rows", "holds")
    e = 1 - (2.0**-21) ** (1 / 60)
    assert result.certified_bits == pytest.approx(
        94 * (64 * (1 - e) + e * math.log2(e) + (1 - e) * math.log2(1 - e)) - 21
    )


def test_the_method_is_lifted_once():
    instance = four()
    lifted = instance.lift(parse("window@16"))
    assert lifted == TensorAttention(parse("window@16")) == instance.lift(lifted)
    assert two().lift(parse("window@16")) == parse("window@16")
