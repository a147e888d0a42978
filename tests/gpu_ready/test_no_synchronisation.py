"""A decode step never lets the host wait for the device, block ends included; methods that wait are listed exactly."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.core.rotation import Rotation
from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from tests.check.test_conformance import METHODS, OPTIONS, SELECTING, STORED, SUMMARISING
from tests.gpu_ready.fake_device import DEVICE, FakeDevice, HostWaits, moved
from tests.gpu_ready.streams import PROMPT, D, G, decoded, filled, once, past_a_block_end, stepped, tokens

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

WAITS = {
    "value_sample": "the tokens that leave are split into lots by their row, whose sizes are counted on the device",
    "clusters": "the tokens that leave are split into lots by their row, whose sizes are counted on the device",
    "nystrom": "the tokens that leave are split into lots by their row, whose sizes are counted on the device",
    "moments": "the tokens that leave are split into lots by their row, whose sizes are counted on the device",
    "less": "the kernel that a row uses is looked up on the host at every read",
    "taylor": "degrees are counted on the device at every read",
    "pages": "the pages to read are as many as the fullest row has, which is read from the device",
    "hip": "the search walks as many levels as the fullest row has, which the host sends and waits for",
    "zeta": "the order of the index is looked up with an index that the host sends and waits for",
    "best_first": "the search stops once a bound on the device says so",
    "raas": "a row has as many pages as its held positions touch, which is read from the device",
    "subgen_sketch": "a token opens a cluster, or does not, by its distances on the device",
    "balance": "the halves that stay are chosen on the host",
    "window_sample": "samples fall out of the window at positions that are on the device",
    "stored": "which slots hold the tokens of a group is known on the device only",
}
"""Name of a part of a method -> why decode steps of the methods that have it wait."""

_TEXTS = dict.fromkeys(METHODS + STORED + SUMMARISING + SELECTING + OPTIONS)


def listed(text: str) -> set[str]:
    """Return the parts of a method that are listed in WAITS."""
    method = parse(text)
    parts = method.parts
    named = {part.name for part in (parts.policy, parts.summary, parts.selector) if part is not None}
    stored = parts.store is not None and not parts.store.plain
    return ({*named, re.split(r"[(@]", text)[0]} | ({"stored"} if stored else set())) & WAITS.keys()


def constant(text: str) -> bool:
    return "third_party" not in text and "builtin" not in text and parse(text).traits.constant_memory


CONSTANT = [text for text in _TEXTS if constant(text)]


@pytest.mark.parametrize("text", [text for text in CONSTANT if not listed(text)])
def test_a_decode_step_lets_the_host_wait_for_nothing(text: str) -> None:
    assert once(text).waits == ""


@pytest.mark.parametrize("text", [text for text in CONSTANT if listed(text)])
def test_a_method_that_is_listed_does_wait(text: str) -> None:
    assert once(text).waits != "", f"strike {listed(text)} from the list"


def test_every_entry_of_the_list_is_about_some_method() -> None:
    assert set().union(*(listed(text) for text in CONSTANT)) == WAITS.keys()


def test_the_plain_policies_are_not_listed() -> None:
    free = {re.split(r"[(@]", text)[0] for text in CONSTANT if not listed(text)}
    assert free >= {"window", "sinks", "random", "h2o", "tova", "knorm", "keydiff", "ridge_leverage", "expected"}
    assert free >= {"snapkv", "window+value_sum"}


MUTANTS = {
    "reads a number": lambda k: k.sum().item(),
    "lists numbers": lambda k: k[0, 0].tolist(),
    "copies to the host": lambda k: k.cpu(),
    "copies to the host in place": lambda k: torch.empty(k.shape).copy_(k),
    "sends and waits": lambda k: k + torch.zeros(k.shape).to(k.device),
    "makes a tensor of a list": lambda k: torch.tensor([1.0, 2.0], device=k.device),
    "looks for entries": lambda k: (k > 0).nonzero(),
    "chooses by a mask": lambda k: k[k > 0],
    "writes by a mask": lambda k: k.__setitem__(k > 0, torch.zeros((), device=k.device)),
    "chooses by an index of the host": lambda k: k[torch.zeros(1, dtype=torch.int64)],
    "lists different numbers": lambda k: k.unique(),
    "asks": lambda k: bool((k > 0).any()),
    "compares": lambda k: torch.equal(k, k),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wait_that_is_planted_in_a_step_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Slots.write

    def waiting(self: Slots, at: int, k: Tensor, v: Tensor, bare: Tensor | None = None) -> None:
        MUTANTS[mutant](k)
        write(self, at, k, v, bare)

    assert once("sinks@32").waits == ""
    monkeypatch.setattr(Slots, "write", waiting)
    assert decoded("sinks@32").waits != ""


def test_a_wait_that_is_planted_in_a_block_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    evict = Slots.evict
    monkeypatch.setattr(Slots, "evict", lambda self, leaving, count=None: evict(self, leaving))  # counts on the device
    assert "copies to the host" in decoded("sinks@32").waits


@pytest.mark.parametrize("text", ["sinks(4)@48", "h2o@48", "tova+value_sum@48"])
def test_rows_of_different_length_wait_for_nothing(text: str) -> None:
    state = parse(text).open(Spec(2, D, D))
    present = torch.arange(PROMPT) >= torch.tensor([[9], [0]])
    state.step(*tokens(2, PROMPT), present)
    state.seal()
    for i in range(5):
        state.step(*tokens(2, seed=i))
    device = FakeDevice()
    stepped(moved(state, device), device, 2 * 32)


@pytest.mark.parametrize("text", ["sinks(4)@48", "h2o@48"])
def test_keys_that_are_rotated_to_ranks_wait_for_nothing(text: str) -> None:
    device = FakeDevice()
    state = moved(filled(text, rotation=Rotation(tuple(10.0**-i for i in range(D // 2)))), device)
    stepped(state, device, past_a_block_end(state))


@pytest.mark.parametrize("text", ["sinks(4)@48", "window+value_sum@48"])
def test_tokens_without_queries_wait_for_nothing(text: str) -> None:
    device = FakeDevice()
    state = moved(filled(text), device)
    with device:
        k, v = (torch.empty(2, 1, D, device=DEVICE) for _ in range(2))
        for _ in range(past_a_block_end(state)):
            state.append(k, v)


def test_every_operation_of_a_step_is_on_the_device() -> None:
    device = FakeDevice()
    state = moved(filled("h2o@32"), device)
    stepped(state, device, 1)
    assert {call.split(".")[1] for call in device.calls} >= {"copy_", "bmm", "exp"}
    assert state.slots is not None and state.slots.k.device == torch.device(DEVICE)
    with pytest.raises(ValueError, match="on cpu, the state on cuda"), device:
        state.step(torch.zeros(2, G, 1, D), torch.zeros(2, 1, D), torch.zeros(2, 1, D))


def cache_waits(text: str = "h2o@48") -> str:
    """Decode past the end of a block through a layer of a cache on the fake device; return what waits, or ""."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from kvfloor.hf import CompressedCache, prepare

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
    config = LlamaConfig(**sizes, num_attention_heads=2 * G, num_key_value_heads=2, head_dim=D)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    prepare(model)
    cache = CompressedCache(model, text)
    with torch.no_grad():
        for ids in (torch.zeros(1, 70, dtype=torch.int64), *[torch.zeros(1, 1, dtype=torch.int64)] * 9):
            model(ids, past_key_values=cache, use_cache=True)
    layer, device = cache.layers[0], FakeDevice()
    layer.state = moved(layer.state, device)
    with device, torch.no_grad():
        q, k, v = (torch.empty(1, heads, 1, D, device=DEVICE) for heads in (2 * G, 2, 2))
        try:
            for _ in range(past_a_block_end(layer.state)):
                key, value = layer.update(k, v)
                out = layer.answer(q, key, value, None, D**-0.5, None)
                assert out.device == torch.device(DEVICE) and out.shape == (1, 1, 2 * G, D)
        except HostWaits as found:
            return str(found)
    return ""


def test_the_update_of_a_cache_in_generate_lets_the_host_wait_for_nothing() -> None:
    assert cache_waits() == ""


def test_a_wait_in_the_update_of_a_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, "_defers", property(lambda self: False))  # so that every token's check is read at once
    assert "reads numbers" in cache_waits()
