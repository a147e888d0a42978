"""Errors of coded tokens, and of attention over them, keep to the bounds that follow from what is stored."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, State, parse
from kvfloor.methods.stores import codes as codes_module
from kvfloor.methods.stores import errors, turn
from kvfloor.methods.stores.codes import ChannelCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.kivi import RangedChannels, RangedTokens
from kvfloor.methods.stores.levels import levels
from kvfloor.statistics import clopper_pearson_limit
from tests.support import Draw, attention, filled, seeded

BITS = (2, 3, 4, 5, 8)
WIDTHS = (1, 2, 3, 17, 64, 96)


def hostile(width: int, bits: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return vectors (t, width) that are hard to code: far from random ones, before or after the rotation."""
    draw, eye = seeded(width + bits), torch.eye(width, dtype=torch.float64)
    outlier = draw(4, width)
    outlier[:, width // 2] *= 1000
    low, high = errors.cells(levels(bits, width).double())
    sign = draw(6, width).sign()
    edges = torch.stack(
        [low[low.argsort()][-1:].expand(width), high[high < 1].amax().expand(width), low[-2:-1].expand(width)]
    )
    mixed = torch.stack([low[torch.arange(width) % len(low)], high.clamp_max(0.9)[torch.arange(width) % len(high)]])
    rotated = torch.cat(
        [eye[: min(width, 8)], torch.cat([edges, mixed[:1], mixed[1:], edges[:1]]) * sign, draw(8, width)]
    )
    given = [eye[:4], torch.ones(1, width), torch.arange(1.0, width + 1).unsqueeze(0), outlier, draw(8, width)]
    one = torch.cat([*(x.double() for x in given), turn.turned_back(rotated)])
    return torch.cat([one, 1e-9 * one, 1e9 * one, torch.zeros(1, width)]).to(dtype)


KINDS: dict[str, Callable[[Spec, int, int], SlotCodes]] = {
    "unbiased": lambda spec, bits, t: TokenCodes(spec, spec.d, bits, t, centred=False, unbiased=True),
    "least squares": lambda spec, bits, t: TokenCodes(spec, spec.d, bits, t, centred=True, unbiased=False),
    "channels": lambda spec, bits, t: ChannelCodes(spec, spec.d, bits, t, t),
    "kivi keys": lambda spec, bits, t: RangedChannels(spec, spec.d, bits, t, t),
    "kivi values": lambda spec, bits, t: RangedTokens(spec, spec.d, bits, t),
}


def errs(kind: str, bits: int, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Code x (rows, t, width) as the first groups; yield (lengths, bounds), then (errors, bounds), each (rows, t)."""
    rows, t, width = x.shape
    spec = Spec(rows, width, width, dtype=x.dtype)
    codes, wide = KINDS[kind](spec, bits, t), x.to(spec.compute_dtype)
    nowhere = torch.zeros(rows, dtype=torch.int64)
    entries = codes.encode(torch.arange(rows), nowhere, wide, torch.ones(rows, t, dtype=torch.bool))
    group = torch.zeros(rows, t, dtype=torch.int64)
    y = codes.decode(entries, None, group).double()
    size, error = codes.bounds(entries, group)
    yield x.double().norm(dim=-1), size.double()
    yield (y - x.double()).norm(dim=-1), error.double()


def require_bounded(kind: str, bits: int, x: Tensor) -> None:
    slack = 64 * torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).eps * x.double().abs().amax()
    for true, bound in errs(kind, bits, x):
        assert bool((true <= bound * (1 + 1e-5) + slack * math.sqrt(x.shape[-1])).all())


@pytest.mark.parametrize(
    ("kind", "bits"), [(kind, bits) for kind in KINDS for bits in ((2, 4, 8) if kind.startswith("kivi") else BITS)]
)
def test_a_vector_errs_by_no_more_than_its_code_tells(kind: str, bits: int) -> None:
    for width in WIDTHS:
        x = hostile(width, bits)
        for one in x.split(len(x) // 3):  # of one magnitude
            require_bounded(kind, bits, one.unsqueeze(0))
        for dtype in (torch.float32, torch.bfloat16):
            require_bounded(kind, bits, x[: len(x) // 3].to(dtype).unsqueeze(0))


def test_the_bound_is_no_more_than_a_few_times_the_error_of_random_vectors() -> None:
    for kind, most in (("unbiased", 3.5), ("least squares", 4.0), ("channels", 2.0), ("kivi values", 2.0)):
        for bits in (2, 4, 8):
            *_, (true, bound) = errs(kind, bits, seeded(bits)(4, 32, 64))
            assert float((bound / true).median()) < most, (kind, bits)


@pytest.mark.parametrize("kind", ["unbiased", "least squares"])
def test_a_scale_that_is_off_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TokenCodes.encode

    def off(self: TokenCodes, *given: Any) -> dict[str, Tensor]:
        entries = real(self, *given)
        return entries | {"scale": entries["scale"] * 1.06}

    x = hostile(64, 8)[:24].unsqueeze(0)
    require_bounded(kind, 8, x)
    monkeypatch.setattr(TokenCodes, "encode", off)
    with pytest.raises(AssertionError):
        require_bounded(kind, 8, x)


def test_cells_that_are_too_narrow_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = errors.cells

    def narrow(level: Tensor) -> tuple[Tensor, Tensor]:
        low, high = real(level)
        size = level.abs()
        return (low + size) / 2, (high + size) / 2

    monkeypatch.setattr(errors, "cells", narrow)
    with pytest.raises(AssertionError):
        for width in WIDTHS:
            require_bounded("unbiased", 4, hostile(width, 4)[:40].unsqueeze(0))


def test_keys_less_a_wrong_centre_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TokenCodes.decode

    def moved(self: TokenCodes, *given: Any) -> Tensor:
        return real(self, *given) + 0.3 * self.centre.unsqueeze(1)

    x = seeded(1)(2, 32, 64) + 3
    require_bounded("least squares", 4, x)
    monkeypatch.setattr(codes_module.TokenCodes, "decode", moved)
    with pytest.raises(AssertionError):
        require_bounded("least squares", 4, x)


# ---- attention -------------------------------------------------------------------------------------------------------


STORED = (
    "exact:k4v4",
    "exact:k3v4(recent=16)",
    "exact:k3v3(first=1)",
    "exact:k8v8(first=0)",
    "exact:kivi4(group=16)",
    "quant(bits=8,group=8)",
)


def filled_with(text: str, n: int = 150, softcap: float | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return (state, keys, values) of a stream with an outlier channel, and a value of zeros."""
    draw, d = seeded(n), 16
    k, v = draw(2, n, d), draw(2, n, d)
    k[..., 3] *= 3
    v[:, n // 2] = 0
    k, v = k.to(dtype), v.to(dtype)
    state = parse(text).open(Spec(2, d, d, scale=0.25, softcap=softcap, dtype=dtype))
    state.append(k, v)
    return state, k, v


def asked(state: State, k: Tensor) -> Tensor:
    """Return queries (2, m, d): random ones of many lengths, and some along the errors of keys."""
    assert state.slots is not None
    view: Any = state.slots.view()
    wrong = view.k.double() - k.double().gather(1, view.position.unsqueeze(-1).expand(-1, -1, k.shape[-1]))
    worst = wrong.norm(dim=-1).topk(4).indices.unsqueeze(-1).expand(-1, -1, k.shape[-1])
    along = wrong.gather(1, worst)
    along = along / along.norm(dim=-1, keepdim=True)
    random = seeded(5)(2, 6, k.shape[-1])
    return torch.cat([random, along, -along, along - 0.1 * random[:, :4]], 1)


def require_kept(state: State, k: Tensor, v: Tensor) -> float:
    """Require the state's guarantee for queries of many lengths; return the largest share of it that is reached."""
    stated, spec, share = state.guarantee(), state.spec, 0.0
    assert stated is not None and stated.holds and stated.delta == 0 and 0 < stated.epsilon < math.inf
    assert state.slots is not None
    position: Any = state.slots.view().position  # type: ignore[union-attr]
    for size in (0.01, 1.0, 4.0, 16.0, 64.0):
        q = (size * asked(state, k)).to(k.dtype)
        answer = state.read(q).mean.double()
        for row in range(spec.rows):
            held = position[row, : int(state.held[row])]
            true, _ = attention(q[row].double(), k[row, held].double(), v[row, held].double(), spec.scale, spec.softcap)
            error = (answer[row] - true).norm(dim=-1)
            limit = stated.epsilon * (spec.scale * q[row].double().norm(dim=-1)).clamp_min(1)
            share = max(share, float((error / limit).max()))
            assert bool((error <= limit + 1e-4).all())
    return share


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("text", STORED)
def test_answers_keep_to_the_guarantee(text: str, softcap: float | None) -> None:
    state, k, v = filled_with(text, softcap=softcap)
    require_kept(state, k, v)
    again = state.method.from_bytes(state.to_bytes())
    assert again.guarantee() == state.guarantee()
    state.forget(torch.tensor([0, 1, 1]), torch.tensor([5, 60, 149]))
    require_kept(state, k, v)
    state.select_rows(torch.tensor([1, 0]))
    require_kept(state, k.flip(0), v.flip(0))


def telling(part: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Return (state, k, v, q) whose answer errs by much of the guarantee, through keys (part 0, 2) or values (1)."""
    k, spec = seeded(4)(1, 32, 16), Spec(1, 16, 16, dtype=torch.float64)
    value = torch.nn.functional.one_hot(torch.tensor([5]), 16).double() * 5
    if part == 1:
        v, q, text = (value + seeded(6)(1, 16)).expand(1, 32, 16), torch.zeros(1, 1, 16).double(), "exact:k8v2(first=0)"
    else:
        text, state = "exact:k3v8(first=0)", parse("exact:k3v8(first=0)").open(spec)
        state.append(k, k)
        wrong = state.slots.view().k - k  # type: ignore[union-attr]
        q = torch.linalg.svd(wrong).Vh[:, :1]  # along which keys err most
        v = (wrong @ q.mT).sign() * value
    state = parse(text).open(spec)
    state.append(k, v)
    return state, k, v, q


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_guarantee_without_one_of_its_parts_is_found(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, k, v, q = telling(part)
    real = type(state.slots).error_bounds
    error = float((state.read(q).mean - attention(q, k, v)[0]).norm())
    assert error <= state.guarantee().epsilon

    def less(self: Any) -> Any:
        bounds = list(real(self))
        bounds[part] = bounds[part] / 16
        return tuple(bounds)

    monkeypatch.setattr(type(state.slots), "error_bounds", less)
    assert error > state.guarantee().epsilon


def test_nothing_coded_is_no_error_and_hopeless_codes_are_told() -> None:
    state, k, v = filled_with("exact:k4v4", 31)
    stated = state.guarantee()
    assert stated.epsilon == 0 and stated.holds
    state = filled("exact:k2v2", 1e3 * k[:1].repeat(1, 3, 1), v[:1].repeat(1, 3, 1))
    stated = state.guarantee()
    assert not stated.holds and "vacuous" in stated.why


@pytest.mark.parametrize("text", ["exact|top_k(k=4):k4v4", "h2o:k4v4@64", "sinks+value_sum:k4v4@64"])
def test_what_leaves_tokens_unread_states_nothing(text: str) -> None:
    assert parse(text).open(Spec(1, 8, 8)).guarantee() is None


# ---- what random rotations would promise -----------------------------------------------------------------------------


def with_signs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    def drawn(width: int, device: str) -> Tensor:
        return 2.0 * torch.randint(0, 2, (2, width), generator=torch.Generator().manual_seed(seed)) - 1.0

    monkeypatch.setattr(turn, "_signs", drawn)


def exceeds_by_chance(turned: Callable[[Tensor], Tensor], width: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return True if, of hostile vectors in 400 draws of the signs, more have a large entry than the theorem allows."""
    x = hostile(width, 4)[:16]
    x = x / x.norm(dim=-1, keepdim=True)
    delta, window, draws = 0.05, 1 << (width.bit_length() - 1), 400
    reach = math.sqrt(2 * math.log(2 * width / delta) / window)
    large = torch.zeros(len(x))
    for seed in range(draws):
        with_signs(monkeypatch, seed)
        large += (turned(x).abs() > reach).any(-1)
    return 1 - clopper_pearson_limit(draws - int(large.max()), draws, 1e-6 / len(x)) > delta


@pytest.mark.parametrize("width", [64, 96])
def test_random_signs_leave_no_large_entry(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not exceeds_by_chance(turn.turned, width, monkeypatch)


def test_one_round_or_none_leaves_large_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_round(x: Tensor) -> Tensor:
        return turn._mixed(x * turn._signs(96, "cpu")[0], 32, 96)

    assert exceeds_by_chance(one_round, 96, monkeypatch)
    assert exceeds_by_chance(lambda x: x, 64, monkeypatch)


def haar_products(x: Tensor, q: Tensor, scale: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Code x (w,) in 2,000 uniformly drawn rotations; return q.(y - x) / (|q - its part along x| |y - x|), (2000,)."""
    w = len(x)
    basis, triangle = torch.linalg.qr(seeded(3)(2000, w, w))
    rotation = basis * triangle.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    level = levels(3, w).double()
    u = (rotation @ x) / x.norm()
    c = level[torch.bucketize(u, (level[1:] + level[:-1]) / 2)]
    y = (rotation.transpose(1, 2) @ (scale(c, u) * x.norm() * c).unsqueeze(-1)).squeeze(-1)
    across = q - x * (q @ x) / (x @ x)
    return ((y - x) @ q) / (across.norm() * (y - x).norm(dim=1))


def share_beyond(reach: float, width: int) -> float:
    """Return the probability that one entry of a uniform unit vector of this width exceeds `reach` >= 0."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    weight = (1 - t * t) ** ((width - 3) / 2)
    return float(weight[t > reach].sum() / weight.sum()) / 2


def within_law(x: Tensor, q: Tensor, scale: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return True if the products' signs and sizes are as those of an entry of a uniform unit vector of width w - 1."""
    z = haar_products(x, q, scale)
    for reach in (0.0, 0.1, 0.2, 0.3):
        share = share_beyond(reach, len(x) - 1)
        for count in (int((z > reach).sum()), int((z < -reach).sum())):
            most = clopper_pearson_limit(count, len(z), 1e-7)
            least = 1 - clopper_pearson_limit(len(z) - count, len(z), 1e-7)
            if not least <= share <= most:
                return False
    return True


def unbiased(c: Tensor, u: Tensor) -> Tensor:
    return 1 / (c * u).sum(-1, keepdim=True)


def least_squares(c: Tensor, u: Tensor) -> Tensor:
    return (c * u).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True)


@pytest.mark.parametrize("which", [0, 4, 5, 6])
def test_uniform_rotations_spread_the_error_over_all_directions_across_the_vector(which: int, draw: Draw) -> None:
    x, noise = hostile(24, 3)[which], draw(24)
    q = x / x.norm() + noise / noise.norm()
    assert within_law(x, q, unbiased)
    assert not within_law(x, q, least_squares)  # which is short of x on average
