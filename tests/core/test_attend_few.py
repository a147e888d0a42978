"""The kernel in C for weighted reads agrees with float64, on any number of threads; faults of it are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.core import attend as definition
from kvfloor.core import attend_few as module
from kvfloor.core import log_masses as masses
from kvfloor.core.attend import attend
from kvfloor.core.attend_few import PART, attend_few, serves
from kvfloor.core.log_masses import log_masses
from tests.core.test_attend import error
from tests.faulty_c import faulty
from tests.support import Draw, seeded
from tests.support import attention as oracle

pytestmark = pytest.mark.skipif(module.library() is None, reason="no C compiler here, or no AVX2")

NARROW = [torch.float32, torch.bfloat16]
SHAPES = [
    *((3, 5, 97, 16, 16), (2, 4, 1025, 64, 64), (1, 16, 300, 59, 33)),
    *((2, 1, 1, 8, 8), (2, 3, 64, 1, 1), (1, 7, 129, 24, 40)),
]
"""Rows, queries, tokens, and the widths of keys and values."""


def given(draw: Draw, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, m, s, d, dv = shape
    weight = draw(rows, s, scale=2.0).masked_fill(draw(rows, s) > 1.5, -torch.inf)
    return draw(rows, m, d, dtype=dtype), draw(rows, s, d, dtype=dtype), draw(rows, s, dv, dtype=dtype), weight


def require_right(q: Tensor, k: Tensor, v: Tensor, scale: float, weight: Tensor | None) -> None:
    """Compare with float64: the kernel's sums are in float32, also for bfloat16."""
    assert serves(q, k, v)
    truth = oracle(q, k, v, scale, None, weight)
    found = attend_few(q, k, v, scale, weight)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert error(found[0], truth[0]) < 3e-6 and error(found[1], truth[1]) < 1e-5
    none, alone = attend_few(q, k, None, scale, weight)
    assert none.shape == (*q.shape[:2], 0) and error(alone, truth[1]) < 1e-5


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_with_and_without_weights(draw: Draw, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v, weight = given(draw, dtype, shape)
    for log_weight in (weight, None):
        require_right(q, k, v, shape[3] ** -0.5, log_weight)


def test_threads_of_its_own_give_the_same_bits(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, weight = given(draw, torch.float32, (3, 4, 2 * PART + 100, 64, 64))
    found = []
    for parallel in (module.parallel(), None):
        monkeypatch.setattr(module, "parallel", lambda parallel=parallel: parallel)
        torch.set_num_threads(3)
        try:
            found.append(attend_few(q, k, v, 0.1, weight))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    require_right(q, k, v, 0.1, weight)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_parts_of_long_rows_are_merged_whatever_the_threads(draw: Draw, dtype: torch.dtype) -> None:
    q, k, v, weight = given(draw, dtype, (2, 4, 2 * PART + 100, 128, 128))
    weight[0, PART : 2 * PART] = -torch.inf  # a part without mass
    require_right(q, k, v, 0.1, weight)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(attend_few(q, k, v, 0.1, weight))
        finally:
            torch.set_num_threads(1)
    alone = attend_few(q[1:], k[1:], v[1:], 0.1, weight[1:])
    for i in range(2):
        assert torch.equal(found[0][i], found[1][i]) and torch.equal(found[0][i], found[2][i])
        assert torch.equal(found[0][i][1:], alone[i])


@pytest.mark.parametrize("dtype", NARROW)
def test_it_takes_views_of_larger_memory(draw: Draw, dtype: torch.dtype) -> None:
    q = draw(4, 3, 48, dtype=dtype).transpose(0, 1)
    k, v = draw(3, 200, 96, dtype=dtype)[:, 20:120, :48], draw(100, 3, 40, dtype=dtype).transpose(0, 1)
    require_right(q, k, v, 0.2, draw(100, 3).mT)
    require_right(q, k[:1].expand(3, -1, -1), v, 0.2, draw(1, 100).expand(3, -1))


def test_numbers_beside_a_key_or_a_value_are_not_read(draw: Draw) -> None:
    wide = torch.full((2, 50, 40), torch.nan)
    wide[..., :13] = draw(2, 50, 13, dtype=torch.float32)
    q = draw(2, 4, 13, dtype=torch.float32)
    require_right(q, wide[..., :13], wide[..., :13], 0.3, None)
    require_right(q.bfloat16(), wide.bfloat16()[..., :13], wide.bfloat16()[..., :11], 0.3, None)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_without_weight_has_mean_zero_and_no_mass(draw: Draw, dtype: torch.dtype) -> None:
    q, k, v, _ = given(draw, dtype, (2, 3, 130, 16, 16))
    weight = torch.zeros(2, 130).index_fill(0, torch.tensor([0]), -torch.inf)
    mean, log_mass = attend_few(q, k, v, 1.0, weight)
    assert torch.equal(mean[0], torch.zeros(3, 16)) and bool((log_mass[0] == -torch.inf).all())
    require_right(q, k, v, 1.0, weight)


@pytest.mark.parametrize("dtype", NARROW)
def test_logits_of_ten_thousand_stay_finite(draw: Draw, dtype: torch.dtype) -> None:
    q, v = torch.full((1, 1, 4), 50.0, dtype=dtype), draw(1, 3, 4, dtype=dtype)
    k = torch.tensor([[[50.0] * 4, [-50.0] * 4, [0.0] * 4]], dtype=dtype)
    mean, log_mass = attend_few(q, k, v, 1.0)
    assert error(mean, v[:, :1].double()) < 1e-6 and log_mass.item() == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_told_by_the_queries_that_see_it(draw: Draw, value: float) -> None:
    for at in ("key", "query", "weight"):
        q, k, v, weight = given(draw, torch.float32, (2, 3, 500, 16, 16))
        weight = weight.float()
        changed = {"key": k[1, 70], "query": q[1], "weight": weight[1, 300:301]}[at]
        changed.fill_(value)
        mean, log_mass = attend_few(q, k, v, 1.0, weight)
        assert bool(mean[1].isnan().all() & log_mass[1].isnan().all() & mean[0].isfinite().all())


def test_others_are_not_served(draw: Draw) -> None:
    q, k, v = (draw(2, n, 16, dtype=torch.float32) for n in (3, 50, 50))
    assert serves(q, k, v)
    assert not serves(q, k.bfloat16(), v) and not serves(q.half(), k.half(), v.half())
    assert not serves(q.double(), k.double(), v.double()) and not serves(draw(2, 17, 16, dtype=torch.float32), k, v)
    assert not serves(q[:, :0], k, v) and not serves(q, k[:, :0], v[:, :0])
    assert not serves(q, k.mT.contiguous().mT, v) and not serves(q, k, v.mT.contiguous().mT)
    assert not serves(q, k, torch.zeros(2, 50, 1025))
    asked = q.clone().requires_grad_()
    assert not serves(asked, k, v)
    with torch.no_grad():
        assert serves(asked, k, v)


def test_weighted_reads_and_log_masses_are_its(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, weight = given(draw, torch.bfloat16, (2, 4, 100, 16, 16))
    called: list[bool] = []
    for place in (definition, masses):
        monkeypatch.setattr(place, "attend_few", lambda *given: called.append(given[2] is None) or attend_few(*given))
    attend(q, k, v, 1.0, None, weight)
    log_masses(q, k, 1.0, None, weight)
    log_masses(q, k, 1.0)
    assert called == [False, True, True]
    for more in ({"softcap": 2.0}, {"hide": torch.zeros(1, 1, 100, dtype=torch.bool)}):
        attend(q, k, v, 1.0, log_weight=weight, **more)
        log_masses(q, k, 1.0, log_weight=weight, **more)
    for backend in ("flash", "eager"):
        attend(q, k, v, 1.0, None, weight, backend=backend)
    attend(q, k, v, 1.0)
    assert len(called) == 3


def test_without_a_compiler_torch_answers(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, weight = given(draw, torch.float32, (2, 4, 100, 16, 16))
    mine = attend(q, k, v, 1.0, None, weight)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(module, "library", module.library.__wrapped__)
    assert not serves(q, k, v)
    for found, wanted in zip(attend(q, k, v, 1.0, None, weight), mine, strict=True):
        assert error(found, wanted.double()) < 1e-5


def test_other_structures_and_other_processors_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("int64_t part, narrow; ", "int64_t part, narrow, more; ")
    with monkeypatch.context() as changed:
        changed.setattr(module, "SOURCE", faulty(module.SOURCE, tmp_path / "source", more))
        assert module.loaded(tmp_path / "made") is None
    monkeypatch.setattr(module.native, "instructions", lambda: ())
    assert module.loaded(tmp_path / "made") is None


FAULTS = (
    ("logit[i] += weight[i]", "logit[i] += 0"),
    ("load(logit + i) + load(weight + i)", "load(logit + i)"),
    ("seen->mass *= seen->fade;", ""),
    ("(float)exp((double)seen->top - higher)", "1.0f"),
    ("* seen[j].fade;\n            y[j]", ";\n            y[j]"),
    ("one + a->k_token : one;", "one : one;"),
    ("logit[i] = -INFINITY;", "logit[i] = 0;"),
    ("from + a->part < a->s ? from + a->part", "from + a->part < a->s ? from + a->part - 1"),
    ("row * a->w_row + start", "start"),
    ("p * r + 0.5f", "p * r + 0.4999f"),
    ("for (; at < a->dv; at += LANES)", "for (; at + LANES <= a->dv; at += LANES)"),
    ("value * weight[j * TILE + i]", "value * weight[i]"),
    ("if (_mm256_movemask_ps(finite) != 0xff) seen->lost = 1;", ""),
    ("(row * groups + group) * QUERIES", "(row * groups) * QUERIES"),
    ("mass == 0 ? 0.0f : ", ""),
)


def all_tests(draw: Draw) -> None:
    for shape in ((2, 6, 97, 24, 24), (1, 16, 300, 59, 33)):
        test_it_is_attention_with_and_without_weights(draw, torch.float32, shape)
    test_the_parts_of_long_rows_are_merged_whatever_the_threads(draw, torch.bfloat16)
    test_a_row_without_weight_has_mean_zero_and_no_mass(draw, torch.float32)
    test_what_is_not_a_number_is_told_by_the_queries_that_see_it(draw, torch.nan)


@pytest.mark.parametrize(("right", "fault"), [("", ""), *FAULTS])
def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, fault: str) -> None:
    faults = [(right, fault)] if right else []
    monkeypatch.setattr(module, "SOURCE", faulty(module.SOURCE, tmp_path / "source", *faults))
    monkeypatch.setattr(module, "OPTIONS", ("-O1", *module.OPTIONS[1:]))
    broken: Any = module.loaded(tmp_path / "made")
    monkeypatch.setattr(module, "library", lambda: broken)
    if not right:
        all_tests(seeded(1))
        return
    with pytest.raises(AssertionError):
        all_tests(seeded(1))


def test_a_merge_of_parts_without_their_masses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_joined", lambda mean, log_mass: (mean.mean(1), log_mass.logsumexp(1)))
    with pytest.raises(AssertionError):
        test_the_parts_of_long_rows_are_merged_whatever_the_threads(seeded(0), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "g", "s", "served"),
    [
        (torch.float32, 3, 1024, True),
        (torch.bfloat16, 1, 1024, True),
        (torch.float32, 1, 1024, False),  # torch's kernel is faster for one query of a row
        (torch.float32, 3, 256, False),
        (torch.float16, 3, 1024, False),
    ],
)
def test_the_newest_tokens_queries_are_asked_by_it_on_many_keys(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, g: int, s: int, served: bool
) -> None:
    calls, real = [], definition.attend_few
    monkeypatch.setattr(definition, "attend_few", lambda *given: (calls.append(1), real(*given))[1])
    q, k, v = draw(4, g, 1, 64, dtype=dtype), draw(4, s, 64, dtype=dtype), draw(4, s, 64, dtype=dtype)
    found = definition.attend_newest(q, k, v, 0.125)
    truth = oracle(q.squeeze(2), k, v, 0.125, None)[0].unsqueeze(2)
    assert found.shape == (4, g, 1, 64) and bool(calls) == served
    assert found.dtype == (torch.float32 if dtype == torch.float16 else dtype)  # which no kernel for CPUs takes
    assert error(found, truth) < {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert error(found, truth.roll(1, 0)) > 0.1
