"""Steps prepared once for all layers: what a batch carries is not checked again, and no device is waited for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfloor.core import pool as pool_module
from kvfloor.core.broken import BrokenState
from kvfloor.core.decoding import DecodeBatch
from tests.core.test_pool import SPEC, Engine

LAYERS = 2


def started(text: str = "h2o@24", tokens: int = 40) -> list[Engine]:
    """Return the engines of two layers, in which the requests in blocks 1, 2 and 4 have seen so many tokens."""
    engines = [Engine(text) for _ in range(LAYERS)]
    for engine in engines:
        for block in (1, 2, 4):
            engine.start(block)
            engine.step([block], tokens)
    return engines


def batch_of(engine: Engine, *blocks: int) -> DecodeBatch:
    return engine.pool.batch(torch.tensor(blocks), deferred=True)


def spoiled(engine: Engine, n: int, request: int, which: str, number: float) -> list[Tensor]:
    """Return one token of each of n requests; one entry of the given request's q, k or v is this number."""
    piece = dict(zip("qkv", engine.piece(n, 1), strict=True))
    piece[which][request].flatten()[5] = number
    return list(piece.values())


@pytest.mark.parametrize("text", ["h2o@24", "sinks@24", "sinks+value_sum@24"])
def test_steps_that_put_off_their_check_leave_the_same_bytes(text: str) -> None:
    one, other = Engine(text), Engine(text)
    for engine in (one, other):
        engine.start(0), engine.start(3)
        engine.step([0], 45), engine.step([3], 9)
    for _ in range(40):
        piece, ids = one.piece(2, 1), torch.tensor([3, 0])
        batch = other.pool.batch(ids, deferred=True)
        assert torch.equal(one.pool.step(ids, *piece), other.pool.step(batch, *piece))
        batch.require_finite()
    assert torch.equal(one.memory, other.memory)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", "qkv")
def test_a_number_that_is_not_finite_tears_the_blocks_of_its_request_in_all_layers(which: str, number: float) -> None:
    engines = started()
    batch = batch_of(engines[0], 4, 1)
    engines[0].pool.step(batch, *engines[0].piece(2, 1))
    engines[1].pool.step(batch, *spoiled(engines[1], 2, 0, which, number))
    with pytest.raises(ValueError, match=r"blocks \[4\] had NaN or infinite"):
        batch.require_finite()
    for engine in engines:
        with pytest.raises(BrokenState, match=r"\[4\] are torn, as they got a q, k or v with NaN"):
            engine.pool.step(batch_of(engine, 4, 2), *engine.piece(2, 1))
        engine.pool.step(batch_of(engine, 2, 1), *engine.piece(2, 1))
        engine.start(4)
        assert engine.step([4], 9) < 2e-6
        assert engine.same(4)


@pytest.mark.parametrize("call", ["step", "take", "seal", "copy"])
def test_no_call_reads_what_was_not_checked(call: str) -> None:
    engine = started()[0]
    engine.pool.step(batch_of(engine, 1, 2), *spoiled(engine, 2, 1, "k", torch.nan))
    at = torch.tensor([2])
    with pytest.raises(BrokenState, match="NaN"):
        {
            "step": lambda: engine.pool.step(at, *engine.piece(1, 1)),
            "take": lambda: engine.pool.take(at),
            "seal": lambda: engine.pool.seal(at),
            "copy": lambda: engine.pool.copy(at, torch.tensor([0])),
        }[call]()


def test_nothing_is_evicted_before_the_check() -> None:
    engine = started(tokens=63)[0]
    with pytest.raises(ValueError, match=r"blocks \[2\] had NaN or infinite"):
        engine.pool.step(batch_of(engine, 1, 2), *spoiled(engine, 2, 1, "v", torch.nan))
    with pytest.raises(BrokenState):
        engine.pool.take(torch.tensor([1]))
    assert engine.step([4], 1) < 2e-6
    assert engine.same(4)


def test_a_block_that_is_cleared_is_not_torn_by_an_older_step() -> None:
    engine = started()[0]
    engine.pool.step(batch_of(engine, 1, 2), *spoiled(engine, 2, 1, "q", torch.nan))
    engine.start(2)
    assert engine.step([2], 5) < 2e-6
    assert engine.same(2)


def test_a_batch_is_for_one_token_and_one_step_of_pools_of_one_size() -> None:
    engine, small = started()[0], Engine("h2o@24", blocks=5)
    batch = batch_of(engine, 1, 2)
    with pytest.raises(ValueError, match="for pools of 6 blocks; this one has 5"):
        small.pool.step(batch, *engine.piece(2, 1))
    with pytest.raises(ValueError, match="one token of each request"):
        engine.pool.step(batch, *engine.piece(2, 2))
    engine.pool.step(batch, *engine.piece(2, 1))
    with pytest.raises(ValueError, match="make it anew for each step"):
        engine.pool.step(batch, *engine.piece(2, 1))


def test_a_batch_does_not_open_torn_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started()[0]
    batches = [engine.pool.batch(torch.tensor(blocks)) for blocks in ([1, 2], [2, 4], [4])]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(pool_module, "attend_blocks", fails)
        engine.pool.step(batches[0], *engine.piece(2, 1))
    with pytest.raises(BrokenState, match="a call on them broke off"):
        engine.pool.step(batches[1], *engine.piece(2, 1))
    engine.pool.step(batches[2], *engine.piece(1, 1))


def fails(*_: object) -> None:
    raise MemoryError("injected")


# ---- waiting for a device --------------------------------------------------------------------------------------------


def on_a_device(engine: Engine, batch: DecodeBatch) -> DecodeBatch:
    """Move a pool's memory and a batch to torch's device without numbers: reading one from it raises."""
    pool = engine.pool
    pool._blocks = pool._blocks.to("meta")
    pool._views = {name: view.to("meta") for name, view in pool._views.items()}
    moved = {name: getattr(batch, name).to("meta") for name in ("rows", "seen", "held", "fill")}
    visible = None if batch.visible is None else batch.visible.to("meta")
    return replace(batch, index=moved["rows"], visible=visible, **moved)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("text", ["sinks@24", "h2o@24"])
@pytest.mark.parametrize("deferred", [True, False])
def test_a_step_waits_for_no_device(deferred: bool, text: str, softcap: float | None) -> None:
    """The mutant is the check that is not put off."""
    engine = Engine(text, replace(SPEC, softcap=softcap), tokens=500)
    for block in (1, 3):
        engine.start(block)
        engine.step([block], 40 + block)
    batch = on_a_device(engine, engine.pool.batch(torch.tensor([3, 1]), deferred=deferred))
    q, k, v = (x.to("meta") for x in engine.piece(2, 1))
    if deferred:
        assert engine.pool.step(batch, q, k, v).shape == (2, 2, 2, 1, 16)
    else:
        with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
            engine.pool.step(batch, q, k, v)
