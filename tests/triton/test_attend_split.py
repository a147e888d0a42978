"""The kernel that splits attention over the slots agrees with float64, no worse than torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.core import attend as definition
from kvfloor.core import attend_triton
from kvfloor.core.attend import attend, attend_newest
from kvfloor.core.attend_triton import attend_split
from tests.support import seeded

NARROW = (torch.float32, torch.float16, torch.bfloat16)
MORE = 1.5
"""How many times the error of torch's own attention in the same dtype the kernel's may be."""

CASES = (
    # rows, queries, slots, d, dv, parts, softcap, weighted, held slots of each row or None
    (2, 4, 300, 64, 64, 5, None, False, None),
    (3, 1, 130, 128, 128, 1, None, True, None),
    (3, 5, 257, 20, 12, 4, None, True, (257, 0, 77)),
    (1, 17, 100, 80, 96, 3, 5.0, False, (99,)),
    (4, 2, 64, 16, 16, 9, None, False, (1, 64, 63, 2)),
    (2, 3, 90, 32, 32, None, 30.0, True, (1, 90)),
)


def floats(seed: int) -> Any:
    """Return a function of a shape that draws float32 numbers, unless a dtype is given."""
    return partial(seeded(seed), dtype=torch.float32)


def given(case: tuple[Any, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Return q, k and v of a case, and the kernel's further arguments; slots that are not held are NaN."""
    rows, m, slots, d, dv, parts, softcap, weighted, held = case
    draw = floats(rows + slots)
    q, k, v = (draw(rows, n, w, dtype=dtype) for n, w in ((m, d), (slots, d), (slots, dv)))
    count = None if held is None else torch.tensor(held)
    if count is not None:
        beyond = (torch.arange(slots) >= count.unsqueeze(1)).unsqueeze(-1)
        k, v = k.masked_fill(beyond, torch.nan), v.masked_fill(beyond, torch.nan)
    weight = draw(rows, slots) if weighted else None
    more = {"scale": d**-0.5, "softcap": softcap, "log_weight": weight, "count": count, "parts": parts}
    return (2 * q, k, v), more


def errors(kernel: Callable[..., tuple[Tensor, Tensor]], case: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Return the largest errors of (mean, log-mass) against float64, in units of MORE times torch's own error.

    Torch's own error is that of the fused kernel, or of eager attention whose answer is rounded to the dtype, and at
    least four units in the last place of float32.
    """
    (q, k, v), more = given(case, dtype)
    count, weight = more["count"], more["log_weight"]
    hide = None if count is None else (torch.arange(k.shape[1]) >= count.unsqueeze(1)).unsqueeze(1)
    clean = [x.nan_to_num() for x in (q, k, v)]
    wide = None if weight is None else weight.double()
    truth = attend(*(x.double() for x in clean), more["scale"], more["softcap"], wide, hide, backend="eager")
    theirs = attend(*clean, more["scale"], more["softcap"], weight, hide)
    least = 4 * torch.finfo(torch.float32).eps * (1 + truth[0].abs().max())
    found = []
    for own, other, exact in zip(kernel(q, k, v, **more), theirs, truth, strict=True):
        assert own.shape == exact.shape and own.dtype == torch.float32
        some = exact > -torch.inf
        assert torch.equal(some, own > -torch.inf)
        unit = MORE * max(float((other.to(dtype) - exact)[some].abs().max()), float(least))
        found.append(float((own - exact)[some].abs().max()) / unit)
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_attention(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert bool((errors(attend_split, case, dtype) <= 1).all())


def test_a_row_without_a_slot_is_empty() -> None:
    (q, k, v), more = given(CASES[2], torch.float32)
    mean, log_mass = attend_split(q, k, v, **more)
    assert bool((mean[1] == 0).all()) and bool((log_mass[1] == -torch.inf).all())


def test_slots_of_no_weight_are_not_seen() -> None:
    q, k, v = (floats(4)(1, n, 16) for n in (2, 40, 40))
    weight = torch.full((1, 40), -torch.inf)
    assert bool((attend_split(q, k, v, 1.0, log_weight=weight)[1] == -torch.inf).all())
    weight[0, 7] = 0.0
    mean, log_mass = attend_split(q, k, v, 1.0, log_weight=weight)
    assert torch.allclose(mean, v[:, 7:8].expand_as(mean)) and torch.allclose(log_mass, q @ k[0, 7])


def test_a_view_of_a_larger_arena_is_read_in_place() -> None:
    arena = floats(5)(2, 200, 32)
    q, k = floats(6)(2, 3, 32), arena[:, 20:150]
    for own, other in zip(attend_split(q, k, k, 0.2), attend(q, k, k, 0.2), strict=True):
        assert torch.allclose(own, other, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 7, 16])
def test_the_number_of_parts_changes_rounding_alone(parts: int) -> None:
    q, k, v = (floats(7)(2, n, 32) for n in (3, 500, 500))
    one, other = (attend_split(q, k, v, 0.3, parts=n) for n in (1, parts))
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(one, other, strict=True))


def less_one_slot(*given: Any, **more: Any) -> tuple[Tensor, Tensor]:
    count = more.pop("count")
    count = torch.full((len(given[1]),), given[1].shape[1]) if count is None else count
    return attend_split(*given, **more, count=(count - 1).clamp_min(0))


def without_weights(*given: Any, **more: Any) -> tuple[Tensor, Tensor]:
    return attend_split(*given, **more | {"log_weight": None})


def without_cap(*given: Any, **more: Any) -> tuple[Tensor, Tensor]:
    return attend_split(*given, **more | {"softcap": None})


@pytest.mark.parametrize(("mutant", "case"), [(less_one_slot, 0), (without_weights, 1), (without_cap, 3)])
def test_a_kernel_that_leaves_something_out_is_found(mutant: Callable[..., Any], case: int) -> None:
    assert bool((errors(mutant, CASES[case], torch.float32) > 10).all())


def test_parts_that_are_added_without_their_masses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_triton, "merged", lambda mean, mass: (mean.mean(1), mass.logsumexp(1)))
    assert float(errors(attend_split, CASES[0], torch.float32)[0]) > 10


def test_entries_that_lie_apart_are_refused() -> None:
    q, k = floats(8)(1, 2, 16), floats(8)(1, 16, 30).transpose(1, 2)
    with pytest.raises(ValueError, match="must lie together"):
        attend_split(q, k, k, 1.0)


def test_decode_steps_on_a_device_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the CPU takes the device's part."""
    monkeypatch.setattr(definition, "split_applies", lambda q, k, v: True)
    monkeypatch.setattr(definition, "fused", lambda *_: False)
    calls = []
    monkeypatch.setattr(attend_triton, "attend_split", lambda *given: (calls.append(1), attend_split(*given))[1])
    q, k, v = floats(9)(2, 4, 1, 32), floats(10)(2, 50, 32), floats(11)(2, 50, 32)
    answer = attend_newest(q, k, v, 0.2)
    assert calls == [1]
    assert torch.allclose(answer.squeeze(2), attend(q.squeeze(2), k, v, 0.2, backend="eager")[0], atol=1e-6)


def test_a_kernel_that_errs_on_this_machine_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    definition.has_triton.cache_clear()
    assert definition.has_triton()
    for broken in (lambda *given, **more: (torch.zeros(2, 4, 64), torch.zeros(2, 4)), lambda *given, **more: 1 / 0):
        definition.has_triton.cache_clear()
        monkeypatch.setattr(attend_triton, "attend_split", broken)
        with pytest.warns(UserWarning, match="so torch computes attention"):
            assert not definition.has_triton()
    definition.has_triton.cache_clear()
