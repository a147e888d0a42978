"""Planted cheats are named as such, each by the rule that is there for it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from kvfloor.barriers import play
from kvfloor.barriers.decode import Decoded
from kvfloor.barriers.game import Answers
from kvfloor.barriers.spike import _verdict


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Plays a class of planted_cheats.py, importable here and in the fresh process, at a small size."""
    shutil.copy(Path(__file__).with_name("planted_cheats.py"), tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted_cheats", raising=False)
    yield lambda name: play(f"planted_cheats:{name}", n=128, d=32)
    sys.modules.pop("planted_cheats", None)


@pytest.mark.parametrize("name", ["HidesInList", "HidesInGlobal", "HidesInShared"])
def test_memory_that_the_walk_does_not_see_exceeds_the_state_bytes(planted, name):
    result = planted(name)
    assert result.verdict == "cheats"
    assert result.live_certified_bits > 0.99 * result.hidden_bits > 8 * result.state_bytes
    assert "the live state carries" in result.why
    assert result.certified_bits == 0.0


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


def test_a_third_partys_part_is_rebuilt_from_the_text_it_was_given_as(planted):
    result = play("window(block=1)+planted_cheats:Forgets@16", n=64, d=32)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)
    assert result.certified_bits > 0.9 * 16 * 32


def verdict(live_bits=0.0, sent_bits=0.0, message_bytes=10, state_bytes=10, differ=False, success=1.0):
    zeros, answers = torch.zeros(1, 1), torch.ones(1, 1) if differ else torch.zeros(1, 1)
    played = Answers(torch.zeros(1), zeros, zeros, answers, message_bytes, state_bytes, 1.0)
    live, sent = (Decoded(bits, "hard", 0.0, success) for bits in (live_bits, sent_bits))
    return _verdict(played, live, sent, sent_bits)[0]


@pytest.mark.parametrize(
    ("played", "expected"),
    [
        ({}, "holds"),
        ({"live_bits": 80.0, "sent_bits": 80.0}, "holds"),
        ({"live_bits": 81.0, "message_bytes": 100}, "cheats"),
        ({"live_bits": 81.0, "state_bytes": 100}, "cheats"),
        ({"sent_bits": 81.0, "state_bytes": 100}, "cheats"),
        ({"differ": True}, "cheats"),
        ({"success": 0.899}, "breaks"),
        ({"success": 0.9}, "holds"),
        ({"differ": True, "success": 0.1}, "cheats"),
    ],
)
def test_every_rule_of_the_verdict_stands_alone(played, expected):
    assert verdict(**played) == expected
