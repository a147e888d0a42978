"""What a cache would hold in a 16-bit model: that is what it holds there."""

from __future__ import annotations

import pytest
import torch

from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.held import Shares, bytes_at_16_bits
from survey.tiny import tiny_model
from tests.hf.conftest import tiny

TOKENS, GROUP = 200, 2


def filled(dtype: torch.dtype, method: str, family: str = "llama") -> CompressedCache:
    model = prepare((tiny() if family == "llama" else tiny_model(family)).to(dtype))
    cache = CompressedCache(model, method, seed=1, context=TOKENS)
    ids = torch.randint(2, 98, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    Dialogue.start(model, cache, 1).feed([ids], 64)
    cache.seal()
    return cache


@pytest.mark.parametrize(
    "method",
    [
        "exact",
        "window@50%",
        "h2o@25%",
        "tova@25%",
        "snapkv@50%",
        "keydiff@25%",
        "expected@50%",
        "ridge_leverage@50%",
        "quant",
        "quant(bits=4)",
        "quant(bits=2)",
        "balance@50%",
        "sinks+moments(covariance=diagonal)@25%",
    ],
)
def test_the_bytes_at_16_bits_are_those_of_a_16_bit_model(method: str) -> None:
    """Halving all bytes, or none, is off by far: codes and positions stay, keys and values shrink."""
    cache = filled(torch.float32, method)
    states = [layer.state for layer in cache.compressed if layer.state is not None]
    known: Shares = {}
    told = bytes_at_16_bits(states, [GROUP] * len(states), TOKENS, known)
    assert len(known) == 1  # one shape of layers is measured once
    assert bytes_at_16_bits(states, [GROUP] * len(states), TOKENS, known) == told
    held = sum(layer.state.nbytes for layer in filled(torch.bfloat16, method).compressed if layer.state is not None)
    assert told == pytest.approx(held, rel=0.01)
    assert sum(state.nbytes for state in states) / 2 < 0.99 * held


def test_a_16_bit_state_is_told_as_it_is() -> None:
    states = [layer.state for layer in filled(torch.bfloat16, "h2o@25%").compressed if layer.state is not None]
    assert bytes_at_16_bits(states, [GROUP] * len(states), TOKENS, {}) == sum(state.nbytes for state in states)
