"""The mask of a compressed layer is a tensor to whoever uses it as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.masking_utils import eager_mask, sdpa_mask

from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.masks import LazyMask, SlotCount, mask_over
from survey.tiny import tiny_config, tiny_model


def sizes(queries: int, offset: int) -> dict[str, Any]:
    """The sizes of a mask over 7 slots, as this release's mask functions take them."""
    if "cache_position" in inspect.signature(sdpa_mask).parameters:
        where: dict[str, Any] = {"cache_position": torch.arange(offset, offset + queries)}
    else:
        where = {"q_length": queries, "q_offset": offset}
    return {"batch_size": 2, "kv_length": 7, "kv_offset": 0, **where}


SIZES = sizes(5, 2)
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
    cut: Any = LazyMask(SIZES | {"attention_mask": PADDED})[:, :, -2:, :]
    assert isinstance(cut, LazyMask) and cut.padding is PADDED
    whole: Any = sdpa_mask(**SIZES, attention_mask=PADDED)
    assert torch.equal(cut.tensor(), whole[:, :, -2:, :])
    assert torch.equal(cut[every, every, slice(1, 2), every], whole[:, :, -1:, :])


def test_stock_attention_goes_without_a_mask_where_it_can() -> None:
    plain = sizes(7, 0)
    assert LazyMask(plain).for_stock() is None and LazyMask(plain).tensor().shape == (2, 1, 7, 7)


def test_only_a_compressed_layer_gets_a_lazy_one_and_a_mask_handed_on_stays_it() -> None:
    layer = CompressedCache(tiny_config("llama"), "exact").compressed[0]
    slots, _ = layer.get_mask_sizes(5)
    assert isinstance(slots, SlotCount) and slots == 5
    made = mask_over("sdpa", **sizes(5, 0) | {"kv_length": slots})
    assert isinstance(made, LazyMask)
    assert mask_over("sdpa", **SIZES | {"kv_length": slots, "attention_mask": made}) is made
    assert isinstance(mask_over("sdpa", **SIZES, attention_mask=PADDED), torch.Tensor)


MOVES: dict[str, Callable[[Any], Any]] = {
    "by position": lambda mask: mask.to("meta"),
    "by name": lambda mask: mask.to(device="meta"),
    "a device": lambda mask: mask.to(torch.device("meta"), non_blocking=True),
}
CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda mask: mask.to(torch.float64),
    "dtype by name": lambda mask: mask.to(dtype=torch.float64),
    "device and dtype": lambda mask: mask.to("cpu", torch.float64),
    "device and dtype by name": lambda mask: mask.to("cpu", dtype=torch.float64),
    "as another": lambda mask: mask.to(torch.zeros(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_to_a_device_it_is_still_one(move: str) -> None:
    mask: Any = LazyMask(SIZES | {"attention_mask": PADDED, "allow_is_causal_skip": False})
    there = MOVES[move](mask)
    assert isinstance(there, LazyMask) and there.padding is not None and there.plainly_causal
    cut = there[:, :, -2:, :]
    assert {x.device.type for x in (there.padding, there.tensor(), there.for_stock(), cut.tensor())} == {"meta"}
    assert mask.padding is PADDED and mask.tensor().device.type == "cpu"
    assert torch.equal(mask.to("cpu").tensor(), mask.tensor())
    assert MOVES[move](LazyMask(sizes(7, 0))).padding is None


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_any_other_conversion_gives_the_tensor(conversion: str) -> None:
    mask = LazyMask(SIZES | {"attention_mask": PADDED, "allow_is_causal_skip": False})
    converted = CONVERSIONS[conversion](mask)
    assert type(converted) is torch.Tensor and torch.equal(converted, mask.tensor().double())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_model_that_moves_each_layers_arguments_answers_as_without(family: str) -> None:
    def move(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        del module
        send = [name for name, x in kwargs.items() if hasattr(x, "to") and name != "past_key_values"]
        return args, kwargs | {name: kwargs[name].to("cpu", non_blocking=True) for name in send}

    model: Any = prepare(tiny_model(family))
    ids = torch.randint(1, 98, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = CompressedCache(model.config, "sinks(2,block=4)@8")
        parts = [(0, 25), (25, 30)]
        return torch.cat(
            [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for a, b in parts], 1
        )

    right = logits()
    for layer in model.model.layers:
        for module in (layer, layer.self_attn):
            module.register_forward_pre_hook(move, with_kwargs=True)
    assert torch.equal(logits(), right)
