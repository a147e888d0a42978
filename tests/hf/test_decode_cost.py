"""A decoded token costs a fixed handful of torch operations per layer; the check for NaN alone reads a number back."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvfloor.core.slots import Slots
from kvfloor.hf import CompressedCache, prepare
from kvfloor.methods.stores import fused
from kvfloor.methods.stores.coded import CodedSlots

LAYERS = 3
BLOCK = 32  # tokens between two evictions
CHECK = {"aten.sum.default": 3, "aten._local_scalar_dense.default": 3}  # of q, k and v
CODED = {"exact:k4v4": (90, 25), "exact:k4v4(recent=16)": (125, 25), "exact:kivi4": (65, 65)} | {
    "sinks(4):k4v4@64": (88, 32),
    "h2o:k8v4@64": (88, 36),
}
"""Operations of methods whose tokens are coded: most without the kernel that reads the codes, and most with it."""
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique", "masked_select")


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(call)] += 1
        return call(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ours = copy.deepcopy(stock)
    prepare(ours)
    return stock, ours


def decoded(model: Any, cache: Any, warm: int = 5) -> dict[str, float]:
    """Return the torch operations of one decoded token, per layer."""
    ids = torch.arange(100).remainder(64).unsqueeze(0)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        for _ in range(warm):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        with Counted() as seen:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    return {name: times / LAYERS for name, times in seen.count.items()}


def beyond(models: tuple[Any, Any], text: str) -> tuple[float, dict[str, float]]:
    """Return how many operations a token has beyond the stock cache's, and by name those it has more of, per layer."""
    stock, ours = (
        decoded(models[0], DynamicCache(config=models[0].config)),
        decoded(models[1], CompressedCache(models[1], text)),
    )
    more = {name: times - stock.get(name, 0.0) for name, times in ours.items()}
    return sum(ours.values()) - sum(stock.values()), {name: times for name, times in more.items() if times > 0}


@pytest.mark.parametrize(
    ("text", "most"), [("exact", 20), ("sinks(4)@64", 20), ("snapkv@64", 20), ("h2o@64", 25), ("tova@64", 25)]
)
def test_a_handful_of_operations(models: tuple[Any, Any], text: str, most: int) -> None:
    operations, more = beyond(models, text)
    assert operations <= most, more
    waiting = {name: times for name, times in more.items() if any(word in name for word in WAITS)}
    assert waiting == {name: times for name, times in CHECK.items() if "scalar" in name}


@pytest.mark.parametrize("text", CODED)
def test_a_bounded_number_of_operations_where_tokens_are_coded(models: tuple[Any, Any], text: str) -> None:
    """With the kernel a handful, as where tokens are kept as given; without it, codes are unpacked by torch."""
    operations, more = beyond(models, text)
    assert operations <= CODED[text][fused.installed()], more
    waiting = {name: times for name, times in more.items() if any(word in name for word in WAITS)}
    assert waiting == {name: times for name, times in CHECK.items() if "scalar" in name}


@pytest.mark.parametrize("text", ["exact:k4v4", "sinks(4):k4v4@64"])
def test_more_operations_are_noticed_where_tokens_are_coded(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The mutant: places and arrays that are looked up anew for every token."""
    monkeypatch.setattr(CodedSlots, "_uncoded_alike", lambda self, width: None)
    monkeypatch.setattr(CodedSlots, "_known_arrays", property(lambda self: None, lambda self, value: None))
    assert beyond(models, text)[0] > CODED[text][fused.installed()]


def test_more_operations_are_noticed(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a token's attention over views that are made anew."""
    monkeypatch.setattr(Slots, "newest", lambda self, q: self.view().newest(q, self.spec))
    monkeypatch.setattr(Slots, "_known_tables", property(lambda self: None, lambda self, value: None))
    assert beyond(models, "sinks(4)@64")[0] > 20


@pytest.mark.parametrize("text", ["sinks(4)@64", "sinks(4):k4v4@64", "exact:k4v4"])
def test_the_count_does_not_grow_with_the_tokens(models: tuple[Any, Any], text: str) -> None:
    short, long = (decoded(models[1], CompressedCache(models[1], text), warm) for warm in (3, 3 + 2 * BLOCK))
    assert sum(short.values()) == sum(long.values())
