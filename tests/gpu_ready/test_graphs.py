"""Steps that are captured once and replayed give the answers and the memory of steps that run as they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvfloor.core.graphs import StepGraphs
from kvfloor.core.slots import Slots
from tests.gpu_ready.replayed import recorded
from tests.gpu_ready.streams import filled, tokens

STEPS = 3 * 32 + 5


def both(text: str, **spec: Any) -> tuple[float, bool, int]:
    """Decode with and without graphs; return the largest difference of answers, whether both end alike, and graphs."""
    plain, graphed = filled(text, **spec), filled(text, **spec)
    graphs = StepGraphs(recorded)
    graphed.replay_steps(graphs)  # type: ignore[attr-defined]
    worst = 0.0
    for i in range(STEPS):
        given = tokens(plain.spec.rows, seed=100 + i)
        worst = max(worst, float((plain.step(*given) - graphed.step(*given)).abs().max()))
    return worst, plain.to_bytes() == graphed.to_bytes(), len(graphs.captured)


@pytest.mark.parametrize("text", ["sinks(4)@48", "h2o@48", "random@40", "tova@48", "knorm(block=1)@24"])
def test_replayed_steps_answer_as_others_and_leave_the_same_state(text: str) -> None:
    worst, same, graphs = both(text)
    assert worst == 0.0 and same
    assert graphs == (1 if "block=1" in text else 32)


def test_methods_without_such_steps_run_as_before() -> None:
    assert both("window+value_sum@48") == (0.0, True, 0)
    assert both("sinks(4)@48:40") == (0.0, True, 0)


def test_a_graph_that_writes_one_slot_further_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(work: Any) -> Any:
        write = Slots.write
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Slots, "write", lambda self, at, k, v, bare=None: write(self, at - 1, k, v, bare))
            return recorded(work)

    plain, graphed = filled("sinks(4)@48"), filled("sinks(4)@48")
    graphed.replay_steps(StepGraphs(captured))  # type: ignore[attr-defined]
    worst = 0.0
    for i in range(5):
        given = tokens(2, seed=100 + i)
        worst = max(worst, float((plain.step(*given) - graphed.step(*given)).abs().max()))
    assert worst > 1e-3


def test_memory_that_moves_is_captured_anew() -> None:
    plain, graphed = filled("h2o@48"), filled("h2o@48")
    graphed.replay_steps(StepGraphs(recorded))  # type: ignore[attr-defined]
    for i in range(40):
        if i == 20:
            for state in (plain, graphed):
                state.select_rows(torch.tensor([1, 0]))
        given = tokens(2, seed=100 + i)
        assert torch.equal(plain.step(*given), graphed.step(*given))


def test_a_copy_has_no_graphs() -> None:
    state = filled("sinks(4)@48")
    state.replay_steps(StepGraphs(recorded))  # type: ignore[attr-defined]
    assert state.clone()._known_graphs is None  # type: ignore[attr-defined]
