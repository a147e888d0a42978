"""The spike's constants against a softmax computed on the worst competitors they allow."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors


def mass_ratio(C, others, g, zeros, gamma):
    """(mass elsewhere)/(mass on the spike), all other keys exactly at gap g, `zeros` tokens of logit 0."""
    return others * math.exp(-C * g) + zeros * math.exp(-C * gamma)


@given(st.integers(1, 10**5), st.integers(0, 5), st.floats(0.01, 2.0), st.floats(0.1, 2.0), st.floats(0.001, 0.9))
def test_spike_length_keeps_the_leak(n, z, g, gamma, eps_s):
    C = floors.spike_C(n, z, g, gamma, eps_s)
    assert mass_ratio(C, n - 1, g, z, gamma) <= eps_s * (1 + 1e-9)


def test_a_shorter_spike_leaks_and_so_do_the_mutants():
    n, g, eps_s = 1000, 0.3, 0.125
    C = floors.spike_C(n, 0, g, 1.0, eps_s)
    assert mass_ratio(0.999 * C, n - 1, g, 0, 1.0) > eps_s
    zero_logits_ignored = math.log((n - 1) / eps_s) / 1.5
    assert mass_ratio(zero_logits_ignored, n - 1, 1.5, 4, 1.0) > eps_s
    assert mass_ratio(floors.spike_C(n, 4, 1.5, 1.0, eps_s), n - 1, 1.5, 4, 1.0) <= eps_s


@given(st.integers(1, 5000), st.integers(0, 5000), st.floats(0.05, 1.5), st.floats(0.2, 1.5), st.floats(0.001, 0.9))
def test_window_length_keeps_the_leak(W, older, g, gamma, eps_s):
    n, z = W + older, 2
    C = floors.window_C(W, n, z, g, eps_s, gamma)
    assert mass_ratio(C, W - 1, g, n - W + z, gamma) <= eps_s * (1 + 1e-9)


def test_window_length_of_one_token_alone_is_zero():
    assert floors.window_C(1, 1, 0, 1.0, 0.1) == 0.0


def test_the_papers_length_separates_at_its_coherence():
    n, eta, eps = 1000, 0.5, 0.1
    C = floors.paper_C(n, eta, eps) * 1.0001
    off, on = n * math.exp(C * eps), math.exp(C * (1 - eps))
    assert (1 + eta) * off / (off + on) < (1 - eta) * on / (on + off)


@given(st.floats(0.0, 0.999))
def test_tau_lies_between_all_answers(eta):
    leak = floors.eps_s(eta) / (1.0 + floors.eps_s(eta))
    threshold = floors.tau(eta, leak)
    assert (1 + eta) * leak < threshold < (1 - eta) * (1 - leak)


def test_separation_limit_is_exact():
    eta = 0.5
    for ratio, separates in ((floors.eps_s_limit(eta) * 0.999, True), (floors.eps_s_limit(eta) * 1.001, False)):
        leak = ratio / (1.0 + ratio)
        assert ((1 + eta) * leak < (1 - eta) * (1 - leak)) is separates


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_level_tolerance_decodes_every_level(bits):
    top = 2**bits - 1
    leak = floors.level_eps_s(bits) / (1 + floors.level_eps_s(bits))
    worst = 0.999999 * floors.level_tolerance(bits)
    for level in range(top + 1):
        x = level / top
        for exact in (x * (1 - leak), x * (1 - leak) + leak):
            for sign in (-1, 1):
                assert round((exact + sign * worst) * top) == level
    assert round((0.0 + 1.5 * floors.level_tolerance(bits) + leak) * top) != 0


def test_numbers_by_hand():
    assert floors.eps_s(0.5) == 0.125
    assert floors.tau(0.5, 0.125) == 0.3125
    assert floors.level_eps_s(1) == 1 / 16
    assert floors.spike_C(1025, 0, 0.5, 1.0, 0.125) == pytest.approx(13 * math.log(2) * 2)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\), got 1.0"):
        floors.eps_s(1.0)
    with pytest.raises(ValueError, match="g must be a positive number"):
        floors.spike_C(10, 0, 0.0, 1.0, 0.1)


def test_the_printed_window_constant_is_too_small():
    """Haris & Onak, Appendix F, halves the second logarithm; the proof needs all of it."""
    n, eta, eps = 1000, 0.5, 0.1
    printed = (2 * math.log(n) - math.log((1 - eta) / (1 + eta))) / (2 * (1 - 2 * eps))
    for C, separates in ((printed * 1.0001, False), (floors.paper_C(n, eta, eps) * 1.0001, True)):
        ratio = n * math.exp(-C * (1 - 2 * eps))
        assert ((1 + eta) * ratio < (1 - eta)) is separates
