"""The one-pass sketch: three streams, its stated k-sparse recovery on planted outputs, and what its product costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from characterize.lib import one_pass
from characterize.lib.one_pass import OnePass, OnePassSketch
from kvfloor.core.randomness import uniform

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n: int, k: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in 3 and 2 dimensions whose attention has k large entries per column, in column 1 elsewhere than in 0.

    Keys +-e_1 with values +-1 in column 0, keys +-e_2 in column 1: a query a e_1 gets tanh-like a in column 0 and 0
    in column 1; most queries are (nearly) 0, k of them are +-e_1 and k others +-e_2.
    """
    at = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: 2 * k]
    sign = 1.0 - 2.0 * (torch.arange(n) % 2)
    axis = (torch.arange(n) // 2) % 2
    keys, values = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, 2, dtype=torch.float64)
    keys[torch.arange(n), axis] = sign.double()
    values[torch.arange(n), axis] = sign.double()
    q = noise * normal(n, 3, seed=seed + 1)
    q[at[:k], 0] = sign[:k].double()
    q[at[k:], 1] = sign[:k].double()
    return q, keys, values


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.T, 1) @ v


def feed(sketch: OnePassSketch, q: Tensor, k: Tensor, v: Tensor, piece: int = 10_000) -> OnePassSketch:
    for stream, take in ((v, "take_values"), (k, "take_keys")) if sketch.plan.products else ():
        for part in stream.split(piece):
            getattr(sketch, take)(part)
    if not sketch.plan.products:
        for a, b in zip(k.split(piece), v.split(piece), strict=True):
            sketch.take_pairs(a, b)
    for part in q.split(piece):
        sketch.take_queries(part)
    return sketch


def tail(y: Tensor, k: int) -> float:
    """The l2 norm of y (n,) without its k largest entries: the best k-sparse approximation's error."""
    return float(y.abs().sort(descending=True).values[k:].norm())


def truncated_outputs(sketch: OnePassSketch, q: Tensor) -> Tensor:
    """D^-1 U1 (U2^T V) with the sketch's own product: what Phi sees."""
    u1 = sketch.table.features(q * sketch.plan.scale)
    return (u1 / (u1 @ sketch.total).unsqueeze(1)) @ sketch.product()


def recovered_within(sketch: OnePassSketch, y: Tensor, epsilon: float, beside: float = 0.0) -> bool:
    """Whether every column of the decoded outputs keeps the law's error, `beside` added."""
    found, k = sketch.dense(), sketch.plan.sparsity
    assert all(len(index) <= 2 * k for index, _ in sketch.decode())
    allowed = [(1 + epsilon) * tail(y[:, c], k) + beside for c in range(y.shape[1])]
    return all(float((found[:, c] - y[:, c]).norm()) <= bound + 1e-9 for c, bound in enumerate(allowed))


def misses(runs: int, noise: float) -> int:
    """Runs in which a planted output was not recovered within 1.5 times the best k-sparse error, in a sketch that is
    a seventh as wide and a twelfth as deep as the theorem's."""
    n, k, failed = 512, 4, 0
    q, keys, values = planted(n, k, noise)
    for seed in range(runs):
        plan = OnePass(n, 3, 2, products=None, sparsity=k, buckets=128, depth=9, seed=seed)
        sketch = feed(plan.open(), q, keys, values)
        failed += not recovered_within(sketch, truncated_outputs(sketch, q), epsilon=0.5)
    return failed


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_planted_sparse_outputs_are_recovered_within_the_stated_error(noise: float) -> None:
    assert misses(25, noise) == 0


@pytest.mark.slow
def test_planted_sparse_outputs_are_recovered_over_a_thousand_seeds() -> None:
    assert misses(1000, 0.02) <= 2  # with a failure of 0.01 each, 2 or fewer have probability 0.3 %


def test_the_theorems_sizes_recover_too() -> None:
    n, k, epsilon = 128, 1, 1.0
    q, keys, values = planted(n, k, 0.05)
    buckets, depth = OnePass.sizes(n, 2, k, epsilon, failure=0.01)
    assert buckets == 70 + 4 and depth == 77  # 10 log2 n k / epsilon + 4k; 7 ln(2 n dv / failure), odd
    plan = OnePass(n, 3, 2, degree=8, products=None, sparsity=k, buckets=buckets, depth=depth)
    sketch = feed(plan.open(), q, keys, values)
    assert recovered_within(sketch, truncated_outputs(sketch, q), epsilon)


def test_the_planted_tokens_are_named() -> None:
    q, keys, values = planted(512, 4, 0.0)
    plan = OnePass(512, 3, 2, degree=8, products=None, sparsity=4, buckets=64, depth=5)
    y = attention(q, keys, values)
    for c, (index, value) in enumerate(feed(plan.open(), q, keys, values).decode()):
        assert set(index.tolist()) == set(y[:, c].abs().topk(4).indices.tolist())
        assert float((value - y[index, c]).abs().max()) <= 1e-5


@pytest.mark.parametrize("wrong", ["signs", "buckets"])
def test_a_wrong_hash_is_told(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Without signs the many small entries add up; with one bucket for all, nothing can be told apart."""
    q, keys, values = planted(512, 4, 0.0)
    q[:, 0] += 0.05
    y = attention(q, keys, values)
    monkeypatch.setattr(
        OnePassSketch,
        "_draws",
        lambda self, purpose, counter: (
            torch.zeros_like(counter, dtype=torch.float64)
            if purpose.endswith(wrong)
            else uniform(one_pass.row_keys(self.plan.seed, torch.zeros(1, dtype=torch.int64), purpose), counter)
        ),
    )
    plan = OnePass(512, 3, 2, degree=8, products=None, sparsity=4, buckets=64, depth=5)
    assert not recovered_within(feed(plan.open(), q, keys, values), y, epsilon=0.5, beside=1e-3)


def test_the_streams_may_be_cut_anywhere() -> None:
    q, keys, values = planted(200, 3, 0.02)
    plan = OnePass(200, 3, 2, products=16, sparsity=3)
    whole, cut = feed(plan.open(), q, keys, values), feed(plan.open(), q, keys, values, piece=17)
    torch.testing.assert_close(whole.sketched_queries, cut.sketched_queries, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.product(), cut.product(), rtol=1e-12, atol=1e-12)


def test_the_sketched_product_is_unbiased_with_the_stated_variance() -> None:
    n, seeds, m2 = 60, 400, 8
    q, keys, values = normal(n, 3, seed=1), normal(n, 3, seed=2) * 0.5, normal(n, 2, seed=3)
    products = []
    for seed in range(seeds):
        sketch = OnePass(n, 3, 2, degree=2, products=m2, seed=seed, depth=1, buckets=1).open()
        sketch.take_values(values)
        sketch.take_keys(keys)
        products.append(sketch.product())
    found, u2 = torch.stack(products), sketch.table.features(keys)
    exact = u2.T @ values
    error = found.std(0) / math.sqrt(seeds)
    assert bool(((found.mean(0) - exact).abs() <= 4.5 * error).all())
    squared = (found - exact).square().sum((1, 2))
    assert float(squared.mean()) <= 2 / m2 * float(u2.square().sum() * values.square().sum())
    del q


def test_through_all_three_sketches_the_error_is_the_recoverys_plus_the_products() -> None:
    """|T - y| <= (1 + eps) tail + eps2, eps2 from the product's measured error, over 20 seeds."""
    n, k = 256, 3
    q, keys, values = planted(n, k, 0.01)
    y = attention(q, keys, values)
    for seed in range(20):
        plan = OnePass(n, 3, 2, degree=8, products=256, sparsity=k, buckets=64, depth=7, seed=seed)
        sketch = feed(plan.open(), q, keys, values)
        beside = 2.5 * float((truncated_outputs(sketch, q) - y).norm())
        assert recovered_within(sketch, y, 0.5, beside)


PRODUCT_ROWS = (64, 256, 1024)


def product_errors(n: int) -> dict[int | None, tuple[float, int]]:
    """Relative Frobenius error of all outputs and numbers kept for U2^T V: exact, and sketched with m2 rows."""
    source = torch.Generator().manual_seed(0)
    q, k = (2 * torch.rand(n, 3, generator=source, dtype=torch.float64) - 1 for _ in range(2))
    v = torch.randn(n, 3, generator=source, dtype=torch.float64)
    scale = 1 / 3  # the paper's 1/d: logits within [-1, 1]
    y = attention(scale * q, k, v)
    found: dict[int | None, tuple[float, int]] = {}
    for m2 in (None, *PRODUCT_ROWS):
        sketch = feed(OnePass(n, 3, 3, scale=scale, products=m2, depth=1, buckets=1).open(), q, k, v)
        kept = sketch.numbers - sketch.sketched_queries.numel()
        found[m2] = (float((truncated_outputs(sketch, q) - y).norm() / y.norm()), kept)
    return found


def test_a_cache_needs_no_sketched_product() -> None:
    """k and v come together, so U2^T V is an exact sum of t dv numbers: better and smaller than any sketch of it."""
    found = product_errors(1024)
    exact, size = found[None]
    assert exact < 1e-3
    for m2 in PRODUCT_ROWS:
        assert found[m2][0] > 1000 * exact and found[m2][1] > 10 * size


@pytest.mark.slow
def test_the_table_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    found = product_errors(4096)
    with capsys.disabled():
        for m2, (error, kept) in found.items():
            print(f"\n{'exact' if m2 is None else m2}: relative error {error:.2g}, {kept} numbers", end="")
    assert found[None][0] < 1e-4 and found[64][0] > found[1024][0] > 1.0


def test_the_numbers_are_those_stated() -> None:
    plan = OnePass(1000, 3, 2, degree=4, products=16, buckets=10, depth=3)
    assert plan.open().numbers == 16 * (2 + 35) + 35 + 3 * 10 * (1 + 10) * 35
    plan = OnePass(1000, 3, 2, degree=4, products=None, buckets=10, depth=3)
    assert plan.open().numbers == 35 * 2 + 35 + 3 * 10 * (1 + 10) * 35


def test_what_comes_out_of_order_or_out_of_shape_is_refused() -> None:
    sketch = OnePass(8, 3, 2, products=4).open()
    rows = torch.zeros(8, 3)
    with pytest.raises(ValueError, match="keys come after all 8 values; 0 came so far"):
        sketch.take_keys(rows)
    sketch.take_values(rows[:, :2])
    with pytest.raises(ValueError, match="queries come after all 8 keys"):
        sketch.take_queries(rows)
    with pytest.raises(ValueError, match=r"keys must be \(rows, 3\), got \(8, 2\)"):
        sketch.take_keys(rows[:, :2])
    with pytest.raises(ValueError, match="NaN or infinite"):
        sketch.take_keys(rows * torch.nan)
    with pytest.raises(ValueError, match="9 values came, the sketch is for 8"):
        sketch.take_values(rows[:1, :2])
    with pytest.raises(ValueError, match="values come first"):
        sketch.take_pairs(rows, rows[:, :2])
    with pytest.raises(ValueError, match="use take_pairs"):
        OnePass(8, 3, 2, products=None).open().take_values(rows[:, :2])
    for wrong in ({"degree": 3}, {"depth": 2}, {"n": 0}, {"products": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError):
            OnePass(**({"n": 8, "d": 3, "dv": 2} | wrong))
