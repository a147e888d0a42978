"""The attention product: the eager definition against float64 softmax, and the fused path against both."""

import pytest
import torch
from torch import Tensor

from kvfloor.core import attend as kernel
from kvfloor.core.attend import attend, attend_causal, attend_newest, weigh
from tests.support import Draw, later, stream
from tests.support import attention as oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUSED = [torch.float32, torch.bfloat16]


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference; equal infinities agree, any NaN is an infinite error."""
    same = found.double() == wanted
    return float(torch.where(same, 0.0, (found.double() - wanted).abs()).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_eager_equals_float64_attention_on_the_same_inputs(draw: Draw, dtype: torch.dtype, softcap: float) -> None:
    q, k, v = (draw(3, size, 16, dtype=dtype) for size in (5, 97, 97))
    mean, log_mass = attend(q, k, v, 0.25, softcap, backend="eager")
    wanted_mean, wanted_log_mass = oracle(q, k, v, 0.25, softcap)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert error(mean, wanted_mean) < tolerance and error(log_mass, wanted_log_mass) < tolerance * 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_and_masses_come_in_the_compute_dtype(draw: Draw, dtype: torch.dtype) -> None:
    mean, log_mass = attend(*(draw(1, 2, 4, dtype=dtype) for _ in range(3)), 1.0)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == wanted and log_mass.dtype == wanted


# The fused path rounds bfloat16 weights to bfloat16: 8 bits, on weights that sum to one.
FUSED_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize(("d", "s"), [(1, 97), (16, 1), (59, 97), (64, 2), (128, 1025)])
def test_fused_equals_float64_attention_within_rounding(draw: Draw, dtype: torch.dtype, d: int, s: int) -> None:
    q, k, v = (draw(2, size, d, dtype=dtype) for size in (3, s, s))
    mean, log_mass = attend(q, k, v, d**-0.5, backend="flash")
    wanted_mean, wanted_log_mass = oracle(q, k, v, d**-0.5)
    assert error(mean, wanted_mean) < FUSED_TOLERANCE[dtype]
    assert error(log_mass, wanted_log_mass) < 1e-4


@pytest.mark.parametrize("dtype", FUSED)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hiding", [None, "one for all", "per row", "per query"])
def test_fused_applies_weights_and_masks(draw: Draw, dtype: torch.dtype, weighted: bool, hiding: str | None) -> None:
    q, k, v = (draw(3, size, 32, dtype=dtype) for size in (4, 600, 600))
    log_weight = draw(3, 600, dtype=torch.float32, scale=2.0) if weighted else None
    shapes = {"one for all": (1, 1, 600), "per row": (3, 1, 600), "per query": (3, 4, 600)}
    hide = None if hiding is None else draw(*shapes[hiding]) > 0.5
    mean, log_mass = attend(q, k, v, 0.2, None, log_weight, hide, backend="flash")
    wanted_mean, wanted_log_mass = oracle(q, k, v, 0.2, None, log_weight, hide)
    assert error(mean, wanted_mean) < FUSED_TOLERANCE[dtype]
    assert error(log_mass, wanted_log_mass) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "flash"])
@pytest.mark.parametrize("dtype", FUSED)
def test_a_query_that_sees_nothing_gets_zero_and_no_mass(draw: Draw, dtype: torch.dtype, backend: str) -> None:
    q, k, v = (draw(2, size, 8, dtype=dtype) for size in (3, 20, 20))
    hide = torch.zeros(2, 3, 20, dtype=torch.bool)
    hide[1, 2] = True
    mean, log_mass = attend(q, k, v, 1.0, None, None, hide, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(mean[1, 2], torch.zeros(8)) and log_mass[1, 2] == -torch.inf
    wanted_mean, wanted_log_mass = oracle(q, k, v, 1.0, None, None, hide)
    assert error(mean, wanted_mean) < FUSED_TOLERANCE[dtype] and error(log_mass, wanted_log_mass) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "flash"])
def test_tokens_of_weight_zero_are_not_there(draw: Draw, backend: str) -> None:
    q, k, v = (draw(1, size, 8, dtype=torch.float32) for size in (2, 9, 9))
    mean, log_mass = attend(q, k, v, 1.0, None, torch.full((1, 9), -torch.inf), backend=backend)  # type: ignore[arg-type]
    assert torch.equal(mean, torch.zeros(1, 2, 8))
    assert torch.equal(log_mass, torch.full((1, 2), -torch.inf))


def test_a_long_hidden_prefix_does_not_poison_the_fused_path(draw: Draw) -> None:
    q, k, v = (draw(1, size, 16, dtype=torch.float32) for size in (2, 3000, 3000))
    hide = (torch.arange(3000) < 2990).view(1, 1, -1)
    mean, log_mass = attend(q, k, v, 1.0, None, None, hide, backend="flash")
    wanted_mean, wanted_log_mass = oracle(q, k, v, 1.0, None, None, hide)
    assert error(mean, wanted_mean) < 3e-6 and error(log_mass, wanted_log_mass) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_logits_of_ten_thousand_stay_finite(draw: Draw, dtype: torch.dtype, backend: str) -> None:
    q, v = torch.full((1, 1, 4), 50.0, dtype=dtype), draw(1, 3, 4, dtype=dtype)
    k = torch.tensor([[[50.0] * 4, [-50.0] * 4, [0.0] * 4]], dtype=dtype)
    mean, log_mass = attend(q, k, v, 1.0, backend=backend)  # type: ignore[arg-type]
    assert error(mean, v[:, :1].double()) < 1e-2 * (dtype == torch.bfloat16) + 1e-6
    assert log_mass.item() == pytest.approx(1e4, rel=1e-6)


def test_a_softcap_bounds_the_log_mass(draw: Draw) -> None:
    q, k, v = draw(1, 4, 8, scale=100.0), draw(1, 10, 8, scale=100.0), draw(1, 10, 8)
    _, log_mass = attend(q, k, v, 1.0, softcap=3.0)
    assert bool((log_mass.abs() <= 3.0 + torch.log(torch.tensor(10.0))).all())


@pytest.mark.parametrize(("m", "s"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries_or_no_keys_give_empty_shapes_and_empty_partials(m: int, s: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.ones(2, size, 4, dtype=dtype) for size in (m, s, s))
    mean, log_mass = attend(q, k, v, 1.0)
    assert mean.shape == (2, m, 4) and log_mass.shape == (2, m)
    assert bool((mean == 0).all()) and (s > 0 or bool((log_mass == -torch.inf).all()))


def test_unequal_widths_are_answered_by_the_definition(draw: Draw) -> None:
    q, k, v = draw(2, 3, 8, dtype=torch.float32), draw(2, 9, 8, dtype=torch.float32), draw(2, 9, 5, dtype=torch.float32)
    assert error(attend(q, k, v, 1.0)[0], oracle(q, k, v, 1.0)[0]) < 1e-6
    with pytest.raises(ValueError, match="d == dv"):
        attend(q, k, v, 1.0, backend="flash")


def test_weights_sum_to_one_and_make_the_mean(draw: Draw) -> None:
    q, k, v = draw(2, 3, 4), draw(2, 7, 4), draw(2, 7, 4)
    hide = draw(2, 3, 7) > 0.3
    mean, _, weights = weigh(q, k, v, 1.0, None, None, hide)
    seen = ~hide.all(-1)
    torch.testing.assert_close(weights.sum(-1)[seen], torch.ones(int(seen.sum()), dtype=torch.float64))
    assert bool((weights[hide] == 0).all())
    torch.testing.assert_close(weights @ v, mean)


def test_the_fused_path_reads_inputs_of_any_stride(draw: Draw) -> None:
    q, k, v = (draw(2, size, 32, dtype=torch.float32)[..., ::2] for size in (3, 50, 50))
    for found, wanted in zip(attend(q, k, v, 0.25, backend="flash"), oracle(q, k, v, 0.25), strict=True):
        assert error(found, wanted) < 1e-5


def test_every_backend_is_the_path_that_its_name_says(draw: Draw) -> None:
    q, k, v = (draw(2, size, 16, dtype=torch.bfloat16) for size in (3, 200, 200))
    auto, fused, eager = (attend(q, k, v, 1.0, backend=name)[0] for name in ("auto", "flash", "eager"))
    assert torch.equal(auto, fused) and torch.equal(eager, weigh(q, k, v, 1.0)[0])
    assert not torch.equal(fused, eager)  # it rounds its weights to bfloat16


def test_a_torch_without_the_private_operator_is_served_by_the_definition(
    draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (draw(2, size, 8, dtype=torch.float32) for size in (3, 9, 9))
    fused = attend(q, k, v, 1.0)
    monkeypatch.setattr(kernel, "_FLASH", None)
    assert error(attend(q, k, v, 1.0)[0], fused[0].double()) < 1e-6
    with pytest.raises(ValueError, match="fused path"):
        attend(q, k, v, 1.0, backend="flash")


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("dtype", FUSED)
def test_causal_attention_is_attention_with_what_comes_later_hidden(draw: Draw, dtype: torch.dtype, backend) -> None:
    q, k, v = draw(3, 2, 70, 16).to(dtype), draw(3, 70, 16).to(dtype), draw(3, 70, 16).to(dtype)
    hide = later(70).repeat(2, 1)
    wanted = oracle(q.flatten(1, 2), k, v, 0.25, hide=hide)
    for found, right in zip(attend_causal(q, k, v, 0.25, backend=backend), wanted, strict=True):
        assert error(found.flatten(1, 2), right) < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_causal_attention_takes_any_strides_and_the_definition_where_nothing_is_fused(draw: Draw) -> None:
    q, k, v = stream(draw, 3, 2, 16, 70)
    hide = later(70).repeat(2, 1)
    for dtype, softcap in ((torch.float32, None), (torch.float32, 2.0), (torch.float64, None)):
        part = [x.to(dtype).transpose(-1, -2) for x in (q, k, v)]
        wanted = oracle(part[0].flatten(1, 2), part[1], part[2], 0.25, softcap, hide=hide)
        for found, right in zip(attend_causal(*part, 0.25, softcap), wanted, strict=True):
            assert error(found.flatten(1, 2), right) < 1e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_tokens_queries_are_answered_as_by_attend(draw: Draw, dtype: torch.dtype, softcap: float | None) -> None:
    q, k = draw(3, 2, 1, 16).to(dtype), draw(3, 90, 16).to(dtype)[:, :70]  # as slots are: a row's stretch not full
    found = attend_newest(q, k, k, 0.25, softcap)
    assert found.shape == (3, 2, 1, 16)
    wanted = oracle(q.squeeze(2), k, k, 0.25, softcap)[0]
    assert error(found.squeeze(2), wanted) < (1e-5 if dtype in (torch.float32, torch.float64) else 0.02)
