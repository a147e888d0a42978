"""The time barrier: two cases, counted probes, and who may beat the bound."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from kvfloor import parse
from kvfloor.floors import row_bits
from kvfloor.game import play
from kvfloor.game.engine import probing_readers as oracle
from kvfloor.game.engine.instance import agreed
from kvfloor.game.engine.probing_readers import NON_ADAPTIVE, ScoreOracle, curve, success_bound
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import probing
from kvfloor.game.instances.probing import Probing
from kvfloor.statistics import wilson_interval

PAID = math.log2(4) + 20


def played(text="exact", **given):
    return play(text, **({"barrier": "probing", "n": 128, "d": 8, "isolated": False} | given))


def instance_of(n=64, copies=40, d=8):
    return Probing(**agreed(d=d, dv=1, bits=1, eta=0.5, seed=0), n=n, copies=copies)


# ---- the instance ---------------------------------------------------------------------------------------------------


def test_streams_are_the_two_cases_of_the_corrected_family():
    instance, hidden = instance_of(n=1500), Hidden(1)
    bits = hidden.levels(40, 1, 1)
    pieces = list(instance.stream(bits.float().unsqueeze(1), hidden))
    assert [k.shape[1] for k, _ in pieces] == [1024, 476]
    k, v = (torch.cat(part, dim=1) for part in zip(*pieces, strict=True))
    assert k.shape == (40, 1500, 8) and v.shape == (40, 1500, 1)
    assert (v[:, 0] == 1500).all() and not v[:, 1:].any()
    heavy = k.any(dim=2)
    assert not heavy[:, 0].any()
    assert heavy.sum(dim=1).tolist() == (1 - bits[:, 0]).tolist()  # a hidden 1 is the case without a heavy key
    planted = bits[:, 0] == 0
    assert torch.equal(heavy[planted].int().argmax(dim=1), (1 + hidden.places(1499, 40))[planted])
    assert (k[heavy] == 1).all()


def test_the_answers_are_one_and_one_over_n_minus_one():
    instance, hidden = instance_of(), Hidden(2)
    state, bits = parse("exact").open(instance.spec()), hidden.levels(40, 1, 1)
    instance.feed(state, bits, hidden)
    answers = instance.ask(state, None)
    assert torch.allclose(answers, torch.where(bits == 1, 1.0, 1 / 63), atol=1e-4)
    view = state.slots.view()  # type: ignore[attr-defined]
    q = torch.full((8,), 2 * math.log(63) / 8, dtype=torch.float64)
    dense = (view.k.double() @ q).softmax(dim=1).unsqueeze(1) @ view.v.double()
    assert torch.allclose(answers.double(), dense[:, 0], atol=1e-4)


def test_exact_decodes_everything_and_reads_everything():
    result = played(runs=200)
    assert (result.hidden_bits, result.n, result.dv) == (200, 1, 1)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(200 - PAID)
    assert result.floor_bits == row_bits(200, 1, 0.9)
    details = result.details
    assert (details["tokens"], details["probes_per_query"], details["bound"]) == (128, 128.0, 1.0)
    assert details["floor_probes"] == pytest.approx((2 - 1 / 0.9) * 127)
    assert details["adaptive"] is False


@pytest.mark.parametrize(("n", "eta"), [(16, 0.5), (16, 0.8), (200, 0.98)])
def test_exact_holds_wherever_the_two_cases_are_separated(n, eta):
    assert played(n=n, eta=eta, runs=64).verdict == "holds"


# ---- methods against the bound --------------------------------------------------------------------------------------


def expected_success(kept):
    """Of a method that holds token 0 and `kept` - 1 of the others: half the streams, and the heavy keys it kept."""
    return 0.5 + 0.5 * (kept - 1) / 127


@pytest.mark.parametrize("kept", [16, 100])
@pytest.mark.parametrize("policy", ["sinks(count=1,block=1)", "random(sinks=1,block=1)"])
def test_keeping_some_tokens_unseen_is_right_as_often_as_the_bound_allows(policy, kept):
    result = played(f"{policy}@{kept}", runs=400, hidden_seed=1)
    details = result.details
    assert details["probes_per_query"] == kept
    assert details["bound"] == pytest.approx((1 + kept / 127) / 2)
    low, high = wilson_interval(round(400 * result.row_success), 400, 0.9999)
    assert low <= expected_success(kept) <= high
    assert low <= details["bound"]
    assert details["adaptive"] is False
    assert (result.verdict == "holds") == (result.row_success >= 0.9)


@pytest.mark.parametrize("text", ["window(block=1)@32", "random(block=1)@32", "window@32"])
def test_without_the_token_that_has_a_value_a_method_guesses(text):
    result = played(text, runs=300, hidden_seed=2)
    assert result.row_success == pytest.approx(0.5, abs=0.1)
    assert result.details["adaptive"] is False
    assert result.certified_bits < 30
    assert result.verdict == "breaks"


def test_a_method_that_clusters_keys_on_arrival_is_recognised_as_adaptive():
    result = played("subgen_sketch(delta=0.5,t=1,s=2,block=8)", n=512, runs=64)
    assert result.row_success == 1.0
    assert result.details["probes_per_query"] < 128
    assert result.details["bound"] < 0.63
    assert result.details["adaptive"] is True


@pytest.mark.parametrize("text", ["quant(bits=2)", "quant(bits=4)", "exact:k4v4", "exact|top_k(k=4)"])
def test_keys_in_few_bits_are_read_as_often_as_keys_in_many(text):
    """All 128 scores are read, so nothing is adaptive, in however few bytes the keys are."""
    result = played(text, runs=200)
    assert (result.details["probes_per_query"], result.details["bound"]) == (128.0, 1.0)
    assert result.row_success > 0.95 and result.details["adaptive"] is False


def test_an_index_of_pages_reads_fewer_scores_than_it_holds():
    assert 16 < played("exact|pages(pages=2,page=8)", n=512, runs=16).details["probes_per_query"] < 200


@pytest.mark.parametrize("barely", [False, True])
def test_adaptive_needs_more_than_luck(monkeypatch, barely):
    """A success within the interval around the bound is not told apart from it."""
    monkeypatch.setattr(probing, "success_bound", lambda n, probes: 0.995 if barely else 0.9)
    assert played(runs=200).details["adaptive"] is not barely


# ---- readers and their oracle ---------------------------------------------------------------------------------------


def test_the_oracle_tells_scores_and_counts_every_look():
    place, planted = torch.tensor([3, 3, 5]), torch.tensor([True, False, True])
    told = ScoreOracle(10, place, planted)
    index = torch.tensor([[1, 3], [1, 3], [1, 3]])
    assert torch.allclose(told.score(index), torch.tensor([[0.0, 2 * math.log(9)], [0.0, 0.0], [0.0, 0.0]]))
    told.score(index[:, :1])
    assert told.probes.tolist() == [3, 3, 3]


@pytest.mark.parametrize("name", NON_ADAPTIVE)
@pytest.mark.parametrize("probes", [1, 7, 30, 49])
def test_readers_commit_to_distinct_tokens_that_could_be_heavy(name, probes):
    index = NON_ADAPTIVE[name](50, probes, 20, torch.Generator().manual_seed(1))
    assert index.shape == (20, probes)
    assert index.min() >= 1 and index.max() <= 49
    assert all(len(row.unique()) == probes for row in index)


def test_the_uniform_reader_looks_at_every_token_equally_often():
    index = oracle.uniform(21, 5, 20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(index.flatten(), minlength=21)[1:].double()
    assert ((counts - 5000) ** 2 / 5000).sum().item() < 50  # 19 degrees of freedom: 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_readers_that_commit_beforehand_stay_at_the_bound_and_one_probe_after_a_look_breaks_it(seed):
    points = curve(200, [3, 50, 100, 150, 199], 2048, Hidden(seed), seed)
    assert len(points) == 3 * 5 + 1
    for point in points[:-1]:
        low, high = wilson_interval(round(point.success * 2048), 2048, 1 - 1e-5)
        assert low <= point.bound <= high, point
        assert point.bound == success_bound(200, point.probes) == pytest.approx((1 + point.probes / 199) / 2)
        assert (point.low, point.high) == wilson_interval(round(point.success * 2048), 2048)
        assert point.runs == 2048
    assert {point.probes for point in points[:-1]} == {3, 50, 100, 150, 199}
    assert all(point.success == 1.0 for point in points if point.probes == 199)
    arrival = points[-1]
    assert (arrival.reader, arrival.probes, arrival.success) == ("index made on arrival", 1, 1.0)
    assert arrival.low > arrival.bound


def test_a_mutant_reader_that_looks_before_it_commits_is_told_apart(monkeypatch):
    hidden = Hidden(1)
    place = 1 + hidden.places(199, 2048)
    monkeypatch.setitem(NON_ADAPTIVE, "peeking", lambda n, t, runs, generator: place[:runs].unsqueeze(1).expand(-1, t))
    peeking = next(point for point in curve(200, [3], 2048, hidden, 0) if point.reader == "peeking")
    assert peeking.low > peeking.bound


def test_many_probes_are_made_a_bounded_number_at_a_time(monkeypatch):
    sizes = []
    score = ScoreOracle.score
    monkeypatch.setattr(oracle, "_SCORES_AT_ONCE", 2**12)
    monkeypatch.setattr(ScoreOracle, "score", lambda self, index: sizes.append(index.numel()) or score(self, index))
    points = curve(200, [199], 2048, Hidden(0), 0)
    assert max(sizes[:-1]) <= 2**12
    assert all((point.runs, point.probes, point.success) == (2048, 199, 1.0) for point in points[:-1])


def test_the_result_lists_the_readers_as_plain_numbers():
    readers = played(runs=32).details["readers"]
    assert {reader["reader"] for reader in readers} == {*NON_ADAPTIVE, "index made on arrival"}
    assert all(set(reader) == {field.name for field in dataclasses.fields(oracle.ReaderSuccess)} for reader in readers)
    uniform = [reader["success"] for reader in readers if reader["reader"] == "uniform"]
    assert len(uniform) == 6 and all(a < b + 0.05 for a, b in pairwise(uniform))
