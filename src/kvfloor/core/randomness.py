"""Draw counter-based random numbers: each is a function of a key and a counter, never of earlier draws.

A key is made from the seed, the row id (`Spec.row_ids`; a row is one stream of tokens) and the purpose of a draw. A
counter is made, for example, from a token's position. No random generator is read or advanced. So a draw does not
depend on other rows, or on how a stream was split into calls. The same holds for a random sample of tokens made by
keeping those with the smallest draws (bottom-k sampling).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from kvfloor.core.rowwise import logarithm

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift the int64 numbers x right by `bits` and fill with zeros; torch's `>>` would copy the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser (Steele, Lea and Flood 2014) to the int64 numbers x, and return x.

    x is overwritten, so pass a tensor that nothing else uses.
    """
    x.bitwise_xor_(_shift(x, 30)).mul_(_MIX1)
    x.bitwise_xor_(_shift(x, 27)).mul_(_MIX2)
    return x.bitwise_xor_(_shift(x, 31))


def row_id(request: int, layer: int, head: int) -> int:
    """Return the number that seeds a row's randomness: a hash of request id, layer and kv head.

    So the same request draws the same random numbers in any batch.
    """
    digest = hashlib.sha256(f"{request}/{layer}/{head}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def row_keys(seed: int, row_ids: Tensor, purpose: str) -> Tensor:
    """Return one int64 key per row, (rows,), for draws of one purpose, such as "random policy".

    A key is a function of the seed, the row id and the purpose.
    """
    digest = hashlib.sha256(f"kvfloor/{purpose}/{seed}".encode()).digest()
    salt = int.from_bytes(digest[:8], "little", signed=True)
    return _mix(_mix(row_ids.to(torch.int64) * _GOLDEN + salt) + salt)


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """Draw float64 numbers uniformly from (0, 1), one per element.

    `keys`, as made by `row_keys`, and `counters` are int64 tensors that are broadcast together. A draw is a function of
    its key and counter.
    """
    bits = _mix(_mix(keys + counters * _GOLDEN).bitwise_xor_(counters))
    return _shift(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)  # 52 bits: the half must not round up to 1


def halfwords(keys: Tensor, counters: Tensor) -> Tensor:
    """Draw four whole numbers from 0 to 65,535 for each element: int64, with a last axis of four more than it.

    `keys`, as made by `row_keys`, and `counters` are int64 tensors that are broadcast together. The draws are a
    function of key and counter, and cost a quarter of what `uniform` does.
    """
    bits = _mix(_mix(keys + counters * _GOLDEN).bitwise_xor_(counters))
    return torch.stack([(bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], -1)


def exponential(keys: Tensor, counters: Tensor) -> Tensor:
    """Draw float64 numbers from the exponential distribution Exp(1), one per element of keys and counters.

    `keys`, as made by `row_keys`, and `counters` are int64 tensors that are broadcast together.
    """
    return -logarithm(uniform(keys, counters))


def normal(keys: Tensor, counters: Tensor) -> Tensor:
    """Draw float64 standard normal numbers (Box and Muller 1958), one per element of keys and counters.

    `keys`, as made by `row_keys`, and `counters` are int64 tensors that are broadcast together.
    """
    length, angle = uniform(keys, 2 * counters), uniform(keys, 2 * counters + 1)
    return torch.sqrt(-2.0 * torch.log(length)) * torch.cos(2.0 * torch.pi * angle)
