"""Define key families of known structure, and mutants of the read floor that claim too much on some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kvfloor.floors.measured import Readable


def keys(name: str, n: int, d: int, seed: int = 0) -> Tensor:
    """Make n keys of one family.

    orthogonal  n <= d axes                         clusters  n / 4 centres with 4 near-duplicates each
    gaussian    normal numbers                      equal     one key n times
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "orthogonal":
        return torch.eye(n, d, dtype=torch.float64) * d**0.5
    if name == "clusters":
        centres = torch.randn(-(-n // 4), d, generator=generator, dtype=torch.float64)
        loose = torch.randn(n, d, generator=generator, dtype=torch.float64)
        return centres.repeat_interleave(4, 0)[:n] + 1e-3 * loose
    if name == "gaussian":
        return torch.randn(n, d, generator=generator, dtype=torch.float64)
    assert name == "equal"
    return torch.ones(n, d, dtype=torch.float64)


FAMILIES = ("orthogonal", "clusters", "gaussian", "equal")


def claims(found: Readable, weights: Tensor, leaks: Tensor) -> Readable:
    """Return the floor that these weights and leaks would give for the same groups."""
    demand = found.demand
    levels, bits = demand.levels(weights, leaks), float(demand.bits(weights, leaks).sum())
    return dataclasses.replace(found, weights=weights, leaks=leaks, levels=levels, bits=bits)


def ignores_the_leak(found: Readable) -> Readable:
    return claims(found, found.weights, torch.zeros_like(found.leaks))


def forgets_later_tokens(found: Readable) -> Readable:
    """Compute weights as if the query did not attend to the tokens after the stored ones, its own included."""
    share = 1.0 / (1.0 + 1.0)  # the tests give as much mass later as stored
    return claims(found, (found.weights / share).clamp_max(1.0), found.leaks / share)


def counts_a_level_too_many(found: Readable) -> Readable:
    return dataclasses.replace(found, levels=found.levels + 1)


def reads_a_group_twice(found: Readable) -> Readable:
    """Count every group a second time, with the same tokens."""
    twice = {name: torch.cat([getattr(found, name)] * 2) for name in ("queries", "asked", "weights", "leaks", "levels")}
    later = None if found.later_mass is None else torch.cat([found.later_mass] * 2)
    return dataclasses.replace(found, **twice, later_mass=later, bits=2 * found.bits)


def subtracts_what_is_not_known_yet(found: Readable) -> Readable:
    """Reverse the order of the groups, but keep the levels of the right order."""
    last = found.groups - 1
    group = torch.where(found.group < 0, found.group, last - found.group)
    flipped = {name: getattr(found, name).flip(0) for name in ("queries", "asked", "weights", "leaks", "levels")}
    later = None if found.later_mass is None else found.later_mass.flip(0)
    return dataclasses.replace(found, group=group, **flipped, later_mass=later)


MUTANTS: tuple[Callable[[Readable], Readable], ...] = (
    ignores_the_leak,
    forgets_later_tokens,
    counts_a_level_too_many,
    reads_a_group_twice,
    subtracts_what_is_not_known_yet,
)
