"""Codes of 1 to 8 bits are packed into the bytes that they need, and read back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfloor.methods.stores.packing import looked_up, pack, planes, size, unpack

shapes = st.tuples(st.integers(0, 3), st.integers(1, 4))
bits = st.integers(1, 8)
widths = st.integers(1, 70)
seeds = st.integers(0, 2**30)


def codes(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def require_round_trip(packer: Callable[[Tensor, int], Tensor], code: Tensor, bits: int) -> None:
    packed = packer(code, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*code.shape[:-1], size(code.shape[-1], bits))
    assert torch.equal(unpack(packed, code.shape[-1], bits), code)


@given(bits, widths, shapes, seeds)
def test_codes_come_back(bits: int, width: int, shape: tuple[int, int], seed: int) -> None:
    require_round_trip(pack, codes(bits, (*shape, width), seed), bits)


def test_a_packer_that_loses_a_bit_is_found() -> None:
    with pytest.raises(AssertionError):
        require_round_trip(lambda code, bits: pack(code & 2, bits), codes(3, (4, 9), 0), 3)


@given(bits, widths)
def test_every_code_comes_back_at_every_place(bits: int, width: int) -> None:
    code = torch.arange(2**bits, dtype=torch.uint8).unsqueeze(1).expand(-1, width)
    require_round_trip(pack, code, bits)


@given(bits, widths)
def test_bytes_are_few(bits: int, width: int) -> None:
    assert sum(planes(bits)) == bits and set(planes(bits)) <= {1, 2, 4, 8}
    assert width * bits <= 8 * size(width, bits) < width * bits + 8 * len(planes(bits))
    if width % 8 == 0:
        assert size(width, bits) * 8 == width * bits


@given(bits, widths, shapes, seeds)
def test_a_vectors_bytes_depend_on_its_own_codes_alone(
    bits: int, width: int, shape: tuple[int, int], seed: int
) -> None:
    code = codes(bits, (*shape, width), seed)
    spaced = torch.zeros(*shape, 2 * width, dtype=torch.uint8)
    spaced[..., ::2] = code
    packed = pack(code, bits)
    assert torch.equal(pack(spaced[..., ::2], bits), packed)
    for i, j in torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).tolist():
        assert torch.equal(pack(code[i, j], bits), packed[i, j])


@given(bits, widths, shapes, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_a_code_is_read_as_its_level(
    bits: int, width: int, shape: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    code = codes(bits, (*shape, width), seed)
    level = torch.randn(2**bits, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)
    found = looked_up(pack(code, bits), width, bits, level)
    assert found.dtype == dtype and found.shape == code.shape
    assert torch.equal(found, level[code.long()])


def test_what_is_read_may_be_written_to() -> None:
    """The numbers are scaled in place; neither the levels nor a later reading may notice."""
    level = torch.tensor([1.0, 2.0, 4.0, 8.0])
    packed = pack(codes(2, (3, 8), 0), 2)
    before = looked_up(packed, 8, 2, level).clone()
    looked_up(packed, 8, 2, level).mul_(3)
    assert torch.equal(looked_up(packed, 8, 2, level), before) and level.tolist() == [1.0, 2.0, 4.0, 8.0]
