"""What identifies the model that filled a cache: weights wherever they are and however packed, and adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvfloor.hf import CompressedCache, WrongModel, prepare
from kvfloor.hf.fingerprint import fingerprint
from tests.hf.conftest import tiny

IDS = torch.randint(2, 98, (1, 40), generator=torch.Generator().manual_seed(1))
METHOD = "sinks(4,block=8)@16"


def filled(model: Any) -> CompressedCache:
    cache = CompressedCache(model.config, METHOD)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
    return cache


def goes_on(model: Any, cache: CompressedCache, path: Path) -> None:
    """The cache is saved, loaded for `model`, and goes on to the bit."""
    cache.save(path)
    loaded = CompressedCache.load(path, model)
    with torch.no_grad():
        mine, theirs = (model(IDS[:, :5], past_key_values=each).logits for each in (loaded, cache))
    assert torch.equal(mine, theirs)


class Hook:
    """Has what accelerate's AlignDevicesHook has: the weights by name, and where the module runs."""

    execution_device = "cpu"

    def __init__(self, module: nn.Module) -> None:
        self.weights_map = {name: weight.data for name, weight in module.named_parameters(recurse=False)}


def offload(module: nn.Module) -> None:
    hook = Hook(module)
    module._hf_hook = hook  # type: ignore[assignment]

    def place(where: dict[str, Tensor]) -> None:
        for name, weight in where.items():
            setattr(module, name, nn.Parameter(weight))

    away = {name: torch.empty_like(weight, device="meta") for name, weight in hook.weights_map.items()}
    module.register_forward_pre_hook(lambda *_: place(hook.weights_map))
    module.register_forward_hook(lambda *_: place(away))
    place(away)


def test_offloaded_weights_are_the_same_weights(tmp_path: Path) -> None:
    whole, away = prepare(tiny()), prepare(tiny())
    for part in list(away.modules()):
        if isinstance(part, nn.Linear) and part is not away.lm_head:
            offload(part)
    assert fingerprint(away) == fingerprint(whole)
    goes_on(away, filled(away), tmp_path / "a")
    cache = filled(whole)
    cache.save(tmp_path / "b")
    CompressedCache.load(tmp_path / "b", away)
    away.model.layers[1].self_attn.v_proj._hf_hook.weights_map["weight"].mul_(2)
    with pytest.raises(WrongModel, match="weights, dtype or configuration differ"):
        CompressedCache.load(tmp_path / "b", away)


def test_a_whole_model_on_meta_is_no_fault_of_the_file(tmp_path: Path) -> None:
    model = prepare(tiny())
    filled(model).save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight") as error:
        CompressedCache.load(tmp_path / "cache", model.to(device="meta"))  # type: ignore[call-arg]
    assert type(error.value) is ValueError and "accelerate" in str(error.value)


def test_buffers_count_where_quantisers_keep_their_codes() -> None:
    class Packed(nn.Module):
        def __init__(self, base: nn.Linear, scale: float) -> None:
            super().__init__()
            step = base.weight.abs().amax() / 127
            self.register_buffer("codes", (base.weight / step).round().to(torch.int8))
            self.register_buffer("step", step.detach() * scale)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.mul(self.codes, self.step).T  # type: ignore[arg-type]

    prints = []
    for scale in (1.0, 1.0, 2.0):
        model = prepare(tiny())
        model.model.layers[0].self_attn.v_proj = Packed(model.model.layers[0].self_attn.v_proj, scale)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.filterwarnings("ignore")
def test_weights_that_torch_has_quantised(tmp_path: Path) -> None:
    if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("no quantised engine here")
    whole = prepare(tiny())
    filled(whole).save(tmp_path / "whole")
    model = prepare(torch.ao.quantization.quantize_dynamic(tiny(), {nn.Linear}, dtype=torch.qint8))
    goes_on(model, filled(model), tmp_path / "cache")
    with pytest.raises(WrongModel):
        CompressedCache.load(tmp_path / "whole", model)
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.v_proj.set_weight_bias(
        torch.quantize_per_tensor(torch.randn(32, 64), 0.01, 0, torch.qint8), None
    )
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_torchao_has_quantised(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = prepare(tiny())
    plain = fingerprint(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert fingerprint(model)["sha256"] != plain["sha256"]
    goes_on(model, filled(model), tmp_path / "cache")


class Adapter(nn.Module):
    """A low-rank adapter with the attributes that PEFT's layers have."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear, *names: str) -> None:
        super().__init__()
        self.base_layer = base
        sides, drawn = ((3, base.in_features), (base.out_features, 3)), torch.Generator()
        self.lora_A, self.lora_B = (
            nn.ParameterDict(
                {name: nn.Parameter(torch.randn(size, generator=drawn.manual_seed(len(name)))) for name in names}
            )
            for size in sides
        )
        self.active_adapters, self.merged_adapters, self.disable_adapters = list(names[:1]), [], False
        self.scaling = dict.fromkeys(names, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            out = out + x @ self.lora_A[name].T @ self.lora_B[name].T * self.scaling[name]
        return out


def adapted(*names: str) -> Any:
    model = prepare(tiny())
    for layer in model.model.layers:
        layer.self_attn.k_proj = Adapter(layer.self_attn.k_proj, *names)
    return model


def switch(model: Any, **changes: Any) -> None:
    for part in model.modules():
        if isinstance(part, Adapter):
            for name, value in changes.items():
                setattr(part, name, value)


def test_a_cache_belongs_to_the_adapter_that_was_on(tmp_path: Path) -> None:
    model = adapted("first", "second")
    goes_on(model, filled(model), tmp_path / "cache")
    for change, named in (
        ({"disable_adapters": True}, "on are first, and here none"),
        ({"active_adapters": ["second"]}, "on are first, and here second"),
        ({"active_adapters": ["first", "second"]}, "on are first, and here first, second"),
        ({"active_adapters": [], "merged_adapters": ["first"]}, r"on are first, and here first \(merged\)"),
        ({"scaling": {"first": 0.5, "second": 1.0}}, "weights, dtype or configuration differ"),
    ):
        other = adapted("first", "second")
        switch(other, **change)
        with pytest.raises(WrongModel, match=named):
            CompressedCache.load(tmp_path / "cache", other)
    CompressedCache.load(tmp_path / "cache", adapted("first", "second"))
    CompressedCache.load(tmp_path / "cache", adapted("first"))  # one that is off counts as not there


def test_with_its_adapters_off_a_model_is_what_it_was(tmp_path: Path) -> None:
    plain = prepare(tiny())
    filled(plain).save(tmp_path / "cache")
    model = adapted("first")
    with pytest.raises(WrongModel, match="on are none, and here first"):
        CompressedCache.load(tmp_path / "cache", model)
    switch(model, disable_adapters=True)
    assert fingerprint(model) == fingerprint(prepare(tiny()))
    CompressedCache.load(tmp_path / "cache", model)


def test_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    plain = fingerprint(prepare(tiny()))
    wrapped = peft.get_peft_model(prepare(tiny()), lora).eval()
    model = wrapped.get_base_model()
    goes_on(model, filled(model), tmp_path / "cache")
    with wrapped.disable_adapter():
        assert fingerprint(model) == plain
        with pytest.raises(WrongModel, match="on are default, and here none"):
            CompressedCache.load(tmp_path / "cache", model)
    wrapped.add_adapter("other", lora)
    CompressedCache.load(tmp_path / "cache", model)
    wrapped.set_adapter("other")
    with pytest.raises(WrongModel, match="on are default, and here other"):
        CompressedCache.load(tmp_path / "cache", model)
