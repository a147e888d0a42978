"""Make hidden values repeatable, and make the tests' own methods importable here and in the fresh process."""

import hashlib
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvfloor.game import Result, play
from kvfloor.game.engine import secret as hidden

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive the secret seeds from the test's name instead of the operating system, so that no outcome is luck."""
    count = itertools.count()

    def token_hex(size: int) -> str:
        return hashlib.shake_256(f"{request.node.name}/{next(count)}".encode()).hexdigest(size)

    monkeypatch.setattr(hidden, "secrets", SimpleNamespace(token_hex=token_hex))


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Return `planted`: planted("HidesInList", barrier=..., ...) plays that class of planted_cheats.py.

    The default game is a small spike instance.
    """
    shutil.copy(HERE / "planted_cheats.py", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted_cheats", raising=False)
    yield lambda name, **arguments: play(f"planted_cheats:{name}", **({"n": 128, "d": 32} | arguments))
    sys.modules.pop("planted_cheats", None)
