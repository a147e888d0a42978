"""Bits in the keys: a secret subset of a public codebook, told by markers."""

import dataclasses
import itertools
import math

import pytest
import torch

from kvfloor import parse
from kvfloor.floors.entropy import log2_choose
from kvfloor.floors.separation import tau
from kvfloor.game import play
from kvfloor.game.engine import certificates
from kvfloor.game.engine.asking import by_reading
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import codebook
from kvfloor.game.instances.codebook import Codebook, subset_bits, subset_rows


def paid(bits):
    """For the better of two certificates, and for alpha = 2^-20; whole rows pay for no predictors."""
    del bits
    return 1 + 20


def instance_of(n=24, codebook=96, d=32, dv=8, bits=1, eta=0.5):
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=0)
    return Codebook(**shared, n=n, codebook=codebook, public=keys_for(shared, codebook, "chirp"))


def played(text="exact", **given):
    return play(text, **({"n": 64, "codebook": 256, "d": 32, "isolated": False} | given))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_exact_tells_every_key_and_every_value(bits, eta):
    result = played(bits=bits, eta=eta)
    key_bits = math.log2(math.comb(256, 64))
    assert result.details["key_bits"] == pytest.approx(key_bits)
    assert result.details["value_bits"] == 64 * 32 * bits
    assert result.hidden_bits == int(key_bits) + 64 * 32 * bits
    assert result.certified_bits == pytest.approx(result.hidden_bits - paid(bits), abs=3)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits > result.floor_bits
    assert (result.n, result.rows_asked, result.details["codebook"]) == (64, 256, 256)
    assert bits - 0.1 < result.bits_per_value <= bits


def test_keys_alone_carry_bits():
    """One value bit a key: most of what is certified was hidden in the keys."""
    result = played(dv=1, n=128, codebook=512)
    assert result.certified_bits > 1.5 * 128
    assert result.certified_bits == pytest.approx(result.hidden_bits - paid(1), abs=3)


def test_a_codebook_that_is_streamed_whole_hides_nothing_in_its_keys():
    result = played(n=64, codebook=64)
    assert result.details["key_bits"] == 0.0
    assert result.hidden_bits == 64 * 32
    assert result.verdict == "holds"


def test_which_keys_come_and_in_which_order_is_secret():
    instance = instance_of()
    values = torch.zeros(1, 96, 8)
    one, two = (torch.cat([k for k, _ in instance.stream(values, Hidden(seed))], dim=1)[0] for seed in (1, 2))
    assert one.shape == (24, 32)
    rows = [(instance.keys == key).all(dim=1).nonzero().item() for key in one]
    assert len(set(rows)) == 24 and rows != sorted(rows)
    assert rows == Hidden(1).subset(96, 24).tolist()
    assert not torch.equal(one, two)


def test_a_window_that_lost_three_quarters_is_caught_although_most_keys_are_absent():
    result = played("window@16", codebook=1024, d=64, dv=64)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    most = math.log2(math.comb(1024, 16)) + 16 * 64  # all there is to know about 16 tokens of the codebook
    assert 16 * 64 - 64 < result.certified_bits < most
    assert result.certified_bits < result.floor_bits


def test_a_method_that_claims_every_key_is_caught():
    """Its markers never win: every key of the codebook looks streamed."""
    instance = instance_of()
    present = torch.zeros(96, dtype=torch.bool)
    present[:24] = True
    levels = Hidden(0).levels(96, 8, 1)
    told = instance.judge(levels.float(), levels, present)
    assert told.row_success == 0.0
    assert told.certified_bits < math.log2(math.comb(96, 24)) + 24 * 8


def answers_and_weights(instance, seed=0):
    """The true answers and the weights that a float64 softmax gives key, marker and all others, for every key."""
    chosen = Hidden(seed).subset(instance.codebook, instance.n)
    values = Hidden(seed).levels(instance.codebook, instance.dv, instance.bits).double() / (2**instance.bits - 1)
    keys, noted = instance.keys.double(), []
    codebook_by_appending = codebook.by_appending

    def note(state, copy, queries, k, v):
        noted.append((queries.double(), k.double(), v.double()))
        return codebook_by_appending(state, copy, queries, k, v)

    state = parse("exact").open(instance.spec())
    for k, v in instance.stream(values.float().unsqueeze(0), Hidden(seed)):
        state.append(k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "by_appending", note)
        told = instance.ask(state, None)
    (queries, markers, minus), answers, weights = noted[0], [], []
    for q, marker, below in zip(queries, markers, minus, strict=True):
        scores = torch.cat([keys[chosen], marker.unsqueeze(0)]) @ q
        weights.append(torch.softmax(scores, 0))
        answers.append(weights[-1] @ torch.cat([values[chosen], below.unsqueeze(0)]))
    return told, torch.stack(answers), torch.stack(weights), chosen


@pytest.mark.parametrize("bits", [1, 4])
def test_the_key_outweighs_its_marker_and_the_marker_all_other_keys(bits):
    instance = instance_of(bits=bits)
    told, answers, weights, chosen = answers_and_weights(instance)
    assert torch.allclose(told.double(), answers, atol=1e-4)
    absent = torch.ones(96, dtype=torch.bool)
    absent[chosen] = False
    least = 1 / (1 + leak_ratio(bits, 0.5)) - 1e-6
    assert weights[absent, -1].min() >= least
    assert weights[chosen, torch.arange(24)].min() >= least
    assert (answers[absent] < -0.5).all() and (answers[chosen] > -0.5).all()


def test_a_mutant_that_leaves_the_marker_out_is_rejected(monkeypatch):
    monkeypatch.setattr(codebook, "by_appending", lambda state, copy, q, k, v: by_reading(state, copy, q))
    result = played()
    assert (result.verdict, result.row_success) == ("breaks", 0.0)
    assert result.certified_bits < 64 * 32 + 20


def test_a_mutant_whose_marker_is_as_long_as_the_key_is_rejected(monkeypatch):
    by_appending = codebook.by_appending

    def longer(state, copy, q, k, v):
        keys = k / k.norm(dim=1, keepdim=True)
        return by_appending(state, copy, q, keys, v)

    monkeypatch.setattr(codebook, "by_appending", longer)
    assert played().verdict == "breaks"


def mean_power(monkeypatch, seed):
    """E 2^T over uniform 3-subsets of 6 keys with one value bit each, for fixed answers, by enumeration."""
    monkeypatch.setattr(certificates, "certified", lambda gains: gains[0])
    instance = instance_of(n=3, codebook=6, d=8, dv=1)
    answers = 2.2 * torch.rand(6, 1, generator=torch.Generator().manual_seed(seed)) - 1.1
    powers = []
    for chosen in itertools.combinations(range(6), 3):
        present = torch.zeros(6, dtype=torch.bool)
        present[list(chosen)] = True
        for values in itertools.product((0, 1), repeat=3):
            levels = torch.zeros(6, 1, dtype=torch.int64)
            levels[list(chosen), 0] = torch.tensor(values)
            powers.append(2.0 ** instance.judge(answers, levels, present).certified_bits)
    return sum(powers) / len(powers)


@pytest.mark.parametrize("seed", range(2))
def test_the_gain_is_lawful_over_all_subsets_and_values(monkeypatch, seed):
    assert mean_power(monkeypatch, seed) <= 1.0


def test_a_mutant_that_pays_nothing_for_a_wrong_membership_is_rejected(monkeypatch):
    monkeypatch.setattr(codebook, "_DOUBTS", (0.5,))
    monkeypatch.setattr(codebook, "log2_choose", lambda M, n: log2_choose(M, n) + M)  # gives back M log2 (1/2)
    assert mean_power(monkeypatch, 0) > 1.0


# ---- rows: whole keys that do not come back ------------------------------------------------------------------------


def every_instance(M, n, b):
    """All subsets of n of M keys with all rows of b bits: (members, M) rows, -1 where a key is not in the set."""
    for chosen in itertools.combinations(range(M), n):
        for rows in itertools.product(range(2**b), repeat=n):
            table = [-1] * M
            for key, row in zip(chosen, rows, strict=True):
                table[key] = row
            yield tuple(table)


@pytest.mark.parametrize(("M", "n", "b"), [(6, 3, 1), (5, 2, 2), (7, 2, 1)])
def test_rows_of_subsets_are_lawful_for_every_answer(M, n, b):
    """For fixed answers, the share of sets and rows whose gain is t or more is 2^-t at most, by enumeration."""
    whole = list(every_instance(M, n, b))
    tight = 0.0
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        named = torch.where(torch.rand(M, generator=draw) < 0.6, torch.randint(2**b, (M,), generator=draw), -1).tolist()
        believed = sum(row >= 0 for row in named)
        gains = []
        for table in whole:
            right = sum(row >= 0 and row == other for row, other in zip(table, named, strict=True))
            gains.append(subset_rows(M, n, b, believed, n - right))
        for t in set(gains):
            share = sum(gain >= t for gain in gains) / len(gains)
            assert share <= 2.0**-t * (1 + 1e-9)
            tight = max(tight, share * 2.0**t if t > 0 else 0.0)
    assert tight > 0.3


def test_a_mutant_that_does_not_pay_for_which_keys_are_missed_is_rejected():
    """Without C(M-n+w, w), a message of the keys that are found would be exceeded."""
    M, n, b, found = 64, 16, 8, 8
    held = math.log2(math.comb(M, found)) + found * b  # all that such a message tells
    gain = subset_rows(M, n, b, found, n - found)
    unpaid = math.log2(math.comb(M, n)) + n * b - (n - found) * b
    assert 0 < gain <= held < unpaid
    with pytest.raises(ValueError, match="at least n - believed = 8 keys"):
        subset_rows(M, n, b, found, 7)


@pytest.mark.parametrize("missed", [0, 1, 9])
def test_whole_rows_certify_the_floor_though_no_answer_looks_sure(missed):
    """Every bit of just under a tenth of the keys is inverted, and all answers are close to the threshold."""
    instance = instance_of(n=96, codebook=256, d=64, dv=32)
    present = torch.zeros(256, dtype=torch.bool)
    present[Hidden(0).subset(256, 96)] = True
    levels = Hidden(0).levels(256, 32, 1)
    bit = levels.bool() ^ (torch.arange(256) == present.nonzero()[:missed]).any(0).unsqueeze(1)
    middle = tau(0.5, leak_ratio(1, 0.5))
    answers = torch.where(bit, middle + 0.002, middle - 0.002).where(present.unsqueeze(1), torch.tensor(-1.0))
    told = instance.judge(answers, levels, present)
    assert told.row_success == 1 - missed / 96
    assert told.certificate == "rows" and told.certified_bits > instance.floor_bits - 24
    assert told.certified_bits <= instance.hidden_bits


@pytest.mark.parametrize(("M", "n"), [(8, 2), (10, 5), (12, 3)])
def test_subset_bits_stays_below_what_such_a_channel_tells(M, n):
    """Exact mutual information of a subset and its memberships told with error 1/10 each, by enumeration."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=M)), dtype=torch.float64)
    subsets = every[every.sum(dim=1) == n]
    wrong = torch.cdist(every, subsets, p=1)
    given = 0.9 ** (M - wrong) * 0.1**wrong / len(subsets)
    information = (given * torch.log2(given * len(subsets) / given.sum(dim=1, keepdim=True))).sum().item()
    assert 0.0 < subset_bits(M, n, 0.9) <= information
    assert subset_bits(M, n, 1.0) == pytest.approx(math.log2(len(subsets)))
    assert subset_bits(M, n, 0.5) == 0.0


def test_the_instance_is_public_and_plain():
    instance = instance_of()
    assert instance == Codebook(**dataclasses.asdict(instance))
    assert (instance.rows, instance.length) == (96, 24)
