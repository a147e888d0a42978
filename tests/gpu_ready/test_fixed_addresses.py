"""The memory of a state stays at its addresses while it decodes, and every block is the same work, as CUDA graphs need.

Methods whose steps let the host wait are left out: `test_no_synchronisation` lists them.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from kvfloor.core.blocked import Blocked
from kvfloor.core.slots import Slots
from kvfloor.methods.summaries.value_sum import ValueSumState
from tests.gpu_ready.fake_device import FakeDevice, moved
from tests.gpu_ready.streams import decoded, filled, once, stepped
from tests.gpu_ready.test_no_synchronisation import CONSTANT, listed

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.mark.parametrize("text", [text for text in CONSTANT if not listed(text)])
def test_the_memory_stays_where_it_is(text: str) -> None:
    assert once(text).moved == set()


def test_keys_that_move_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Slots.write

    def moved_away(self: Slots, at: int, k: Tensor, v: Tensor, bare: Tensor | None = None) -> None:
        self.k = self.k.clone()
        write(self, at, k, v, bare)

    monkeypatch.setattr(Slots, "write", moved_away)
    assert decoded("sinks@32").moved == {"slots.k"}


def test_sums_that_move_at_a_block_end_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    absorb = ValueSumState.absorb

    def moved_away(self: ValueSumState, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        self.total = self.total.clone()
        absorb(self, row, k, v, position)

    monkeypatch.setattr(ValueSumState, "absorb", moved_away)
    assert decoded("window+value_sum@32").moved == {"summary.total"}


@pytest.mark.parametrize("text", ["sinks(block=16)@32", "h2o(block=16)@32", "tova(block=16)+value_sum@32"])
def test_two_blocks_are_the_same_work(text: str) -> None:
    """A step is the same operations as the step one block before, so one graph serves both."""
    device = FakeDevice()
    state = moved(filled(text), device)
    assert isinstance(state, Blocked)
    by_place: dict[int, list[list[str]]] = {}
    for _ in range(4 * state.block):
        before, place = len(device.calls), int(state.seen[0]) % state.block
        stepped(state, device, 1)
        by_place.setdefault(place, []).append(device.calls[before:])
    assert all(len(calls) >= 3 and calls[-2] == calls[-1] for calls in by_place.values())
