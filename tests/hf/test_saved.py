"""A saved cache continues bit for bit; a damaged, foreign or newer file is refused by a typed error."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor import BrokenState, CorruptState, parse
from kvfloor.core import message
from kvfloor.core.bounded import Bounded
from kvfloor.hf import CompressedCache, NewerVersion, UnknownMethod, WrongModel, prepare, restore, saved
from kvfloor.hf.families import own_cache_class
from kvfloor.methods.grammar import default_method
from kvfloor.methods.policies.sinks import Sinks
from kvfloor.methods.registry import TABLE
from survey.tiny import families, tiny_model
from tests.corruption import (
    require_edits_are_noticed,
    require_every_flip_is_noticed,
    require_every_truncation_is_noticed,
)
from tests.hf.conftest import Prompt, Talk, tiny

METHODS = [
    "exact",
    "sinks(4)@24",
    "h2o@32",
    "h2o(prefill=dense)@32",
    "snapkv(block=4)@24",
    "raas(page=4,sinks=2,block=4)@24",
    "expected(block=4)@24",
    "random@24",
    "window+value_sum@24",
    "window+taylor@24",
    "window_sample(copies=8)@24",
    "subgen_sketch@64",
    "balance@64",
    "quant(bits=4)",
    "exact:k4v4",
    "h2o(block=8):k4v3(first=1)@32",
    "exact|hip(k=16)",
    "h2o|pages(page=4,pages=3)@32",
    "window@128KiB",
]


def reloaded(talk: Talk, path: Path, **options: Any) -> Talk:
    """The same talk, over a cache that went through the file."""
    talk.cache.save(path)
    return Talk(talk.model, CompressedCache.load(path, talk.model, **options), talk.mask)


def turns(seed: int, *lengths: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 98, (2, n), generator=draw) for n in lengths]


def follow(one: Talk, other: Talk, lengths: tuple[int, ...] = (1, 1, 9, 1, 1, 40, 1), seed: int = 5) -> None:
    """Both go on with the same tokens, decoding and further turns, and say the same bits."""
    for ids in turns(seed, *lengths):
        assert torch.equal(one.hear(ids), other.hear(ids))
    assert told(one.cache) == told(other.cache)


def told(cache: CompressedCache) -> list[dict[str, Any]]:
    """A cache's report without what its reads fetched, which is counted since the cache was made or loaded."""
    return [{name: value for name, value in layer.items() if name != "certified"} for layer in cache.report()]


@pytest.fixture(scope="module")
def llama_prepared() -> PreTrainedModel:
    return prepare(tiny())


@pytest.fixture
def started(llama_prepared: PreTrainedModel, prompt: Prompt) -> Talk:
    talk = Talk(llama_prepared, CompressedCache(llama_prepared.config, "h2o@32", requests=[4, 9]))
    talk.hear(prompt["input_ids"], prompt["attention_mask"])
    return talk


@pytest.fixture
def path(started: Talk, tmp_path: Path) -> Path:
    """The file to which `started` was saved."""
    started.cache.save(tmp_path / "cache")
    return tmp_path / "cache"


# ---- continuing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_cache_goes_on_bit_for_bit(
    llama_prepared: PreTrainedModel, prompt: Prompt, tmp_path: Path, method: str
) -> None:
    talk = Talk(llama_prepared, CompressedCache(llama_prepared.config, method, requests=[4, 9], seed=3))
    talk.hear(prompt["input_ids"], prompt["attention_mask"])
    after_prompt = reloaded(talk, tmp_path / "a")
    assert after_prompt.cache.nbytes == talk.cache.nbytes
    assert after_prompt.cache.peak_nbytes == talk.cache.peak_nbytes
    assert after_prompt.cache.get_seq_length() == 70
    follow(talk, after_prompt)
    in_the_middle = reloaded(talk, tmp_path / "b")
    assert in_the_middle.cache.nbytes == talk.cache.nbytes
    follow(talk, in_the_middle, seed=6)
    again = reloaded(reloaded(in_the_middle, tmp_path / "c"), tmp_path / "d")  # no token between load and save
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()
    follow(talk, again, (1, 3), seed=7)


@pytest.mark.parametrize("name", [name for name in TABLE if default_method(name).traits.reference != "tensor"])
def test_every_entry_of_the_registry_can_be_saved(
    llama_prepared: PreTrainedModel, prompt: Prompt, tmp_path: Path, name: str
) -> None:
    method = default_method(name)
    if method.traits.trained_for is not None or name == "less":
        pytest.skip("LESS is trained for one model; no trained parameters for a tiny model")
    talk = Talk(llama_prepared, CompressedCache(llama_prepared.config, method))
    talk.hear(prompt["input_ids"], prompt["attention_mask"])
    follow(talk, reloaded(talk, tmp_path / "cache"), (1, 5, 1))


@pytest.mark.parametrize(
    "method, options",
    [
        ("h2o(block=4)", {"budgets": [[40, 24], [28], [20, 36]], "pinned": [(0, 5)]}),
        ("sinks(4,block=4)@24", {"allocate": "pyramid", "pinned": [(2, 4), (6, 9)]}),
        ("snapkv(block=4)@25%", {"allocate": [[1.5, 0.5], [1, 1], [0.7, 1.3]], "context": 80}),
    ],
)
def test_every_argument_goes_on_too(
    llama_prepared: PreTrainedModel, prompt: Prompt, tmp_path: Path, method: str, options: Any
) -> None:
    talk = Talk(llama_prepared, CompressedCache(llama_prepared.config, method, **options))
    talk.hear(prompt["input_ids"], prompt["attention_mask"])
    loaded = reloaded(talk, tmp_path / "cache")
    assert loaded.cache.nbytes == talk.cache.nbytes and loaded.cache.arguments == talk.cache.arguments
    follow(talk, loaded)
    for each in (talk, loaded):  # what the arguments say holds for the next conversation as well
        each.cache.reset()
        each.mask = each.mask[:, :0]
    follow(talk, loaded, (60, 1, 1), seed=9)


def test_half_precision_goes_on_bit_for_bit(prompt: Prompt, tmp_path: Path) -> None:
    model = prepare(tiny().to(torch.bfloat16))
    for method in ("h2o@32", "snapkv(block=4)@24", "quant(bits=4)"):
        talk = Talk(model, CompressedCache(model.config, method))
        talk.hear(prompt["input_ids"], prompt["attention_mask"])
        follow(talk, reloaded(talk, tmp_path / "cache"))


# sliding windows | convolutions | linear attention | both halves in one layer | keys shared between layers | sinks
@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "qwen3_next", "falcon_h1", "gemma4_text", "gpt_oss"])
def test_layers_that_are_not_compressed_go_on_too(family: str, tmp_path: Path) -> None:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    model = tiny_model(family)
    if own_cache_class(model):
        pytest.skip(f"in this transformers {family} fills a cache class of its own")
    talk = Talk(prepare(model), CompressedCache(model.config, "h2o@32"))
    talk.hear(*turns(1, 70))
    follow(talk, reloaded(talk, tmp_path / "cache"))
    again = reloaded(talk, tmp_path / "cache")
    for each in (talk, again):
        each.cache.reorder_cache(torch.tensor([1, 0]))
    follow(talk, again, seed=8)


def test_generate_goes_on_from_a_loaded_cache(llama_prepared: PreTrainedModel, tmp_path: Path) -> None:
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    first, second = (ids[:1] for ids in turns(11, 60, 20))
    cache = CompressedCache(llama_prepared.config, "h2o@32")
    said = llama_prepared.generate(first, **greedy, past_key_values=cache)
    cache.save(tmp_path / "cache")
    whole = torch.cat([said, second], 1)
    loaded = CompressedCache.load(tmp_path / "cache", llama_prepared)
    expected = llama_prepared.generate(whole, **greedy, past_key_values=cache)
    assert torch.equal(llama_prepared.generate(whole, **greedy, past_key_values=loaded), expected)
    fresh = llama_prepared.generate(whole, **greedy, past_key_values=CompressedCache(llama_prepared.config, "h2o@32"))
    assert loaded.get_seq_length() == fresh.shape[1] - 1


def test_beams_and_reset_work_after_loading(started: Talk, tmp_path: Path) -> None:
    loaded = reloaded(started, tmp_path / "cache")
    order = torch.tensor([1, 1])
    for talk in (started, loaded):
        talk.cache.reorder_cache(order)
        talk.mask = talk.mask[order]
    follow(started, loaded, (1, 1, 4))
    loaded.cache.reset()
    fresh = Talk(started.model, CompressedCache(started.model.config, "h2o@32", requests=[4, 9]))
    loaded.mask = fresh.mask
    follow(fresh, loaded, (50, 1))


def test_a_copy_of_the_model_in_another_process_will_do(started: Talk, tmp_path: Path) -> None:
    started.cache.save(tmp_path / "cache")
    twin = prepare(tiny())  # the same seed: equal weights, other tensors
    follow(started, Talk(twin, CompressedCache.load(tmp_path / "cache", twin), started.mask))


def test_saving_changes_nothing_and_the_copy_is_independent(started: Talk, tmp_path: Path) -> None:
    started.cache.save(tmp_path / "cache")
    first = (tmp_path / "cache").read_bytes()
    loaded = CompressedCache.load(tmp_path / "cache", started.model)
    Talk(started.model, loaded, started.mask).hear(*turns(1, 30))
    started.cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == first


def test_every_attribute_of_a_layer_is_saved_or_made_anew(started: Talk) -> None:
    """A new attribute must be put on one of these lists, and into `clocks` if continuing needs it."""
    layer = started.cache.compressed[0]
    saved = {"state", *layer.clocks()}
    anew = {"opening", "index", "place", "staged_bytes", "served_by", "record", "keys", "values"}
    anew |= {
        "_meter",
        "_passage",
        "_presence",
        "_on_evict",
        "_readers",
        "_waiting",
        "_before",
        "_unturned",
        "turn_back",
        "room",
    }
    assert set(vars(layer)) == saved | anew


# ---- refusing --------------------------------------------------------------------------------------------------


def test_any_changed_byte_is_noticed(started: Talk, tmp_path: Path) -> None:
    started.cache.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    header, draw = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    places = [*range(100), *draw.sample(range(100, header), 40), *draw.sample(range(header, len(whole)), 40)]
    places += [header - 1, header, len(whole) - 1]
    broken = tmp_path / "broken"

    def read(data: bytes) -> object:
        broken.write_bytes(data)
        return CompressedCache.load(broken, started.model)

    require_every_flip_is_noticed(whole, read, places)
    sizes = (0, 1, 7, 8, 9, 98, 99, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1)
    require_every_truncation_is_noticed(whole, read, sizes)
    for _ in range(100):
        require_edits_are_noticed(whole, read, draw)


def test_another_file_is_no_cache(started: Talk, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("hello, this is a text of some length")
    for name in ("weights.safetensors", "text"):
        with pytest.raises(CorruptState):
            CompressedCache.load(tmp_path / name, started.model)
    with pytest.raises(ValueError, match="cannot read"):
        CompressedCache.load(tmp_path / "absent", started.model)


def rewritten(path: Path, **changes: Any) -> Path:
    """The file with other header fields and a right digest: what another release may write."""
    header, fields = message.unpack(path.read_bytes())
    path.write_bytes(message.pack(header | changes, fields))
    return path


def test_a_newer_format_is_told_from_damage(started: Talk, path: Path) -> None:
    with pytest.raises(NewerVersion, match="upgrade kvfloor"):
        CompressedCache.load(rewritten(path, format=message.FORMAT + 1, kvfloor="9.0"), started.model)


def test_fields_that_do_not_fit_are_refused(started: Talk, path: Path) -> None:
    layers = message.unpack(path.read_bytes())[0]["layers"]
    other = {**layers[0], "layer": "DynamicLayer"}
    for changes in ({"layers": layers[:2]}, {"layers": [other, *layers[1:]]}, {"arguments": {"colour": 3}}):
        with pytest.raises(CorruptState, match="does not fit"):
            CompressedCache.load(rewritten(path, **changes), started.model)
        started.cache.save(path)


def test_edited_layers_are_refused(started: Talk, path: Path) -> None:
    header, _ = message.unpack(path.read_bytes())
    first, *others = header["layers"]
    clocks = [{"seen": 3}, {"seen": -1}, {"seen": 2**62}, {"seen": "70"}, {"batch": 3}, {"batch": 0}, {"batch": True}]
    clocks += [{"is_initialized": 1}, {"more": 1}, {"seen": 71}]
    edits: list[dict[str, Any]] = [{"layers": [first | {"clocks": first["clocks"] | c}, *others]} for c in clocks]
    edits += [{"layers": [first | {"spec": first["spec"] | {"rows": rows}}, *others]} for rows in (2, 2**40)]
    edits += [{"peak_bytes": -1}, {"peak_bytes": None}, {"layers": None}, {"layers": [7] * 3}, {"model": None}]
    for changes in edits:
        with pytest.raises((CorruptState, WrongModel)):
            CompressedCache.load(rewritten(path, **changes), started.model)
        started.cache.save(path)


def test_edited_states_are_refused_and_so_are_edited_layers_of_transformers(tmp_path: Path) -> None:
    model = prepare(tiny_model("gemma3_text"))
    talk = Talk(model, CompressedCache(model.config, "h2o@32"))
    talk.hear(*turns(1, 70))
    path = tmp_path / "cache"
    talk.cache.save(path)
    header, _ = message.unpack(path.read_bytes())
    own = next(str(i) for i, layer in enumerate(header["layers"]) if "clocks" not in layer)
    full = next(str(i) for i, layer in enumerate(header["layers"]) if "clocks" in layer)
    for edit in (
        lambda fields: fields[full]["state"]["slots"].update(held=fields[full]["state"]["slots"]["held"] + 1),
        lambda fields: fields[full]["state"].pop("pins"),
        lambda fields: fields[own].update(update=3),
        lambda fields: fields[own].update(dtype=["dtype", "nn"]),
        lambda fields: fields[own].pop("keys"),
        lambda fields: fields.pop(own),
    ):
        header, fields = message.unpack(path.read_bytes())
        edit(fields)
        (tmp_path / "edited").write_bytes(message.pack(header, fields))
        with pytest.raises(CorruptState, match="does not fit"):
            CompressedCache.load(tmp_path / "edited", model)


@pytest.mark.parametrize("path", [None, 7, b"x", ["x"], 0.5])
def test_what_is_no_path_is_named(started: Talk, path: Any) -> None:
    with pytest.raises(TypeError, match="path of the saved cache must be text or a Path"):
        CompressedCache.load(path, started.model)
    with pytest.raises(TypeError, match="path of the saved cache must be text or a Path"):
        started.cache.save(path)


def test_other_wrong_arguments_are_named(started: Talk, tmp_path: Path) -> None:
    started.cache.save(tmp_path / "cache")
    for name, options in (
        ("model", {"model": None}),
        ("model", {"model": started.model.config}),
        ("method", {"method": "h2o@32"}),
        ("most_bytes", {"most_bytes": "1GiB"}),
    ):
        with pytest.raises(TypeError, match=f"{name} must be"):
            CompressedCache.load(tmp_path / "cache", **({"model": started.model} | options))


def test_no_file_can_take_the_machine(started: Talk, path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            CompressedCache.load(special, started.model)
        with pytest.raises(ValueError, match="a pipe or a device"):
            started.cache.save(special)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=f"has {len(whole)} bytes, more than the {len(whole) - 1} allowed"):
        CompressedCache.load(path, started.model, most_bytes=len(whole) - 1)
    CompressedCache.load(path, started.model, most_bytes=len(whole))


def test_an_unknown_method_is_refused_and_nothing_is_imported_for_it(started: Talk, path: Path) -> None:
    with pytest.raises(UnknownMethod, match="tomorrow"):
        CompressedCache.load(rewritten(path, method="tomorrow@32"), started.model)
    for text in (
        "antigravity:fly@32",
        "antigravity:fly:k4v4@32",
        "antigravity:k4v4+value_sum@32",
        "h2o|a:b:kivi4(first=1)@32",
    ):
        with pytest.raises(UnknownMethod, match="not imported"):
            CompressedCache.load(rewritten(path, method=text), started.model)


@dataclass(frozen=True)
class Elsewhere(Sinks):
    """A third party's policy."""

    name: ClassVar[str] = "elsewhere"


def test_a_third_partys_method_is_brought_by_the_caller(
    llama_prepared: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, Elsewhere.__module__, sys.modules[__name__])
    method = Bounded(Elsewhere(2), budget=24)
    assert ":" in str(method)
    talk = Talk(llama_prepared, CompressedCache(llama_prepared.config, method))
    talk.hear(*turns(2, 60))
    with pytest.raises(UnknownMethod, match="pass method="):
        reloaded(talk, tmp_path / "cache")
    follow(talk, reloaded(talk, tmp_path / "cache", method=method))


def test_only_classes_that_the_given_method_has_too_are_taken_from_a_file() -> None:
    theirs = Bounded(Elsewhere(2), budget=24)
    assert saved._method("window@24", theirs) == parse("window@24")
    assert saved._method(str(theirs), theirs) is theirs
    for given in (None, parse("window@24")):
        with pytest.raises(UnknownMethod, match="pass method="):
            saved._method(str(theirs), given)


def test_layers_are_restored_to_the_device_of_their_weights(llama_prepared: PreTrainedModel) -> None:
    split, bare = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2)), torch.nn.Module()
    for index, part in enumerate((*split, bare)):
        part.layer_idx = index  # type: ignore[assignment]
    model = torch.nn.ModuleList([bare, split])
    assert saved._devices(model) == dict.fromkeys(range(2), torch.device("cpu"))  # type: ignore[arg-type]
    assert saved._devices(llama_prepared) == dict.fromkeys(range(3), torch.device("cpu"))


def test_another_models_file_is_refused(started: Talk, path: Path) -> None:
    weights, law = tiny(), tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with torch.no_grad():
        weights.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    others = [weights, law, tiny("qwen3"), tiny(num_hidden_layers=2), tiny().to(torch.bfloat16)]
    for other in others:
        with pytest.raises(WrongModel):
            CompressedCache.load(path, prepare(other))


def test_prepare_comes_first(started: Talk, tmp_path: Path) -> None:
    started.cache.save(tmp_path / "cache")
    twin = tiny()
    with pytest.raises(ValueError, match=r"prepare\(model\)"):
        CompressedCache.load(tmp_path / "cache", twin)
    restore(prepare(twin))
    with pytest.raises(ValueError, match=r"prepare\(model\)"):
        CompressedCache.load(tmp_path / "cache", twin)


def test_what_cannot_be_saved_is_refused(tmp_path: Path, prompt: Prompt) -> None:
    model = prepare(tiny())
    cache = CompressedCache(model.config, "window@24")
    with pytest.raises(ValueError, match="nothing to save"):
        cache.save(tmp_path / "cache")
    talk = Talk(model, cache)
    talk.hear(prompt["input_ids"], prompt["attention_mask"])
    with pytest.raises(ValueError, match="cannot write"):
        cache.save(tmp_path / "no folder" / "cache")
    cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    with pytest.raises(ValueError, match="not finished"):
        cache.save(tmp_path / "cache")
    cache.compressed[0].staged_bytes = 0
    cache.compressed[0].seen += 1
    with pytest.raises(BrokenState, match="have seen different tokens"):
        cache.save(tmp_path / "cache")
    cache.compressed[0].seen -= 1
    talk.model = None  # type: ignore[assignment]
    del model
    with pytest.raises(ValueError, match="is gone"):
        cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == []


# ---- the file --------------------------------------------------------------------------------------------------


def test_only_the_owner_may_read_it(started: Talk, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        started.cache.save(tmp_path / "cache")
    finally:
        os.umask(before)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o600


def test_the_file_is_plain_safetensors_that_tells_what_it_holds(started: Talk, tmp_path: Path) -> None:
    from safetensors import safe_open

    started.cache.save(tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        assert "0/state/slots/k" in set(file.keys())
    header, fields = message.unpack((tmp_path / "cache.safetensors").read_bytes())
    assert header["method"] == str(parse("h2o@32")) and header["model"]["model"] == "LlamaForCausalLM"
    assert list(fields) == ["0", "1", "2", "masks"] and {"k", "v"} < set(fields["2"]["state"]["slots"])
    assert header["arguments"]["requests"] == [4, 9] and header["arguments"]["seed"] == 0
