"""Nothing of a model is read behind its modules' backs: hooks, adapters, offloaded and quantised weights count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvfloor.hf import CompressedCache, latent, prepare
from survey import conversations
from survey.tiny import tiny_model

pytest.importorskip("transformers.models.deepseek_v3")
FAMILIES = ["deepseek_v3", "deepseek_v2"]


def projections(model: Any) -> list[tuple[nn.Module, nn.Linear]]:
    return [(part, part.kv_b_proj) for part in model.modules() if hasattr(part, "kv_b_proj")]


def doubled(part: nn.Module, project: nn.Linear) -> None:
    project.register_forward_hook(lambda _module, _args, out: torch.mul(out, 2))  # type: ignore[arg-type]


def mixed(part: nn.Module, project: nn.Linear) -> None:
    project.register_forward_pre_hook(lambda _module, args: (args[0].roll(1, -1),))


class LowRank(nn.Module):
    """An adapter that can be switched, around the layer."""

    on = True

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.base_layer, self.weight = base, base.weight
        self.down = nn.Parameter(torch.randn(3, base.in_features, generator=draw) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 3, generator=draw) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + (x @ self.down.T @ self.up.T if self.on else 0)


def adapted(part: nn.Module, project: nn.Linear) -> None:
    part.kv_b_proj = LowRank(project)


def offloaded(part: nn.Module, project: nn.Linear) -> None:
    """As accelerate does it: the weight is on meta except while the module runs."""
    there = project.weight.data

    def load(module: Any, _args: Any) -> None:
        module.weight = nn.Parameter(there)

    def unload(module: Any, _args: Any, _out: Tensor) -> None:
        module.weight = nn.Parameter(torch.empty_like(there, device="meta"))

    project.register_forward_pre_hook(load)
    project.register_forward_hook(unload)
    project.weight = nn.Parameter(torch.empty_like(there, device="meta"))


def replaced(part: nn.Module, project: nn.Linear) -> None:
    """As accelerate and others do it: the instance's own forward."""
    plain = project.forward
    project.forward = lambda input: -plain(input)  # type: ignore[method-assign]


def quantised(part: nn.Module, project: nn.Linear) -> None:
    dynamic: Any = torch.ao.nn.quantized
    part.kv_b_proj = dynamic.dynamic.Linear.from_float(_calibrated(project))


def _calibrated(project: nn.Linear) -> nn.Linear:
    project.qconfig = torch.ao.quantization.default_dynamic_qconfig  # type: ignore[assignment]
    return project


@pytest.mark.parametrize("change", [doubled, mixed, adapted, offloaded, replaced])
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_expanded_as_the_module_would(family: str, change: Any) -> None:
    model, stock = prepare(tiny_model(family)), tiny_model(family)
    plain = conversations.by_forwards(stock, None)
    for each in (model, stock):
        for part, project in projections(each):
            change(part, project)
    right = conversations.by_forwards(stock, None)
    if change is not offloaded:
        assert conversations.apart(right, plain) > 0.05
    for run in (conversations.by_forwards, conversations.by_generate):
        assert conversations.difference(run(model, CompressedCache(model.config, "exact")), run(stock, None)) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_projection_is_called() -> None:
    if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("no quantised engine here")
    model, stock = prepare(tiny_model("deepseek_v3")), tiny_model("deepseek_v3")
    right = conversations.by_forwards(stock, None).logits
    for each in (model, stock):
        for part, project in projections(each):
            quantised(part, project)
    found = conversations.by_forwards(model, CompressedCache(model.config, "exact")).logits
    theirs = conversations.by_forwards(stock, None).logits  # rounds each token's latent, too
    assert float((found - right).abs().mean()) < 1.5 * float((theirs - right).abs().mean())


def test_an_adapter_that_is_switched_counts_from_the_next_forward_on() -> None:
    model, stock = prepare(tiny_model("deepseek_v3")), tiny_model("deepseek_v3")
    for each in (model, stock):
        for part, project in projections(each):
            adapted(part, project)
    ids = torch.randint(2, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    cache, theirs = CompressedCache(model.config, "exact"), None
    with torch.no_grad():
        for on in (True, False, True):
            for each in (model, stock):
                for _part, project in projections(each):
                    project.on = on  # type: ignore[assignment]
            found = model(ids, past_key_values=cache).logits
            out = stock(ids, past_key_values=theirs, use_cache=True)
            theirs = out.past_key_values
            torch.testing.assert_close(found, out.logits, rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_not_linear_is_refused_and_nothing_is_taken_in() -> None:
    model = prepare(tiny_model("deepseek_v3"))
    if not any(hasattr(part, "expand_kv") for part in model.modules()):
        pytest.skip("this release of transformers caches every head's keys, which any hook may have made")
    handles = [
        project.register_forward_hook(lambda _module, _args, out: out.clamp(-0.3, 0.3))
        for _, project in projections(model)
    ]
    ids = torch.randint(2, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = CompressedCache(model.config, "exact")
    with torch.no_grad():
        with pytest.raises(ValueError, match="is not linear"):
            model(ids, past_key_values=cache)
        assert cache.nbytes == cache.compressed[0].staged_bytes
    for handle in handles:
        handle.remove()


def test_a_plain_layer_is_not_called_a_second_time() -> None:
    """Calling it on every unit vector would cost a decoded token as much as kv_lora_rank tokens."""
    (_, project), *_ = projections(tiny_model("deepseek_v3"))
    assert latent.is_plainly_linear(project)
    handle = project.register_forward_hook(lambda *_: None)
    assert not latent.is_plainly_linear(project)
    handle.remove()
    assert latent.is_plainly_linear(project)
