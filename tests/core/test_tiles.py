"""Weights tile by tile: the same numbers as at once, and a dense prefill's scores without a square of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvfloor.core.attend import weigh
from kvfloor.core.tiles import weights_by_tile
from tests.support import Draw, Stream, fed, later, opened, positions, stream


@pytest.mark.parametrize("tile", [1, 3, 16, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiles_put_together_are_the_softmax(draw: Draw, tile: int, softcap: float | None, dtype: torch.dtype) -> None:
    q, k = draw(2, 5, 4, dtype=dtype, scale=5.0), draw(2, 37, 4, dtype=dtype, scale=5.0)
    hide = draw(2, 5, 37) > 0.3
    hide[0, 2], hide[1, 0, :20] = True, True  # a query that sees nothing, and one that sees nothing of the first tiles
    parts = list(weights_by_tile(q, k, 0.7, softcap, lambda at: hide[..., at], tile=tile))
    assert [part[0].start for part in parts] == list(range(0, 37, tile))
    _, _, wanted = weigh(q, k, k, 0.7, softcap, hide=hide)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], -1), wanted, rtol=1e-5, atol=1e-7)


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x._base is None:  # a view takes no memory
                self.elements = max(self.elements, x.numel())
        return out


def dense(text: str, tokens: Stream) -> Any:
    """The state after a prompt of these tokens in two calls."""
    _, k, v = tokens
    state = opened(text, len(k), k.shape[2], v.shape[2], dtype=k.dtype)
    fed(state, tokens, k.shape[1] // 3)
    return state


@pytest.mark.parametrize(("group", "tile"), [("mean", 40), ("mean", 4096), ("max", 40)])
@pytest.mark.parametrize("score", ["sum", "mean", "decay"])
def test_a_dense_prefills_column_sums_equal_their_definition(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, score: str, group: str, tile: int
) -> None:
    monkeypatch.setattr("kvfloor.core.tiles.TILE_SLOTS", tile)
    n, g = 230, 3
    q, k, v = stream(draw, 2, g, n)
    state = dense(f"h2o(prefill=dense,score={score},group={group},decay=0.95)@64", (q, k, v))
    weights = torch.softmax((q @ k.unsqueeze(1).mT).masked_fill(later(n), -torch.inf), -1)
    joined = weights.mean(1) if group == "mean" else weights.amax(1)
    fade = 0.95 ** torch.arange(n - 1, -1, -1.0) if score == "decay" else torch.ones(n)
    wanted = (fade.double() @ joined) / (torch.arange(n, 0, -1) if score == "mean" else 1)
    twin = state.clone()
    twin._show_block(torch.arange(2), n % 32)  # the open block's queries have not been looked at yet
    held = twin._held(None, n)
    torch.testing.assert_close(twin.method.policy.priority(held).double(), wanted, rtol=1e-5, atol=1e-6)
    state.seal()
    for row, kept in enumerate(positions(state)):
        free = wanted[row].clone()
        free[:4], free[n - 32 :] = torch.inf, torch.inf
        assert kept == sorted(free.topk(64).indices.tolist())


@pytest.mark.parametrize(
    ("text", "untiled"),
    [("h2o(prefill=dense)@64", 40_000), ("tova(prefill=dense)@64", 1_400), ("snapkv@64", 40_000)],
)
def test_a_dense_prefill_makes_no_square_of_weights(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, text: str, untiled: int
) -> None:
    """n = 700, g = 2: n x n is 490,000 numbers and a block's weights on all tokens 45,000 (1,400 where only the last
    query is shown); the largest tensor made is the arena of 1,536 slots, or a tile."""
    monkeypatch.setattr("kvfloor.core.tiles.TILE_SLOTS", 64)
    tokens = stream(draw, 1, 2, 700, dtype=torch.float32)
    with Largest() as largest:
        dense(text, tokens).seal()
    assert largest.elements <= 8192
    monkeypatch.setattr("kvfloor.core.tiles.TILE_SLOTS", 4096)
    with Largest() as whole:
        dense(text, tokens).seal()
    assert whole.elements >= untiled
