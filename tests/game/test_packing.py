"""Packing: bounded logits separate a bounded number of keys, and repeating them hides nothing more."""

import math

import pytest
import torch

from kvfloor import floors
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.game import play
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.play import play_index
from kvfloor.game.engine.result import conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import packing
from kvfloor.game.instances.packing import Packing, separable
from kvfloor.game.keys.gaps import one_sided_gaps
from tests.game.weighing import weights

PAID = math.log2(4) + 20
SIZES = [(1, 8.0), (2, 8.0), (2, 64.0), (3, 16.0), (4, 32.0), (8, 8.0), (8, 20.0), (24, 8.0)]


def instance_of(d, radius, eta=0.5, most=96, repeats=2, dv=16):
    shared = agreed(d=d, dv=dv, bits=1, eta=eta, seed=0)
    family, m = separable(d, radius, eta, most, shared["key_seed"])
    public = keys_for(shared, m, family)
    return Packing(**shared, m=m, repeats=repeats, radius=radius, public=public)


def queries_of(instance, monkeypatch):
    noted = []
    monkeypatch.setattr(packing, "by_reading", lambda state, copy, queries: noted.append(queries) or queries)
    instance.answers(None, torch.zeros(instance.m), torch.arange(instance.m))
    return noted[0].double()


@pytest.mark.parametrize(("d", "radius"), SIZES)
def test_no_logit_exceeds_the_radius_and_every_key_is_separated(monkeypatch, d, radius):
    instance = instance_of(d, radius)
    keys, queries = instance.keys.double(), queries_of(instance, monkeypatch)
    assert instance.m >= 1
    assert torch.allclose(keys.norm(dim=1), torch.ones(instance.m, dtype=torch.float64), atol=1e-6)
    assert (queries @ keys.T).abs().max() <= radius * (1 + 1e-6)
    leak = (queries @ keys.T).softmax(dim=1).diagonal().min()
    assert leak >= 1 / (1 + (1 - 0.5) / 4)


@pytest.mark.parametrize(("d", "radius"), SIZES)
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_the_gap_that_the_radius_asks_for_is_there_at_every_eta(d, radius, eta):
    instance = instance_of(d, radius, eta)
    if instance.m > 1:
        assert one_sided_gaps(instance.keys).min().item() >= math.log(instance.m / ((1 - eta) / 4)) / radius


def test_weights_of_repeated_keys_add_up():
    weight = weights(instance_of(4, 24.0, repeats=3))
    assert weight.diagonal().min() >= 1 / (1 + 0.125) - 1e-5


def test_a_mutant_that_promises_keys_which_the_radius_cannot_separate_is_rejected(monkeypatch):
    monkeypatch.setattr(packing, "spike_C", lambda *given: 0.2 * floors.spike_C(*given))
    assert weights(instance_of(3, 16.0)).diagonal().min() < 1 / (1 + 0.125)
    assert play("exact", barrier="packing", n=512, d=3, radius=16.0, isolated=False).verdict == "breaks"


@pytest.mark.parametrize(("d", "radius"), SIZES)
def test_exact_decodes_everything(d, radius):
    result = play("exact", barrier="packing", n=128, d=d, radius=radius, isolated=False)
    family, m = separable(d, radius, 0.5, 128, agreed(d=d, dv=1, bits=1, eta=0.5, seed=0)["key_seed"])
    assert (result.n, result.dv, result.hidden_bits) == (m, 64, 64 * m)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(max(0.0, 64 * m - PAID))
    assert result.details == {
        "radius": radius,
        "keys_that_exist": min(N_dr(d, radius, 0.5), 2.0**53),
        "repeats": 128 // m,
        "family": family,
        "closed_form_floor_bits": floors.row_bits(int(min(128.0, N_dr(d, radius, 0.5))), 64, 0.9),
    }
    assert result.floor_bits == floors.row_bits(m, 64, 0.9)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("radius", [8.0, 16.0, 40.0])
def test_built_keys_are_no_fewer_than_the_closed_form(d, radius):
    assert separable(d, radius, 0.5, 256, 7)[1] >= min(256, N_dr(d, radius, 0.5))


@pytest.mark.parametrize("d", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("radius", [8.0, 16.0, 24.0])
def test_the_closed_form_is_at_least_half_of_what_can_be_built(d, radius):
    assert separable(d, radius, 0.5, 1024, 7)[1] <= 2 * N_dr(d, radius, 0.5)


def test_more_radius_or_more_error_separates_no_fewer_keys():
    by_radius = [separable(4, radius, 0.5, 512, 1)[1] for radius in (4.0, 8.0, 16.0, 32.0, 64.0)]
    assert by_radius == sorted(by_radius) and by_radius[0] < by_radius[-1]
    assert separable(4, 16.0, 0.9, 512, 1)[1] <= separable(4, 16.0, 0.0, 512, 1)[1]


def test_a_radius_too_small_for_two_keys_leaves_one():
    result = play("exact", barrier="packing", n=64, d=4, radius=0.5, isolated=False)
    assert (result.n, result.details["repeats"], result.verdict) == (1, 64, "holds")


def what_is_left(m, kept):
    """In few dimensions a lost token's neighbour answers for it: the certificate pays for which rows are right."""
    return 64 * kept - PAID - math.log2(math.comb(m, kept)) - 16


def test_the_floor_is_about_keys_not_tokens():
    """16 keys 8 times over: a window of 16 holds, one of 8 loses half of the rows, whatever n is."""
    family, m = separable(4, 32.0, 0.5, 16, agreed(d=4, dv=1, bits=1, eta=0.5, seed=0)["key_seed"])
    assert m == 16
    shared = agreed(d=4, dv=64, bits=1, eta=0.5, seed=0)
    instance = Packing(**shared, m=16, repeats=8, radius=32.0, public=keys_for(shared, 16, family))
    whole, half = (
        conclude(play_index(f"window(block=1)@{kept}", instance, Hidden(), isolated=False), instance, seed=0)
        for kept in (16, 8)
    )
    assert (whole.verdict, whole.row_success) == ("holds", 1.0)
    assert (half.verdict, half.row_success) == ("breaks", 0.5)
    assert what_is_left(16, 8) < half.certified_bits <= 8 * 64 - PAID


def test_a_window_with_too_little_memory_is_caught():
    result = play("window(block=1)@16", barrier="packing", n=64, d=8, radius=40.0, isolated=False)
    assert (result.n, result.details["repeats"]) == (64, 1)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    assert what_is_left(64, 16) < result.certified_bits <= 16 * 64 - PAID
