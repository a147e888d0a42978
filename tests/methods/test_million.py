"""Streams without an end: bytes stay constant over a million tokens, and clocks step over 2^31 and 2^32 exactly.

No test here waits for two billion tokens: a state of a short stream gets late clocks, as `later` describes.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Method, Spec, State, parse
from kvfloor.core.memory import PUBLIC, Memory
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE

D, GROUP, MILLION, SINKS = 4, 2, 1_000_000, 4
CLOCKS = (2**24, 2**31, 2**32, 2**40)
MASK = 2**64 - 1
SLOW_BY_THE_TOKEN = {"window_sample": 40_000, "balance": 100_000}  # some milliseconds a token: a part of the million


def constant(budget: int) -> list[Method]:
    """List the registered methods of constant memory, each once, and two sketches whose size their arguments bound."""
    methods = {str(one): one for one in (default_method(name, budget=budget) for name in TABLE)}
    more = (parse("subgen_sketch(delta=1.0,t=2,s=16,centres=16,block=16)"), parse(f"balance@{4 * budget}"))
    return [one for one in (*methods.values(), *more) if one.traits.constant_memory]


def opened(method: Method, rows: int = 1) -> State:
    return method.open(Spec(rows=rows, d=D, dv=D, scale=0.5, seed=7))


def tokens(n: int, seed: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, GROUP, n, D, generator=draw)
    return q, torch.randn(rows, n, D, generator=draw), torch.randn(rows, n, D, generator=draw)


def fast(method: Method) -> Method:
    """Return the method with a long block, if it has one: a block's end is what takes the time."""
    config: Any = method
    return dataclasses.replace(config, block=512) if "block" in vars(config) else method


def length(method: Method, most: int) -> int:
    name = str(method).split("@")[0]
    return next((min(most, n) for part, n in SLOW_BY_THE_TOKEN.items() if name.startswith(part)), most)


def streams_flat(method: Method, n: int, piece: int) -> None:
    state, sizes = opened(method), set()
    for at in range(0, n, piece):
        q, k, v = tokens(min(piece, n - at), at)
        out = state.step(q, k, v)
        sizes.add((state.nbytes, state.peak_nbytes))
        assert bool(torch.isfinite(out).all())
    assert len(sizes) == 1, sizes
    assert state.seen.tolist() == [n]
    again = method.from_bytes(state.to_bytes())
    q, k, v = tokens(600, 1)
    assert torch.equal(again.step(q, k, v), state.step(q, k, v)) and again.to_bytes() == state.to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", constant(64), ids=str)
def test_a_million_tokens_take_no_more_bytes_than_the_first(method: Method) -> None:
    method = fast(method)
    streams_flat(method, length(method, MILLION), 8192)


@pytest.mark.parametrize("method", constant(32), ids=str)
def test_a_thousand_tokens_take_no_more_bytes_than_the_first(method: Method) -> None:
    n = length(method, MILLION) // 200
    streams_flat(fast(method), n, max(n // 5, 100) if n < 1000 else 1000)


def test_a_method_that_keeps_its_tokens_is_not_flat() -> None:
    with pytest.raises(AssertionError):
        streams_flat(parse("exact"), 3000, 1000)


# ---- late clocks -------------------------------------------------------------------------------------------------


def later(part: Any, by: int, first: int) -> None:
    """Move the clocks of a state, and of all its parts, to what they are `by` tokens later.

    Clocks are the tokens seen, and the positions and stamps of tokens from position `first` on; earlier ones, such as
    sinks, stay. What counts absorbed tokens is left as it is.
    """
    for name, value in list(vars(part).items()):
        if name in PUBLIC:
            continue
        if isinstance(value, Memory):
            later(value, by, first)
        elif isinstance(value, Tensor) and name in ("position", "stamp"):
            setattr(part, name, torch.where(value >= first, value + by, value))
        elif isinstance(value, Tensor) and name in ("seen", "met"):
            setattr(part, name, value + by)


SHIFTED_ALIKE = (
    "window(block=8)@16", "sinks(4,block=8)@16", "h2o(block=8,recent=4)@16", "h2o(score=decay,block=8)@16",
    "tova(block=8)@16", "knorm(block=8)@16", "keydiff(block=8)@16", "ridge_leverage(block=8)@16",
    "expected(block=8)@16", "raas(page=4,prompt=evict,block=8)@16", "window(block=8)+moments@16",
    "window(block=8)+taylor@16",
)  # fmt: skip
DRAWN = (
    "random(block=8)@16", "window(block=8)+value_sample@16", "window_sample@16", "balance@64",
    "subgen_sketch(delta=1.0,t=2,s=16,centres=16,block=8)", "window(block=8)+clusters@16",
    "window(block=8)+nystrom@16", "window(block=8)+less@16", "window(block=8)+value_sum@16",
)  # fmt: skip


def at_late_clock(text: str, clock: int, rows: int = 2) -> tuple[State, State, int]:
    """Return a state of 64 tokens, the same with clocks 32 tokens before `clock`, and how much later that is."""
    state = opened(parse(text), rows)
    state.step(*tokens(64, 5, rows))
    moved, by = state.clone(), clock - 32 - 64
    later(moved, by, first=SINKS)
    return state, moved, by


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("text", SHIFTED_ALIKE)
def test_clocks_that_step_over_a_limit_decide_as_small_ones(text: str, clock: int) -> None:
    state, moved, by = at_late_clock(text, clock)
    for seed, n in enumerate((1, 23, 8, 1, 40)):  # past the limit in the third piece
        given = tokens(n, 100 + seed, rows=2)
        assert torch.equal(state.step(*given), moved.step(*given))
    assert moved.seen.tolist() == [clock + 41] * 2
    mine, other = state.slots.view().position, moved.slots.view().position  # type: ignore[union-attr]
    assert torch.equal(torch.where(mine >= SINKS, mine + by, mine), other)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("text", SHIFTED_ALIKE + DRAWN)
def test_any_cutting_gives_the_same_state_across_a_limit(text: str, clock: int) -> None:
    _, one, _ = at_late_clock(text, clock)
    other = one.clone()
    q, k, v = tokens(73, 9, rows=2)
    one.step(q, k, v)
    for low, high in ((0, 1), (1, 31), (31, 32), (32, 33), (33, 73)):
        out = other.step(q[:, :, low:high], k[:, low:high], v[:, low:high])
        assert bool(torch.isfinite(out).all())
    assert one.to_bytes() == other.to_bytes()


def test_stamps_of_32_bits_are_found_out() -> None:
    state, moved, by = at_late_clock("raas(page=4,prompt=evict,block=8)@16", 2**31)
    narrow = moved.clone()
    columns: Any = narrow.slots.columns  # type: ignore[union-attr]
    columns.stamp = columns.stamp.to(torch.int32)
    stamps = []
    for one in (state, moved, narrow):
        one.step(*tokens(73, 9, rows=2))
        stamps.append(one.slots.column("stamp", None, 16).long())  # type: ignore[union-attr]
    assert torch.equal(stamps[0] + by, stamps[1]) and not torch.equal(stamps[0] + by, stamps[2])


def mixed(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@pytest.mark.parametrize("clock", [*CLOCKS, 2**62])
def test_draws_at_late_positions_are_those_of_whole_numbers(clock: int) -> None:
    key = int(row_keys(3, torch.tensor([5]), "somewhere"))
    counters = range(clock - 3, clock + 3)
    drawn = uniform(torch.tensor([key]), torch.tensor(list(counters)))
    for number, counter in zip(drawn.tolist(), counters, strict=True):
        bits = mixed(mixed((key + counter * 0x9E3779B97F4A7C15) & MASK) ^ counter)
        assert number == ((bits >> 12) + 0.5) * 2.0**-52
    assert len(set(drawn.tolist())) == 6


@pytest.mark.parametrize("start", [2**24 - 2, 2**31 - 2, 2**32 - 2])
@pytest.mark.parametrize("summary", ["clusters(m=2)", "nystrom(m=2)", "moments", "value_sum", "value_sample"])
def test_counts_step_over_a_limit_exactly(summary: str, start: int) -> None:
    """One key again and again, so that all tokens are one cluster: the count is exact, and the mass its logarithm."""
    state: Any = opened(parse(f"window(block=1)+{summary}@1"))
    k = torch.ones(1, 1, D)
    for _ in range(4):
        state.append(k, k)
    held = state.summary.count
    state.summary.count = torch.where(held == held.max(), held + start, held)
    if summary == "value_sum":
        state.summary.total += float(start)
    if summary == "value_sample":
        state.summary.count = held + start
    before = int(state.summary.count.sum())
    for _ in range(9):
        state.append(k, k)
    assert int(state.summary.count.sum()) == before + 9
    if summary.startswith("nystrom"):
        return  # its mass is fitted, not counted
    part = state.summary.read(torch.zeros(1, 1, D))
    assert float(part.log_mass) == pytest.approx(math.log(before + 9), rel=1e-6)
    assert part.mean.flatten().tolist() == pytest.approx([1.0] * D, rel=1e-5)


@pytest.mark.parametrize("start", [2**24, 2**31, 2**32])
def test_means_of_many_tokens_move_as_fractions_say(start: int) -> None:
    """A token that joins a cluster of `start` tokens moves its mean by a fraction; a saturated count moves it more."""
    spec = Spec(1, 1, 1, dtype=torch.float64, seed=0)
    state: Any = parse("window(block=1)+clusters(m=1)@1").open(spec)
    state.append(torch.zeros(1, 2, 1, dtype=torch.float64), torch.zeros(1, 2, 1, dtype=torch.float64))
    state.summary.count += start - 1
    mean, count = Fraction(0), start
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    state.append(ones, ones)  # the last zero leaves the window
    count += 1
    for _ in range(5):
        state.append(ones, ones)
        mean, count = (mean * count + 1) / (count + 1), count + 1
    assert int(state.summary.count) == count
    assert float(state.summary.mean_k) == pytest.approx(float(mean), rel=1e-12)


@pytest.mark.parametrize("start", [2**24, 2**31, 2**32])
def test_clusters_of_a_sketch_weigh_what_they_count(start: int) -> None:
    state: Any = opened(parse("subgen_sketch(delta=1.0,t=2,s=4,centres=2,block=2)"))
    k = torch.ones(1, 2, D)
    state.append(k, k)
    state.keys.count[0, 0] += start - 2
    state.pairs.mu += (start - 2) * D
    for _ in range(3):
        state.append(k, k)
    assert int(state.keys.count[0, 0]) == start + 6 and float(state.pairs.mu) == (start + 6) * D
    weights = state.keys.weighted()[1][0, :2].exp()
    assert weights.tolist() == pytest.approx([(start + 6) / 2] * 2, rel=1e-12)
    assert state.pairs.log_weight()[0].exp().tolist() == pytest.approx([(start + 6) / 4] * 4, rel=1e-12)
