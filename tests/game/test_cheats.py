"""Planted cheats are named as such, each by the rule that is there for it, in every game."""

import pytest
import torch

from kvfloor import parse
from kvfloor.check.index_floor import check_index_floor
from kvfloor.check.law import Broken, Setting
from kvfloor.game import play
from kvfloor.game.engine.decode import Decoded
from kvfloor.game.engine.play import Played
from kvfloor.game.engine.result import judge_bytes


@pytest.mark.parametrize("name", ["HidesInList", "HidesInGlobal", "HidesInShared"])
def test_memory_that_the_walk_does_not_see_exceeds_the_state_bytes(planted, name):
    result = planted(name, isolated=False)
    assert result.verdict == "cheats"
    assert result.live_certified_bits > 0.99 * result.hidden_bits > 8 * result.state_bytes
    assert "the live state carries" in result.why
    assert result.certified_bits == (0.0 if name != "HidesInGlobal" else result.live_certified_bits)


GAMES = {
    "spike": {"heads": 1},
    "codebook": {"barrier": "spike", "codebook": 160},
    "packing": {"barrier": "packing", "d": 8},
    "sparse": {"barrier": "sparse"},
    "window": {"barrier": "window"},
    "window, appending": {"barrier": "window", "append": True},
    "probing": {"barrier": "probing"},
    "two caches": {"barrier": "tensor"},
    "visual": {"barrier": "visual"},
}


@pytest.mark.parametrize("game", GAMES)
def test_a_cheat_is_named_in_every_game(planted, game):
    """Tokens in a list that hangs on the method: alive at Alice's, gone where the message is restored."""
    result = planted("HidesInList", isolated=False, **GAMES[game])
    assert result.live_certified_bits > 0.75 * result.hidden_bits, "the cheat does not play this game well"
    assert (result.verdict, result.certified_bits) == ("cheats", 0.0)
    # 256 clocks are more than probing's 256 bits, so there only the second answer gives the cheat away
    assert result.why.startswith("the live state " + ("and" if game == "probing" else "carries"))


def test_a_cheat_with_two_keys_and_two_values_a_token_is_named_with_four_caches(planted):
    result = planted("HidesPairs", barrier="tensor", n=48, isolated=False)
    assert result.details["caches"] == 4
    assert result.live_certified_bits > 0.99 * result.hidden_bits > 8 * result.state_bytes
    assert result.verdict == "cheats"
    assert "the live state carries" in result.why


def test_a_file_that_outlives_the_process_exceeds_the_message(planted):
    result = planted("HidesInFile")
    assert result.verdict == "cheats"
    assert result.certified_bits > 0.99 * result.hidden_bits
    assert result.certified_bits > 8 * result.state_bytes


def test_idle_bytes_do_not_help_because_both_sides_must_answer_alike(planted):
    result = planted("HidesBehindPadding")
    assert 8 * min(result.state_bytes, result.message_bytes) > result.live_certified_bits > 0.99 * result.hidden_bits
    assert (result.verdict, result.certified_bits) == ("cheats", 0.0)
    assert "answer differently" in result.why


def test_a_state_that_no_message_can_carry_cheats(planted):
    result = planted("HidesInAttribute")
    assert (result.verdict, result.message_bytes, result.certified_bits) == ("cheats", 0, 0.0)
    assert "no message" in result.why


def test_the_fresh_process_sees_an_empty_directory_and_no_environment(planted, monkeypatch):
    monkeypatch.setenv("KVFLOOR_SIDE_CHANNEL", "1")
    result = planted("Spies")
    assert result.verdict == "cheats"
    assert "cwd=[]" in result.why
    assert "isolated=1" in result.why
    assert "KVFLOOR_SIDE_CHANNEL" not in result.why
    assert "HOME" not in result.why


def test_nothing_hidden_in_the_environment_arrives(planted, monkeypatch):
    monkeypatch.setenv("DYLD_LIBRARY_PATH", "")
    result = planted("HidesInEnvironment")
    assert result.live_certified_bits > 0.99 * result.hidden_bits
    assert (result.verdict, result.certified_bits) == ("cheats", 0.0)


def test_both_sides_compute_with_the_same_instructions(planted, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "'ATEN_CPU_CAPABILITY'" in planted("Spies").why


def test_a_third_partys_part_is_rebuilt_from_the_text_it_was_given_as(planted):
    result = play("window(block=1)+planted_cheats:Forgets@16", n=64, d=32)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    assert result.certified_bits > 0.9 * 16 * 32


def test_a_third_partys_policy_is_rebuilt_as_a_store_of_tensor_attention(planted):
    """The oldest 16 of 64 tokens stay, token 0 among them: 30 of 126 rows."""
    result = play("planted_cheats:Oldest(block=1)@16", barrier="tensor", n=64, d=64, isolated=False)
    assert result.details["caches"] == 4
    assert (result.verdict, result.row_success) == ("breaks", pytest.approx(30 / 126))


# ---- the rules, one by one ------------------------------------------------------------------------------------------


def verdict(live_bits=0.0, sent_bits=0.0, message_bytes=10, state_bytes=10, differ=False, success=1.0, restored=True):
    zeros, answers = torch.zeros(1, 1), torch.ones(1, 1) if differ else torch.zeros(1, 1)
    played = Played(
        method="a method", rows=torch.zeros(1), sampled=False, hidden=zeros, live=zeros,
        restored=answers if restored else None, message_bytes=message_bytes, payload_bytes=0, state_bytes=state_bytes,
        why="" if restored else "nobody could answer",
    )  # fmt: skip
    live, sent = (Decoded(bits, "hard", 0.0, success) for bits in (live_bits, sent_bits))
    return judge_bytes(played, live, sent, sent_bits)


@pytest.mark.parametrize(
    ("played", "expected"),
    [
        ({}, "holds"),
        ({"live_bits": 80.0, "sent_bits": 80.0}, "holds"),
        ({"live_bits": 81.0, "message_bytes": 100}, "cheats"),
        ({"live_bits": 81.0, "state_bytes": 100}, "cheats"),
        ({"sent_bits": 81.0, "state_bytes": 100}, "cheats"),
        ({"differ": True}, "cheats"),
        ({"restored": False}, "cheats"),
        ({"success": 0.899}, "breaks"),
        ({"success": 0.9}, "holds"),
        ({"differ": True, "success": 0.1}, "cheats"),
    ],
)
def test_every_rule_of_the_verdict_stands_alone(played, expected):
    assert verdict(**played)[0] == expected


def test_the_reason_says_which_rule_it_was():
    assert verdict(live_bits=81.0, message_bytes=100)[1] == "the live state carries 81 bits, its bytes hold 80"
    assert verdict(sent_bits=81.0, state_bytes=100)[1] == "81 bits were answered, the message holds 80"
    assert verdict(restored=False)[1] == "nobody could answer"
    assert verdict(success=0.5)[1] == "0.500 of the rows are answered, 0.9 are asked for"


# ---- power: memory hidden behind an idle message --------------------------------------------------------------------


def test_memory_behind_an_idle_message_is_found_at_the_default_settings(planted):
    """Its message has 9 bits of room for each hidden value: only values of more bits fill that."""
    one = planted("Grows", isolated=False, bits=1)
    assert (one.verdict, one.unseen_bits) == ("holds", 8 * one.message_bytes - one.certified_bits)
    assert one.unseen_bits > 8 * one.hidden_bits
    found = planted("Grows", isolated=False)
    assert found.verdict == "cheats" and found.why.startswith("with values of 1")
    assert found.certified_bits > 8 * found.message_bytes > found.hidden_bits
    assert planted("Grows", isolated=False, barrier="sparse").verdict == "cheats"


@pytest.mark.parametrize("method", ["exact", "quant(bits=4)", "window(block=1)@64", "optimum"])
def test_honest_methods_keep_their_verdict_and_tell_the_room_that_was_not_filled(method):
    one, both = (play(method, n=128, d=32, isolated=False, hidden_seed=1, **bits) for bits in ({"bits": 1}, {}))
    assert (both.verdict, both.row_success, both.certified_bits) == (one.verdict, one.row_success, one.certified_bits)
    assert 0.0 < both.unseen_bits <= one.unseen_bits
    if method == "exact":  # what remains are the keys, which are public in the game, and clocks
        assert both.details["finer_bits"] == 24 and both.details["finer_certified_bits"] > 0.99 * 24 * 128 * 32
        assert both.unseen_bits < 0.65 * 8 * both.message_bytes < 0.65 * one.unseen_bits * 1.05


def test_formats_hide_no_more_bits_than_they_have(planted):
    for dtype, most in (("float16", 11), ("bfloat16", 8)):
        assert play("exact", n=64, d=32, dtype=dtype, isolated=False).details["finer_bits"] == most


def test_the_conformance_check_finds_it_too(planted):
    planted("Grows", isolated=False, bits=1)  # puts the module on the path
    with pytest.raises(Broken, match="hidden bits"):
        check_index_floor(parse("planted_cheats:Grows"), Setting())
