"""No answer errs more than its bound: random and optimised trials over adversarial families and a model's own keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.methods.tiered.tiered import Tiered, TieredState
from tests.certify.families import FAMILIES, queries
from tests.support import Draw, seeded

EPSILONS = (1e6, 0.05, 0.01, 1e-3, 1e-7, 0.0)
WIDTHS = ((4, 3), (16, 12), (64, 64), (65, 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def truth(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """Return attention of q (rows, m, d) over k and v in float64, of the numbers as they were given."""
    logits = q.double() @ k.double().transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return torch.softmax(logits, -1) @ v.double()


def violations(state: TieredState, q: Tensor, k: Tensor, v: Tensor, *epsilons: float) -> tuple[int, int]:
    """Return how many answers there were, and how many of them err more than their bound."""
    exact, wrong, count = truth(q, k, v, state.spec), 0, 0
    own = 1e-13 * float(v.double().norm(dim=-1).max()) if state.spec.dtype == torch.float64 else 0.0
    for epsilon in epsilons:
        found = state.read_certified(q, epsilon)
        error = (found.partial.mean.double() - exact).norm(dim=-1)
        wrong += int((~(error <= found.bound + own)).sum())
        count += error.numel()
    return count, wrong


def trial(name: str, seed: int, rows: int, n: int, m: int) -> tuple[int, int]:
    """Run one seeded stream of a family; widths, dtype, page and softcap follow from the seed."""
    draw = seeded(1000 * seed + list(FAMILIES).index(name))
    (d, dv), dtype = WIDTHS[seed % 4], DTYPES[seed // 4 % 4]
    k = FAMILIES[name](draw, rows, n, d).to(dtype)
    v = (draw(rows, n, dv) * torch.logspace(-1, 1, n, dtype=torch.float64).unsqueeze(1)).to(dtype)
    q = queries(draw, k.double(), m).to(dtype)
    method = Tiered(page=(16, 64)[seed % 2], recent=(0, 32)[seed % 2], extra=(2, 0, 4)[seed % 3])
    state = method.open(Spec(rows, d, dv, d**-0.5, (None, 4.0)[seed % 5 == 4], dtype=dtype))
    for start in range(0, n, 100):
        state.append(k[:, start : start + 100], v[:, start : start + 100])
    return violations(state, q, k, v, *EPSILONS)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_errs_more_than_its_bound(name: str) -> None:
    found = [trial(name, seed, 2, 150, 24) for seed in (0, 5, 10, 15)]
    assert sum(count for count, _ in found) == 4 * 2 * 24 * 6
    assert sum(wrong for _, wrong in found) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_errs_more_than_its_bound_in_three_hundred_thousand_trials(name: str) -> None:
    """14 families of 21,504 answers each."""
    found = [trial(name, seed, 4, 400, 28) for seed in range(100, 132)]
    assert sum(count for count, _ in found) == 32 * 4 * 28 * 6
    assert sum(wrong for _, wrong in found) == 0


def climbed(draw: Draw, keys: Tensor, starts: int, steps: int) -> tuple[float, float]:
    """Follow the gradient of error over bound from many queries; return the largest ratio at the start, and ever."""
    rows, n, d = keys.shape
    v = draw(rows, n, 3)
    state = Tiered(page=16, recent=0).open(Spec(rows, d, 3, dtype=torch.float64))
    state.append(keys, v)
    assert state.hot is not None
    q = queries(draw, keys, starts).requires_grad_()
    climb, best, first = torch.optim.Adam([q], lr=0.1), 0.0, 0.0
    for _ in range(steps):
        found = state.hot.upright(state.hot.glimpse(q, None)[0].answer()[0])
        error = (found.partial.mean - truth(q, keys, v, state.spec)).norm(dim=-1)
        ratio = (error - 1e-13) / found.bound
        ratio = torch.where(torch.isfinite(found.bound), ratio, 0.0 * q.sum(-1))
        best = max(best, float(ratio.detach().max()))
        first = first or best
        climb.zero_grad()
        (-ratio.clamp_min(1e-12).log().sum()).backward()
        if q.grad is not None:
            q.grad = torch.nan_to_num(q.grad)
        climb.step()
    return first, best


SMOOTH = [name for name in FAMILIES if name not in ("zeros", "edge_of_float16", "duplicates", "heavy_tails")]


@pytest.mark.parametrize("name", ["normal", *SMOOTH[:3]])
def test_queries_that_climb_towards_the_bound_do_not_reach_it(name: str) -> None:
    draw = seeded(5)
    keys = draw(1, 100, 6) * 2 if name == "normal" else FAMILIES[name](draw, 1, 100, 6)
    first, best = climbed(draw, keys, 60, 20)
    assert first < best <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_ten_thousand_climbs_do_not_reach_the_bound(name: str) -> None:
    """10 families of 1,000 starts each."""
    draw = seeded(6)
    first, best = climbed(draw, FAMILIES[name](draw, 4, 80, 6), 250, 60)
    assert first <= best <= 1


@pytest.mark.slow
def test_no_answer_over_a_models_own_keys_errs_more_than_its_bound() -> None:
    """The built-in model reads one of its texts."""
    from characterize.lib.real_keys import record

    tensors, about = record("builtin", "mixture-0", 1024)
    for layer in range(int(about["layers"])):
        q, k, v = (tensors[f"{layer}.{name}"] for name in "qkv")
        state = Tiered(recent=0).open(Spec(len(k), k.shape[2], v.shape[2], float(about["scale"])))
        state.append(k, v)
        count, wrong = violations(state, q[:, :, -128:].flatten(1, 2), k, v, *EPSILONS)
        assert count and not wrong
