"""On the hard instance of every barrier, `tiered` answers within the bound that it tells."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from kvfloor.core.partial import Partial
from kvfloor.game import play
from kvfloor.methods.tiered.tiered import TieredState
from tests.certify.test_trials import truth

GAMES: dict[str, dict[str, Any]] = {
    "spike": {},
    "spike, fine values": {"bits": 8},
    "spike, bfloat16": {"dtype": "bfloat16", "bits": 8},
    "codebook": {"codebook": 160},
    "packing": {"barrier": "packing", "d": 8},
    "sparse": {"barrier": "sparse"},
    "window": {"barrier": "window"},
    "window, appending": {"barrier": "window", "append": True},
    "probing": {"barrier": "probing", "runs": 32},
    "two caches": {"barrier": "tensor", "d": 48},
    "visual": {"barrier": "visual", "sides": (2, 3, 5)},
}


class Witness:
    """Compare every answer of every `tiered` state with attention in float64 over the tokens as they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: float = 0.0) -> None:
        self.answers = self.wrong = self.unsure = 0
        read = TieredState._read

        def watched(state: TieredState, q: Tensor) -> Partial:
            found, view = state.read_certified(q), state.slots.view()
            told, relative = found.bound, found.relative
            given = truth(q, view.k, view.v, state.spec)
            answer = read(state, q)
            error = (answer.mean.double() + spoil - given).norm(dim=-1)
            self.answers += error.numel()
            self.wrong += int((~(error <= told)).sum())
            self.unsure += int((relative > state.method.epsilon).sum())
            return answer

        monkeypatch.setattr(TieredState, "_read", watched)


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("epsilon", [0.2, 0.01])
def test_no_answer_is_wrong_without_saying_so(monkeypatch: pytest.MonkeyPatch, game: str, epsilon: float) -> None:
    witness = Witness(monkeypatch)
    method = f"tiered(epsilon={epsilon},page=16,first=0,recent=0)"
    result = play(method, **{"n": 128, "d": 32, "isolated": False, "hidden_seed": 1} | GAMES[game])
    assert witness.answers > 16
    assert witness.wrong == witness.unsure == 0
    assert result.verdict == "holds" or GAMES[game].get("bits")  # the finest levels lie closer than epsilon


def test_the_witness_sees_an_answer_that_is_off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch, spoil=1e-3)
    play("tiered(epsilon=1e-4,page=16,first=0,recent=0)", n=128, d=32, isolated=False, hidden_seed=1)
    assert witness.wrong == witness.answers > 16


def test_the_codes_are_really_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """At an epsilon that the codes alone certify, the hidden bits come from codes: few tokens are fetched."""
    fetched = []
    read = TieredState._read

    def counted(state: TieredState, q: Tensor) -> Partial:
        answer = read(state, q)
        fetched.append((state.tally.queries, state.tally.unfetched))
        return answer

    monkeypatch.setattr(TieredState, "_read", counted)
    play("tiered(epsilon=0.2,page=16,first=0,recent=0)", n=128, d=32, isolated=False, hidden_seed=1)
    queries, unfetched = fetched[-1]
    assert queries >= 128 and unfetched > 0.9 * queries
