"""Thirteen kinds of cheat, played as a user plays them: default settings, and a fresh process that gets the message."""

import socket
import sys
from pathlib import Path

import pytest

KINDS = {  # the class, and what gives it away
    "a list on the method": ("HidesInList", "cheats"),
    "a global": ("HidesInGlobal", "cheats"),
    "tensors said to be shared": ("HidesInShared", "cheats"),
    "a file": ("HidesInFile", "cheats"),
    "a variable of the environment": ("HidesInEnvironment", "cheats"),
    "an attribute that no message carries": ("HidesInAttribute", "cheats"),
    "shared memory": ("HidesInSharedMemory", "cheats"),
    "a daemon": ("HidesInDaemon", "cheats"),
    "the method's text": ("HidesInText", "cheats"),
    "idle bytes, as many as are hidden and more": ("HidesBehindPadding", "cheats"),
    "idle bytes, as many as single bits need": ("Grows", "cheats"),
    "bits inverted just under the threshold, behind idle bytes": ("Lies", "cheats"),
    "a seed that is guessed": ("GuessesSeed", "breaks"),
}

ARRIVE = ("HidesInFile", "HidesInSharedMemory", "HidesInDaemon")
"""Hiding places that a fresh process can reach: it answers rightly, with more bits than the message has."""


@pytest.fixture
def no_traces(tmp_path):
    yield
    for block in Path("/dev/shm").glob(f"kvfloor-planted-{tmp_path.name}-*"):
        block.unlink()
    with socket.socket(socket.AF_UNIX) as line:
        if line.connect_ex(f"\0kvfloor-planted-{tmp_path.name}") == 0:
            line.sendall(b"end")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="daemons and shared memory are hidden as Linux has them")
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_caught(planted, no_traces, monkeypatch, kind):
    monkeypatch.setenv("DYLD_LIBRARY_PATH", "")
    cls, verdict = KINDS[kind]
    result = planted(cls)
    assert result.verdict == verdict, result.why
    assert result.live_certified_bits > 0.9 * result.hidden_bits or cls in ("GuessesSeed", "Lies"), "it plays badly"
    if cls in ARRIVE:
        assert result.certified_bits > 8 * result.message_bytes
