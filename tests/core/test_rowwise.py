"""Row-wise arithmetic: the same bits wherever a row stands, however its storage lies and however many threads work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product as pairs

import pytest
import torch
from torch import Tensor

from kvfloor.core.rowwise import aligned, length, logarithm, product, row_by_row, total
from kvfloor.core.summary import lots
from kvfloor.core.tiles import weights_by_tile

# Instruction sets to try where the machine has them: ATen's own loops, and those of MKL, which some builds use.
SETS = (
    {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
)
SIZES = ((32, 153, 17), (1, 153, 17), (31, 33, 17), (7, 9, 5), (64, 128, 65))


@pytest.fixture(params=[1, 2, 4], ids="threads={}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def elsewhere(x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """The rows of x, which of them and as tensors that lie in other ways: fewer, more, moved, transposed, widened."""
    rows = list(range(len(x)))
    yield rows, x
    for row in rows:
        yield [row], x[row : row + 1].clone()
    more = [*rows[::-1], *rows, *rows[1:]]
    yield more, x[more]
    for offset in (1, 3, 7):
        moved = x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        assert moved.data_ptr() % 64
        yield rows, moved
    yield rows, x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield rows, torch.nn.functional.pad(x, (1, 2))[..., 1 : x.shape[-1] + 1]


def require_same_bits(work: Callable[..., Tensor], *columns: Tensor) -> None:
    """`work` gives each row of the columns the same bits in every combination of two ways in which they lie."""
    wanted = work(*columns)
    lying = [list(elsewhere(x)) for x in columns]
    for ways in pairs(*lying) if len(columns) > 1 else zip(*lying, strict=True):
        if len({tuple(rows) for rows, _ in ways}) == 1:
            assert torch.equal(work(*(x for _, x in ways)), wanted[ways[0][0]]), [x.stride() for _, x in ways]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n", "p"), SIZES)
def test_products_round_alike_in_every_place(m: int, n: int, p: int, dtype: torch.dtype) -> None:
    require_same_bits(product, normal(5, m, n, dtype=dtype), normal(5, n, p, dtype=dtype))


def forms(name: str) -> Callable[[Tensor], Tensor]:
    return {
        "total": total,
        "total of the first axis": lambda x: total(x, 1),
        "length": length,
        "logarithm": lambda x: logarithm(x.double().abs() + 0.1),
        "gelu": lambda x: row_by_row(torch.nn.functional.gelu, x),
        "power": lambda x: row_by_row(lambda own: 2.0**own, x),
        "softmax": lambda x: row_by_row(lambda own: own.softmax(-1), x),
        "Cholesky": lambda x: row_by_row(factor, x),
        "distances": lambda x: torch.cdist(x, x[:, :3], compute_mode="donot_use_mm_for_euclid_dist"),
    }[name]


def factor(x: Tensor) -> Tensor:
    gram = x.transpose(1, 2) @ x
    return torch.linalg.cholesky(gram + len(x[0]) * torch.eye(gram.shape[1], dtype=x.dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(32, 17), (700, 17), (33, 64), (5, 3)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("total", "total of the first axis", "length", "logarithm"),
        *("gelu", "power", "softmax", "Cholesky", "distances"),
    ],
)
def test_sums_functions_and_factors_round_alike_in_every_place(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    require_same_bits(forms(name), normal(3, *shape, dtype=dtype))


@pytest.mark.usefixtures("threads")
def test_rows_of_different_length_round_as_each_does_alone() -> None:
    x, held = normal(3, 40, 17), [40, 7, 23]

    def gram(own: Tensor) -> Tensor:
        return (own @ own.transpose(1, 2)).sum(1)

    together = row_by_row(gram, x, held=held, fill=-1.0)
    for row, n in enumerate(held):
        assert torch.equal(together[row, :n], gram(x[row : row + 1, :n].clone())[0])
        assert bool((together[row, n:] == -1.0).all())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tile", [10, 64])
def test_weights_round_alike_beside_any_rows_and_in_any_width(tile: int) -> None:
    q, k, held = normal(3, 5, 17), normal(3, 61, 17), [61, 9, 30]

    def weights(rows: list[int], width: int) -> Tensor:
        hide = torch.arange(width) >= torch.tensor(held)[rows].view(-1, 1, 1).expand(-1, 5, 1)
        own = [held[row] for row in rows]
        parts = weights_by_tile(q[rows], k[rows, :width], 0.3, None, lambda at: hide[..., at], 0, own, tile)
        return torch.cat([part for _, part in parts], -1)

    together = weights([0, 1, 2], 61)
    for row, n in enumerate(held):
        assert torch.equal(weights([row], n)[0], together[row, :, :n])
        assert not bool(together[row, :, n:].any())


def test_a_lot_is_aligned_and_holds_no_other_row() -> None:
    row, k = torch.tensor([0, 0, 0, 2, 2, 5]), normal(6, 17)
    for at, keys in lots(row, k):
        assert torch.equal(keys[0], k[row == at])
        assert keys.data_ptr() % 64 == 0


def test_what_is_aligned_is_not_copied() -> None:
    x = torch.empty(4, 8, dtype=torch.float64)
    assert aligned(x) is x
    assert aligned(x[:, 1:]).data_ptr() % 64 == 0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 1000])
def test_the_total_is_the_sum(n: int) -> None:
    x = normal(3, n, 5)
    torch.testing.assert_close(total(x, 1), x.sum(1), rtol=1e-13, atol=1e-13)


def test_the_logarithm_is_within_a_few_units_in_the_last_place() -> None:
    x = torch.cat([torch.rand(10_000, dtype=torch.float64), 2.0 ** torch.arange(-60.0, 60.0, 0.37).double()])
    x = torch.cat([x[x > 0], torch.tensor([1.0, 1.0 - 2.0**-53, 1.0 + 2.0**-52, 0.5**0.5], dtype=torch.float64)])
    torch.testing.assert_close(logarithm(x), torch.log(x), rtol=1e-15, atol=0.0)


RED = """
import torch
from kvfloor import parse
from kvfloor.check import CHECKS, Setting
torch.set_num_threads(2)
CHECKS["chunking"].run(parse("window+taylor@32"), Setting(g=1))
"""


@pytest.mark.parametrize(
    "chosen", [pytest.param(SETS[0], marks=pytest.mark.slow, id="default"), pytest.param(SETS[1], id="avx2")]
)
def test_sums_of_monomials_keep_their_laws_under_other_instruction_sets(chosen: dict[str, str]) -> None:
    """With MKL's AVX2 kernels and two threads a batched product of 153 x 32 x 17 rounds a row by its place."""
    chosen = chosen | {"OMP_WAIT_POLICY": "PASSIVE"}  # two threads on a busy core would wait for each other
    told = subprocess.run([sys.executable, "-c", RED], env={**os.environ, **chosen}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
