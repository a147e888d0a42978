"""The window: what lies outside counts with logit 0, and what Bob's own token pushes out hides nothing."""

import math

import pytest
import torch

from kvfloor import floors
from kvfloor.game import play
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import window
from kvfloor.game.instances.window import WindowInstance
from kvfloor.game.keys.public import PublicKeys
from tests.game.weighing import exact_state, weights

PAID = math.log2(4) + 20


def instance_of(n=256, window=32, append=False, d=32, bits=1, eta=0.5, family=None, dv=16):
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=0)
    return WindowInstance(**shared, n=n, window=window, append=append, public=keys_for(shared, window, family))


def played(text="exact", **given):
    return play(text, **({"barrier": "window", "n": 256, "window": 64, "d": 32, "isolated": False} | given))


def printed_C(W, n, z, g, eps_s, gamma=1.0, eta=0.9):
    """The paper's constant (Appendix F), with the worst gap g = 1 - 2 epsilon."""
    return (2 * math.log(n) - math.log((1 - eta) / (1 + eta))) / (2 * g)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(("n", "W"), [(256, 32), (4000, 8), (64, 64), (33, 32), (3, 2)])
@pytest.mark.parametrize(("bits", "eta"), [(1, 0.5), (1, 0.9), (5, 0.5)])
def test_every_query_gives_its_row_all_but_the_allowed_leak(append, n, W, bits, eta):
    """Exact attention counts every token outside the window, so this is the unmasked law at its worst."""
    weight = weights(instance_of(n, W, append, bits=bits, eta=eta))
    assert weight.diagonal().min() >= 1 / (1 + leak_ratio(bits, eta)) - 1e-5


ORTHOGONAL = {"n": 61, "window": 61, "d": 64, "family": "reed_solomon", "eta": 0.9}  # gap 1 between any two keys


def test_a_mutant_with_the_printed_constant_leaks_too_much(monkeypatch):
    assert weights(instance_of(**ORTHOGONAL)).diagonal().min() >= 1 / (1 + leak_ratio(1, 0.9)) - 1e-5
    assert played(**ORTHOGONAL).verdict == "holds"
    monkeypatch.setattr(window, "window_C", printed_C)
    leak = 60 / 61 * (0.1 / 1.9) ** 0.5  # 60 e^-C
    assert weights(instance_of(**ORTHOGONAL)).diagonal().min() == pytest.approx(1 / (1 + leak), abs=0.01)
    assert 1 / (1 + leak) < 1 / (1 + leak_ratio(1, 0.9)) - 0.1
    assert played(**ORTHOGONAL).verdict == "breaks"


@pytest.mark.parametrize(("append", "hidden"), [(False, 64), (True, 63)])
def test_exact_decodes_everything_and_an_appending_bob_leaves_one_row_out(append, hidden):
    result = played(append=append, bits=1)
    assert (result.n, result.hidden_bits) == (hidden, hidden * 32)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(hidden * 32 - PAID)
    assert result.floor_bits == floors.row_bits(hidden, 32, 0.9)
    assert result.details == {"window": 64, "append": append, "family": result.details["family"]}


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("text", ["window(block=1)@64", "window(block=1)+value_sum@64"])
def test_a_window_of_just_that_size_holds_masked_or_not(text, append):
    result = played(text, append=append)
    assert (result.verdict, result.row_success) == ("holds", 1.0)


def test_a_mutant_that_hides_the_row_which_bobs_token_pushes_out_is_rejected(monkeypatch):
    """Hiding W rows although he appends: the window of W cannot answer the first."""
    monkeypatch.setattr(WindowInstance, "rows", property(lambda self: self.window))
    result = played("window(block=1)@64", append=True)
    assert result.row_success == 63 / 64
    assert result.bit_error > 0.0


def test_a_mutant_that_asks_for_the_neighbouring_row_is_rejected(monkeypatch):
    aim = PublicKeys.aim
    monkeypatch.setattr(PublicKeys, "aim", lambda keys, row, *rest: aim(keys, (row - 1).clamp_min(0), *rest))
    assert played(append=True).verdict == "breaks"


def test_a_quarter_of_the_window_certifies_its_own_rows():
    """window@64 in a window of 256: 64 rows of dv bits, less what the certificate pays."""
    result = played("window@64", n=1024, window=256, d=64)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    assert result.certified_bits == pytest.approx(64 * 64 - PAID, abs=8)
    unmasked = played("window+value_sum@64", n=1024, window=256, d=64)
    assert unmasked.certified_bits == pytest.approx(64 * 64 - PAID, abs=8)


def test_an_appending_bob_costs_a_full_window_its_oldest_row():
    assert played("window(block=1)@63", append=True).row_success == pytest.approx(62 / 63)
    assert played("window(block=1)@63", append=False).row_success == pytest.approx(63 / 64)


def test_the_stream_is_zeros_then_coded_rows_the_pushed_out_one_empty():
    for append in (False, True):
        instance = instance_of(append=append)
        values = Hidden(1).levels(instance.rows, 16, 1).float().unsqueeze(0)
        view = exact_state(instance, values).slots.view()  # type: ignore[attr-defined]
        assert view.k.shape == (1, 256, 32)
        assert not view.k[:, :224].any() and not view.v[:, :224].any()
        assert torch.equal(view.k[0, 224:], instance.keys)
        assert torch.equal(view.v[:, 256 - instance.rows :], values)
        assert not view.v[:, : 256 - instance.rows].any()


def test_the_window_is_a_quarter_of_the_stream_by_default():
    assert played(n=200, window=None).details["window"] == 50
    assert played(n=3, window=None).details["window"] == 1
    assert played(n=3, window=None, append=True).details["window"] == 2
