"""The certificates' promise, over many games: more bits than were sent are claimed with probability alpha at most."""

import functools
import itertools
import math

import pytest

from kvfloor.game import play
from kvfloor.game.engine import certificates
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.play import play_index
from kvfloor.game.engine.result import conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances.spike import Spike
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE
from tests.game.imperfect_optimum import Imperfect

METHODS = [
    "exact", "window@32", "sinks(4)@32", "random@32", "h2o(recent=8)@32", "window+value_sum@32",
    "subgen_sketch(delta=0.5,t=4,s=64)", "quant(bits=4)", "quant(bits=8)", "exact|top_k(k=16)",
]  # fmt: skip
REGISTERED = [str(default_method(name, budget=32)) for name in TABLE]
GAMES = [
    {}, {"bits": 8}, {"heads": 2}, {"dtype": "bfloat16", "bits": 10}, {"codebook": 80},
    {"barrier": "packing", "d": 4}, {"barrier": "sparse", "bits": 2}, {"barrier": "window", "window": 24},
    {"barrier": "window", "window": 24, "append": True}, {"barrier": "probing", "runs": 64},
    {"barrier": "tensor", "d": 48}, {"barrier": "tensor", "caches": 2}, {"barrier": "visual", "sides": (2, 3, 5)},
]  # fmt: skip
RISK = 1e-3  # of a lawful certificate failing one of these tests


def binomial_limit(runs, alpha):
    """The least k with Pr[Binomial(runs, alpha) > k] <= RISK, in exact terms."""
    below, k = 0.0, -1
    while 1.0 - below > RISK:
        k += 1
        below += math.comb(runs, k) * alpha**k * (1 - alpha) ** (runs - k)
    return k


def test_the_limit_is_the_binomial_quantile():
    assert binomial_limit(1000, 2.0**-20) == 0
    assert binomial_limit(10, 0.5) == 9
    assert 70 < binomial_limit(1000, 0.05) < 75


# ---- all methods, all games -----------------------------------------------------------------------------------------


def violations(runs, methods):
    """Those of the first `runs` games, each with seeds of its own, that claim more than was sent or held."""
    exceeded, seed = [], 0
    while True:
        for given in GAMES:
            for text in methods:
                if runs == 0:
                    return exceeded
                runs -= 1
                result = play(
                    text, **({"n": 48, "d": 32, "seed": seed, "hidden_seed": f"{runs}/many", "isolated": False} | given)
                )
                most = max(result.certified_bits, result.live_certified_bits)
                if most > 8 * min(result.message_bytes, result.state_bytes) or result.verdict == "cheats":
                    exceeded.append((text, given, seed, result.why))
                assert result.certified_bits <= result.hidden_bits
                assert result.verdict != "holds" or result.row_success >= 0.9
        seed += 1


def test_no_method_claims_more_than_its_bytes_in_any_game():
    runs = len(METHODS) * len(GAMES)
    assert len(violations(runs, METHODS)) <= binomial_limit(runs, certificates.ALPHA) == 0


@pytest.mark.slow
def test_no_method_claims_more_than_its_bytes_in_a_thousand_games():
    methods = list(dict.fromkeys(METHODS + REGISTERED))
    assert len(violations(1000, methods)) <= binomial_limit(1000, certificates.ALPHA) == 0


# ---- no method that answers holds less than the floor ----------------------------------------------------------------

CODED = ["exact:k8v8", "exact:k4v4", "exact:k2v2", "sinks(4):k4v3@40", "h2o(recent=8):k5v4@44", "exact:kivi4"]
ERRORS = [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9]
FLOORED = [given for given in GAMES if given.get("barrier") != "probing"]  # whose floor is one of time


def below_the_floor(runs, methods):
    """Return those of the first `runs` games that are won with fewer bits than their floor, and how many are won."""
    found, won = [], 0
    plays = list(itertools.product(ERRORS, FLOORED, methods))
    for run in range(runs):
        seed, (eta, given, text) = run // len(plays), plays[run % len(plays)]
        given = {"n": 48, "d": 32, "eta": eta, "seed": seed, "hidden_seed": f"{run}/floors", "isolated": False} | given
        result = play(text, **given)
        won += result.verdict == "holds"
        if result.verdict == "holds" and 8 * min(result.message_bytes, result.state_bytes) < result.floor_bits:
            found.append((text, given, result.floor_bits, result.message_bytes))
    return found, won


def test_no_method_that_answers_holds_less_than_the_floor():
    found, won = below_the_floor(len(ERRORS) * len(FLOORED), ["exact:k4v4"])
    assert not found and won > 20


@pytest.mark.slow
def test_no_method_that_answers_holds_less_than_the_floor_in_ten_thousand_games():
    methods = list(dict.fromkeys(METHODS + CODED + REGISTERED))
    found, won = below_the_floor(10_000, methods)
    assert not found and won > 1000


# ---- tight payloads, at an alpha that is reached --------------------------------------------------------------------

# (n, dv, bits stored, of these wrong): 1 to 7 of the hidden bits are guessed
TIGHT = [
    (5, 5, 24, 0), (17, 1, 16, 0), (3, 11, 32, 0), (2, 13, 24, 0), (6, 3, 16, 0), (5, 6, 24, 0), (11, 2, 16, 0),
    (2, 19, 32, 0), (30, 1, 24, 0), (31, 1, 24, 0), (6, 4, 24, 1), (13, 2, 24, 2),
]  # fmt: skip


def tight_games(runs):
    """Certified bits and payload bits of `runs` games whose messages hold fewer bits than are hidden."""
    for run in range(runs):
        n, dv, kept, flipped = TIGHT[run % len(TIGHT)]
        shared = agreed(d=16, dv=dv, bits=1, eta=0.5, seed=run)
        instance = Spike(**shared, n=n, public=keys_for(shared, n, "sphere"))
        method = Imperfect("sphere", n, instance.key_seed, kept, flipped)
        played = play_index(method, instance, Hidden(f"{run}/tight"), isolated=False)
        assert played.payload_bytes == kept // 8
        yield conclude(played, instance, seed=run).certified_bits, kept


def claims_too_much(monkeypatch, runs, certified):
    monkeypatch.setattr(certificates, "certified", certified)
    return sum(claimed > sent for claimed, sent in tight_games(runs))


ALPHA = 0.05
PAID = functools.partial(certificates.certified, alpha=ALPHA)


def unpaid(gains):
    """The mutant: nothing is paid, neither for alpha nor for the best of three."""
    return max(gains)


def test_tight_payloads_are_exceeded_as_rarely_as_promised(monkeypatch):
    assert claims_too_much(monkeypatch, 120, PAID) <= binomial_limit(120, ALPHA)


def test_a_mutant_that_pays_nothing_claims_too_much_too_often(monkeypatch):
    assert claims_too_much(monkeypatch, 120, unpaid) > binomial_limit(120, ALPHA)


@pytest.mark.slow
def test_tight_payloads_are_exceeded_as_rarely_as_promised_in_1200_games(monkeypatch):
    exceeded = claims_too_much(monkeypatch, 1200, PAID)
    print(f"{exceeded} of 1200 games claim more than their payload at alpha = {ALPHA}")
    assert 0 < exceeded <= binomial_limit(1200, ALPHA)


@pytest.mark.parametrize(("guessed", "alpha"), [(5, 0.05), (4, 0.1), (6, 0.02)])
def test_one_certificate_reaches_its_alpha(guessed, alpha):
    """All guesses right, probability 2^-guessed: `hard` alone then claims the guessed bits too, within alpha."""
    hidden = 24 + guessed
    chance = sum(
        math.comb(guessed, wrong) * 2.0**-guessed
        for wrong in range(guessed + 1)
        if certificates.certified([certificates.hard(hidden, wrong)], alpha) > 24
    )
    assert alpha / 2 < chance <= alpha


def test_a_payload_that_lacks_nothing_never_claims_more(monkeypatch):
    monkeypatch.setattr(certificates, "certified", PAID)
    for seed in range(10):
        result = play("optimum", n=7, d=16, dv=8, seed=seed, isolated=False)
        assert result.certified_bits == pytest.approx(56 - math.log2(4) - math.log2(20))
        assert result.payload_bytes == 7
