"""The mask of a compressed layer is a tensor to whoever uses it as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.masking_utils import eager_mask, sdpa_mask

from kvfloor.hf import CompressedCache
from kvfloor.hf.masks import LazyMask, Slots, mask_over
from survey.tiny import tiny_config

SIZES: dict[str, Any] = {"batch_size": 2, "q_length": 5, "kv_length": 7, "q_offset": 2, "kv_offset": 0}
PADDED = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
USES: dict[str, Callable[[Any], Any]] = {
    "indexing": lambda mask: mask[:, :, 1:3, :4],
    "one row": lambda mask: mask[0],
    "dtype": lambda mask: mask.dtype,
    "shape": lambda mask: mask.shape,
    "size": lambda mask: mask.size(-1),
    "ndim": lambda mask: mask.ndim,
    "device": lambda mask: mask.device,
    "to": lambda mask: mask.to(torch.float64),
    "contiguous": lambda mask: mask.contiguous(),
    "expand": lambda mask: mask.expand(-1, 4, -1, -1),
    "where": lambda mask: torch.where(mask, 1.0, 0.0) if mask.dtype == torch.bool else torch.where(mask == 0, 1.0, 0.0),
    "concatenated": lambda mask: torch.cat([mask, mask], -1),
    "added": lambda mask: mask + torch.ones(5, 7),
    "added to": lambda mask: torch.ones(5, 7) + mask,
    "multiplied": lambda mask: mask * 2,
    "subtracted from": lambda mask: 1.0 - mask.float(),
    "masked": lambda mask: torch.zeros(2, 1, 5, 7).masked_fill(mask != 0, 1.0),
}
BOOLEAN: dict[str, Callable[[Any], Any]] = {
    "inverted": lambda mask: ~mask,
    "and": lambda mask: mask & torch.eye(5, 7, dtype=torch.bool),
    "or": lambda mask: torch.eye(5, 7, dtype=torch.bool) | mask,
}


@pytest.mark.parametrize("form", [sdpa_mask, eager_mask])
@pytest.mark.parametrize("use", USES)
def test_any_use_gives_what_the_tensor_gives(form: Any, use: str) -> None:
    arguments = SIZES | {"attention_mask": PADDED, "allow_is_causal_skip": False}
    mine, right = (USES[use](mask) for mask in (LazyMask(arguments, form), form(**arguments)))
    assert torch.equal(mine, right) if isinstance(right, torch.Tensor) else mine == right


@pytest.mark.parametrize("use", BOOLEAN)
def test_so_does_any_boolean_use(use: str) -> None:
    arguments = SIZES | {"attention_mask": PADDED, "allow_is_causal_skip": False}
    assert torch.equal(BOOLEAN[use](LazyMask(arguments)), BOOLEAN[use](sdpa_mask(**arguments)))


def test_cut_along_its_queries_it_is_still_one() -> None:
    every = slice(None)
    cut = LazyMask(SIZES | {"attention_mask": PADDED})[:, :, -2:, :]
    assert isinstance(cut, LazyMask) and cut.padding is PADDED
    whole: Any = sdpa_mask(**SIZES, attention_mask=PADDED)
    assert torch.equal(cut.tensor(), whole[:, :, -2:, :])
    assert torch.equal(cut[every, every, slice(1, 2), every], whole[:, :, -1:, :])


def test_stock_attention_goes_without_a_mask_where_it_can() -> None:
    plain = SIZES | {"q_length": 7, "q_offset": 0}
    assert LazyMask(plain).for_stock() is None and LazyMask(plain).tensor().shape == (2, 1, 7, 7)


def test_only_a_compressed_layer_gets_a_lazy_one_and_a_mask_handed_on_stays_it() -> None:
    layer = CompressedCache(tiny_config("llama"), "exact").compressed[0]
    slots, _ = layer.get_mask_sizes(5)
    assert isinstance(slots, Slots) and slots == 5
    made = mask_over("sdpa", **SIZES | {"kv_length": slots, "q_offset": 0})
    assert isinstance(made, LazyMask)
    assert mask_over("sdpa", **SIZES | {"kv_length": slots, "attention_mask": made}) is made
    assert isinstance(mask_over("sdpa", **SIZES, attention_mask=PADDED), torch.Tensor)
