"""The read floor, played against methods: none that answers within eta sends fewer bits."""

import dataclasses

import pytest
import torch

from kvfloor import parse
from kvfloor.floors.measured import readable_by, readable_within
from kvfloor.game.measured import play
from tests.floors.measured import families

METHODS = (
    "exact",
    "quant(bits=8)",
    "quant(bits=4)",
    "window@16",
    "random@24",
    "window+value_sum@16",
    "subgen_sketch(s=64)",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_floor_never_exceeds_the_bytes_of_a_method_that_answers(family, method):
    k = families.keys(family, 48, 48).float()
    found = readable_within(k, radius=1.5, eta=0.05, dv=32, others="present")
    game = play(parse(method), found, k)
    assert found.groups > 0 and not game.contradicts
    assert game.hidden_bits >= found.bits
    if method == "exact":
        assert game.answered == game.decoded == 1.0 and game.worst_error < 1e-4
    if game.answered == 1.0:
        assert game.decoded == 1.0  # what the theorem's proof says, group by group


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_queries_that_see_later_tokens_are_answered_beside_them(softcap, draw):
    k = draw(40, 16, dtype=torch.float32)
    q = 2.0 * k[:20]
    logits = q.double() @ k.double().T
    later = torch.logsumexp(logits if softcap is None else softcap * torch.tanh(logits / softcap), 1)
    found = readable_by(k, q, eta=0.03, dv=16, softcap=softcap, later_mass=later)
    game = play(parse("exact"), found, k)
    assert found.groups > 5 and float(found.weights.max()) < 0.6
    assert game.answered == game.decoded == 1.0


def test_a_window_that_forgets_the_groups_fails_and_one_that_keeps_them_does_not(draw):
    k = draw(64, 32, dtype=torch.float32)
    found = readable_within(k, radius=4.0, eta=0.05, dv=32, others="present")
    assert found.groups == 64
    forgets, keeps = play(parse("window@16"), found, k), play(parse("window@64"), found, k)
    assert forgets.answered < 0.5 and forgets.decoded < 0.6
    assert keeps.answered == keeps.decoded == 1.0


def test_values_in_the_stored_format_are_read_back_in_full():
    """bfloat16 values, exact answers: the grain leaves as many levels as the format tells apart."""
    k = families.keys("orthogonal", 8, 32).float()
    found = readable_within(k, radius=9.0, eta=0.0, dv=16, dtype=torch.float32, most_levels=4096)
    assert set(found.levels.tolist()) == {4096}
    assert play(parse("exact"), found, k).decoded == 1.0


def test_levels_beyond_the_floor_are_read_wrong(draw):
    """The mutant that ignores the leak hides more than the answers show, also for the exact method."""
    k = families.keys("gaussian", 48, 8).float()
    found = readable_within(k, radius=4.0, eta=0.002, dv=32, others="present")
    greedy = dataclasses.replace(families.ignores_the_leak(found), demand=found.demand)
    assert greedy.bits > 1.2 * found.bits
    assert play(parse("exact"), found, k).decoded == 1.0
    assert play(parse("exact"), greedy, k).decoded < 1.0


def test_games_repeat_from_their_seed(draw):
    k = draw(20, 8, dtype=torch.float32)
    found = readable_within(k, radius=3.0, eta=0.05, dv=8)
    method = parse("random@8")
    assert play(method, found, k, seed=3) == play(method, found, k, seed=3)
    assert play(method, found, k, seed=3) != play(method, found, k, seed=4)


def test_nothing_readable_is_an_empty_game(draw):
    k = draw(5, 4, dtype=torch.float32)
    found = readable_by(k, draw(2, 4), eta=0.05, dv=4, later_mass=60.0)
    game = play(parse("exact"), found, k)
    assert (game.answered, game.decoded, game.hidden_bits, game.contradicts) == (1.0, 1.0, 0.0, False)
