"""Read the weights of a model: on a device, offloaded to disk by accelerate, or packed by a quantiser.

Also find the adapters (such as LoRA) that change the effect of the weights, added by PEFT or by transformers'
integration of PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvfloor.hf.ranks import full

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_WRAPPED = ("base_layer", "original_module")  # PEFT's names of the layer inside an adapter, and inside a trained copy


@dataclass(frozen=True)
class Adapters:
    """Hold the adapters (such as LoRA) of a model: which are active now, and where their weights are.

    active  names of active adapters, "name (merged)" for those that were merged into the weights
    off     prefixes of the names of weights that belong to inactive adapters
    base    names of the model's own layers that are wrapped by an adapter
    scales  (layer, adapter, scaling factor) of active adapters
    """

    active: list[str]
    off: tuple[str, ...]
    base: tuple[str, ...]
    scales: list[tuple[str, str, float]]


def adapters_of(model: nn.Module) -> Adapters:
    """Find the adapters of `model`, by the attributes that PEFT's adapter layers have."""
    active: set[str] = set()
    off: list[str] = []
    base: list[str] = []
    scales: list[tuple[str, str, float]] = []
    for path, part in model.named_modules():
        wrapped = next((name for name in _WRAPPED if isinstance(getattr(part, name, None), nn.Module)), None)
        if wrapped is None or not all(hasattr(part, name) for name in ("merged_adapters", "disable_adapters")):
            continue
        layer: Any = part
        merged = list(layer.merged_adapters)
        on = [] if layer.disable_adapters else [name for name in layer.active_adapters if name not in merged]
        base.append(f"{path}.{wrapped}")
        for kind in getattr(layer, "adapter_layer_names", ()):
            held = _at(layer, kind)
            names = list(held) if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) else []
            off += [f"{path}.{kind}.{name}" for name in names if name not in on]
            active.update(name for name in names if name in on)
        active.update(f"{name} (merged)" for name in merged)
        factors = getattr(layer, "scaling", None)
        if isinstance(factors, dict):
            scales += [(path, name, float(factors[name])) for name in on if isinstance(factors.get(name), (int, float))]
    return Adapters(sorted(active), tuple(off), tuple(base), sorted(scales))


def stored(model: nn.Module, adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter and persistent buffer that the model computes with, sorted by name.

    Weights of inactive adapters are left out. In a layer wrapped by an adapter, weights have the names that they would
    have without the adapter. A quantised weight is yielded as several tensors, such as its codes and scales. Raises
    ValueError naming a weight that cannot be read.
    """
    whole, plain = model.state_dict(keep_vars=True), {}
    for name in whole:
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in adapters.off):
            inside = next((path for path in adapters.base if name.startswith(f"{path}.")), None)
            plain[name if inside is None else inside.rpartition(".")[0] + name.removeprefix(inside)] = name
    for shown, name in sorted(plain.items()):
        yield from _numbers(shown, _fetched(model, name, whole[name]))


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device on which this module computes, or None if unknown.

    It is the device of its weights, or the one to which accelerate's hook copies offloaded weights.
    """
    for weight in module.parameters():
        if not weight.is_meta:
            return weight.device
    for part in module.modules():
        for hook in _hooks(part):
            place = getattr(hook, "execution_device", None)
            if place is not None:
                return torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return None


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model takes token ids, also where its embedding's weights are offloaded."""
    return model.device if model.device.type != "meta" else device_of(model) or torch.device("cpu")


def _at(part: Any, path: str) -> Any:
    """Return the attribute of `part` at a dotted path, such as "a.b"; None if there is none."""
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def _fetched(model: nn.Module, name: str, value: Any) -> Any:
    """Return the weight `name`, given its value in the state dict.

    A value on the meta device stands for an offloaded weight, which is read through accelerate's hook of its module.
    Raises ValueError if there is no such hook.
    """
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    path, _, own = name.rpartition(".")
    for hook in _hooks(model.get_submodule(path)):
        kept = getattr(hook, "weights_map", None)
        if kept is not None and own in kept:
            return kept[own]
    raise ValueError(
        f"{name} is on the meta device and no accelerate hook of its module knows its numbers: put the model's weights "
        f"on a device, or offload them with accelerate"
    )


def _hooks(module: nn.Module) -> Iterable[Any]:
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, dense tensor) of a weight: one pair, or one for each part of a quantised weight, such as its scales.

    A sharded weight is gathered from all ranks, so every rank must read the same weights in the same order.

    A part that is no tensor, such as a float, is yielded as an empty tensor whose name contains its value. Raises
    ValueError if the weight cannot be read.
    """
    if isinstance(value, Tensor):
        value = full(value)
        inner = getattr(value, "__tensor_flatten__", None)
        if inner is not None:
            parts, context = inner()
            yield f"{name} {type(value).__name__} {_ADDRESS.sub('', repr(context))}", torch.empty(0)
            for part in parts:
                yield from _numbers(f"{name}.{part}", getattr(value, part))
            return
        if value.is_quantized:
            yield name, value.int_repr()
            per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
            if per_channel:
                yield f"{name}.scale", value.q_per_channel_scales()
                yield f"{name}.zero", value.q_per_channel_zero_points()
            else:
                yield f"{name}.scale", torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)
            return
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is a {value.layout} tensor on {value.device}, whose numbers cannot be read")
        yield name, value.detach()
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield from _numbers(f"{name}[{place}]", part)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield f"{name} {value}", torch.empty(0)
    else:
        raise ValueError(f"{name} is a {type(value).__name__}, whose numbers cannot be read")
