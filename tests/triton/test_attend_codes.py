"""The kernel over packed codes gives the attention that torch computes from the unpacked codes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from kvfloor import parse
from kvfloor.core.attend import attend
from kvfloor.core.spec import Spec
from kvfloor.methods.stores import coded, fused_triton
from tests.support import seeded

SERVED = (
    "exact:k4v4",
    "exact:k8v8",
    "exact:k4v8(first=0)",
    "window(block=16):k4v4@150",
    "h2o(block=32):k8v8@150",
    "sinks(block=16):k8v4(first=0)@150",
    "random(block=16):k4v4@150:130:100",
)
OTHERS = ("exact:k3v4", "exact:kivi4(group=32)", "exact:k4v4(recent=8)", "window(block=16):k2v4@150")


def floats(seed: int) -> Any:
    """Return a function of a shape that draws float32 numbers, unless a dtype is given."""
    return partial(seeded(seed), dtype=torch.float32)


def filled(text: str, n: int = 200, **spec: Any) -> Any:
    """Return a state of 3 rows that has seen n tokens."""
    draw = floats(n)
    state: Any = parse(text).open(Spec(3, 40, 24, scale=0.3, **spec))
    dtype = state.spec.dtype
    state.step(draw(3, 2, n, 40, dtype=dtype), draw(3, n, 40, dtype=dtype), draw(3, n, 24, dtype=dtype))
    return state


def excess(state: Any, parts: int | None = 3, m: int = 4) -> float:
    """Return the largest error of means and log-masses against float64, in units of 1.5 times torch's own error.

    The truth is attention in float64 over the numbers that the codes stand for. Torch's own error counts as four units
    in the last place of float32 at least.
    """
    q = floats(1)(3, m, 40, dtype=state.spec.dtype)
    view, spec = state.slots.view(), state.spec
    hide = None if view.live is None else ~view.live.unsqueeze(1)
    own, other = fused_triton.attention(view, q, spec, parts), view.unpacked(q, spec, hide)
    k, v = state.slots.decoded(view, turn=False)
    truth = attend(q.double(), k.double(), v.double(), spec.scale, spec.softcap, None, hide)
    worst = 0.0
    for one, torchs, exact in zip((own.mean, own.log_mass), (other.mean, other.log_mass), truth, strict=True):
        assert one.dtype == torchs.dtype == torch.float32
        least = 4 * torch.finfo(torch.float32).eps * (1 + float(exact.abs().max()))
        unit = 1.5 * max(float((torchs - exact).abs().max()), least)
        worst = max(worst, float((one - exact).abs().max()) / unit)
    return worst


@pytest.mark.parametrize("text", SERVED)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_kernel_answers_as_torch(text: str, softcap: float | None) -> None:
    state = filled(text, softcap=softcap)
    assert fused_triton.serves(state.slots) and int(state.slots.coded.min()) > 64
    assert excess(state) <= 1


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o(block=32):k4v4@150"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_caches_of_16_bits_are_read_too(text: str, dtype: torch.dtype) -> None:
    assert excess(filled(text, dtype=dtype)) <= 1


@pytest.mark.parametrize("n", [1, 5, 31, 40])
@pytest.mark.parametrize("text", ["exact:k4v4", "window(block=16):k4v4@150"])
def test_few_tokens_of_which_none_or_some_are_coded(text: str, n: int) -> None:
    assert excess(filled(text, n)) <= 1


@pytest.mark.parametrize("parts", [1, 2, 50, None])
def test_the_number_of_parts_changes_rounding_alone(parts: int | None) -> None:
    assert excess(filled("exact:k8v8"), parts, m=1) <= 1


@pytest.mark.parametrize("text", OTHERS)
def test_other_codes_are_left_to_torch(text: str) -> None:
    assert not fused_triton.serves(filled(text).slots)


def test_float64_is_left_to_torch() -> None:
    assert not fused_triton.serves(filled("exact:k4v4", dtype=torch.float64).slots)


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o(block=32):k8v8@150"])
def test_a_changed_code_changes_the_answer(text: str) -> None:
    """The mutant: one byte of one token, which torch reads as it was."""
    state = filled(text)
    q = floats(1)(3, 4, 40)
    before = fused_triton.attention(state.slots.view(), q, state.spec)
    state.slots.value_codes.packed[20, 3] ^= 0x77
    after = fused_triton.attention(state.slots.view(), q, state.spec)
    assert float((before.mean - after.mean).abs().max()) > 1e-6
    assert excess(state) <= 1


def test_tokens_without_a_code_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    uncoded = fused_triton._uncoded
    monkeypatch.setattr(fused_triton, "_uncoded", lambda *given: uncoded(*given) & False)
    assert excess(filled("exact:k4v4")) > 100


def test_decode_steps_on_a_device_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the CPU takes the device's part."""
    calls, state = [], filled("exact:k4v4")
    attention = fused_triton.attention
    monkeypatch.setattr(coded, "on_gpu", lambda q: True)
    monkeypatch.setattr(coded.fused, "serves", lambda slots: False)
    monkeypatch.setattr(fused_triton, "attention", lambda *given: (calls.append(1), attention(*given))[1])
    state.step(*(floats(2)(*shape) for shape in ((3, 2, 1, 40), (3, 1, 40), (3, 1, 24))))
    assert calls == [1]
