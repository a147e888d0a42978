"""Lead states of `tiered` through a fixed life, for tests of where their exact tokens are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvfloor import Spec, State
from kvfloor.methods.tiered.tiered import Tiered
from tests.support import Stream, seeded, stream

ROWS, G, N, D, PAGE = 3, 2, 120, 6, 8
PLACES = ("ram", "disk")

Call = Callable[[Any], Tensor | None]


def tokens(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> Stream:
    """Draw a stream whose answers need many exact tokens."""
    q, k, v = stream(seeded(seed), ROWS, G, N, D, dtype=dtype, scale=3.0)
    return q, k, k if tied else v


def opened_at(cold: str, epsilon: float = 0.01, folder: Any = None, **spec: Any) -> Any:
    """Open a state that keeps its exact tokens at this place."""
    where = None if folder is None else str(folder)
    return Tiered(epsilon=epsilon, page=PAGE, recent=0, cold=cold, folder=where).open(Spec(ROWS, D, D, D**-0.5, **spec))


def calls(given: Stream) -> Iterator[tuple[str, Call]]:
    """Yield the calls of a life: prefill, decoding, a chunk with padding, dropped tokens, rows chosen, a long chunk."""
    q, k, v = given
    present = torch.rand(ROWS, N, generator=torch.Generator().manual_seed(1)) > 0.3

    def step(start: int, stop: int, padded: bool = False) -> Call:
        def call(state: State) -> Tensor:
            marks = (present[:, start:stop],) if padded else ()
            return state.step(q[:, :, start:stop], k[:, start:stop], v[:, start:stop], *marks)

        return call

    yield "a prompt", step(0, 44)
    for i in range(44, 49):
        yield f"token {i}", step(i, i + 1)
    yield "a padded chunk", step(49, 70, padded=True)
    yield "a drop", lambda state: state.forget(torch.tensor([0, 0, 1]), torch.tensor([2, 17, 9]))
    yield "a chunk", step(70, 90)
    yield "a choice of rows", lambda state: state.select_rows(torch.tensor([2, 0, 0]))
    for i in range(90, 96):
        yield f"token {i}", step(i, i + 1)
    yield "a last chunk", step(96, 116)
    yield "a question", lambda state: state.read(q[:, 0, 116:]).mean


def live(state: Any, given: Stream) -> list[Tensor]:
    """Make all calls, and return their answers."""
    return [x for x in (call(state) for _, call in calls(given)) if x is not None]
