"""Saving a compressed cache and loading it again: what continues is what would have gone on, bit for bit.

The header says the format, the method, the constructor's arguments, the model's fingerprint and what each layer is; the
tensors are each layer's state. Nothing is unpickled, and no module is imported because a file names it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.message import CorruptState, flatten, gather
from kvfloor.core.method import Method, rebuilt
from kvfloor.files import replace_file
from kvfloor.hf import other_layers as stock
from kvfloor.hf.container import FORMAT, NewerVersion, pack, unpack
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.layer import CompressedLayer
from kvfloor.hf.prepare import is_prepared, owner
from kvfloor.hf.wrappers import unwrapped
from kvfloor.methods.registry import parse
from kvfloor.version import __version__

if TYPE_CHECKING:
    from kvfloor.hf.cache import CompressedCache

__all__ = ["NewerVersion", "UnknownMethod", "WrongModel", "load", "save"]

Held = TypeVar("Held", bound="CompressedCache")

_MODE = 0o600  # a cache tells what was said
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_FOREIGN = re.compile(r"[\w.]+:[A-Za-z_]\w*")  # module:Class; a budget per row has digits after its colon


class WrongModel(ValueError):
    """The cache was filled by another model than the one it is loaded for."""


class UnknownMethod(ValueError):
    """The file's method is not one that can be made here."""


def save(cache: CompressedCache, path: str | Path) -> None:
    """Write `cache` to `path`, mode 0600, so that the path holds all of it or what it held before.

    Takes about twice the saved bytes for a moment. Raises ValueError for a cache in which nothing is, for one in the
    middle of a forward, for one whose model is gone, and for a path that cannot be written.
    """
    if any(layer.staged_bytes for layer in cache.compressed):
        raise ValueError("a forward is not finished: its tokens are staged but not answered yet; save after it")
    if len({layer.seen for layer in cache.compressed if layer.state is not None}) > 1:
        raise ValueError("the last forward broke off after some layers: this cache is of no use; reset() it")
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        plain, fields = _described(layer)
        plain["entries"], held = flatten(fields)
        layers.append(plain)
        tensors |= {f"{i}/{name}": tensor.clone() for name, tensor in held.items()}
    header = {
        "format": FORMAT,
        "kvfloor": __version__,
        "transformers": transformers.__version__,
        "method": str(cache.method),
        "arguments": cache.arguments,
        "model": fingerprint(_model_of(cache)),
        "peak_bytes": cache.peak_nbytes,
        "layers": layers,
    }
    replace_file(Path(path), pack(header, tensors), _MODE)


def load(kind: type[Held], path: str | Path, model: PreTrainedModel, method: Method | None = None) -> Held:
    """The cache of class `kind` in the file `path`, to continue with `model` where it was saved.

    Raises CorruptState for a file that is damaged, truncated or something else, NewerVersion, WrongModel and
    UnknownMethod as their names say, ValueError for a file that cannot be read and a model that is not prepared.
    """
    model = unwrapped(model)
    if not is_prepared(model):
        raise ValueError(
            f"{type(model).__name__} does not use kvfloor's attention: call kvfloor.hf.prepare(model) before loading"
        )
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    header, tensors = unpack(data)
    try:
        _check_model(header["model"], model)
        own = _method(header["method"], method)
        cache = kind(model.config, own, **header["arguments"])
        devices = _devices(model)
        for i, (layer, plain) in enumerate(zip(cache.layers, header["layers"], strict=True)):
            prefix = f"{i}/"
            mine = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            _restored(layer, plain, gather(plain["entries"], mine), devices.get(i, model.device), own, model)
        cache.resume(header["peak_bytes"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
        if isinstance(cause, (CorruptState, UnknownMethod, WrongModel)):
            raise
        saved, here = (f"transformers {v}" for v in (header.get("transformers"), transformers.__version__))
        raise CorruptState(f"{str(path)!r} was saved with {saved} and does not fit {here}: {cause}") from cause
    return cache


# ---- layers ------------------------------------------------------------------------------------------------


def _described(layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a layer is, JSON-ready, and what it holds."""
    plain: dict[str, Any] = {"layer": type(layer).__name__}
    if not isinstance(layer, CompressedLayer):
        return plain, stock.export(layer)
    plain["clocks"] = layer.clocks()
    fields = {"beside": stock.export(layer, layer.beside)}
    if layer.state is not None:
        plain |= {"method": str(layer.state.method), "spec": layer.state.spec.as_dict()}
        fields["state"] = layer.state.export()
    return plain, fields


def _restored(
    layer: Any, plain: dict[str, Any], fields: dict[str, Any], device: torch.device, own: Method, model: PreTrainedModel
) -> None:
    """Give a fresh layer what `_described` took from the saved one."""
    if type(layer).__name__ != plain["layer"]:
        raise ValueError(f"a {plain['layer']} was saved where this cache has a {type(layer).__name__}")
    if not isinstance(layer, CompressedLayer):
        stock.adopt(layer, fields, device)
        return
    state = None
    if "method" in plain:
        state = rebuilt(_method(plain["method"], own), plain["spec"], fields["state"], device)
    stock.adopt(layer, fields["beside"], device, layer.beside)
    layer.resume(state, plain["clocks"], model)


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Layer index -> device of its weights."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and weight is not None:
            devices.setdefault(index, weight.device)
    return devices


# ---- method and model --------------------------------------------------------------------------------------


def _method(text: str, given: Method | None) -> Method:
    """The method that the text describes; a third party's class only if `given` has it too."""
    if given is not None and str(given) == text:
        return given
    foreign = _foreign(text) - (set() if given is None else _foreign(str(given)))
    if foreign:
        raise UnknownMethod(
            f"the cache was made by {text!r}; {', '.join(sorted(foreign))} is not imported because a file says so: "
            f"pass method=, the method itself"
        )
    try:
        return parse(text)
    except ValueError as cause:
        raise UnknownMethod(f"the cache was made by {text!r}, which this release cannot make: {cause}") from cause


def _foreign(text: str) -> set[str]:
    return set(_FOREIGN.findall(_QUOTED.sub("", text)))


def _model_of(cache: CompressedCache) -> PreTrainedModel:
    """The prepared model that filled the cache."""
    served = [layer.served_by for layer in cache.compressed if layer.state is not None]
    if not served:
        raise ValueError("nothing was fed to this cache yet: there is nothing to save")
    models = {id(model): model for model in (None if ref is None else owner(ref()) for ref in served)}
    if len(models) > 1:
        raise ValueError("several models filled this cache: it continues none of them")
    (model,) = models.values()
    if model is None:
        raise ValueError(
            "the model that filled this cache is gone, or is a copy of a prepared one: save before it is deleted, or "
            "call kvfloor.hf.prepare(model) on the copy first"
        )
    return model


def _check_model(theirs: dict[str, str], model: PreTrainedModel) -> None:
    mine = fingerprint(model)
    if theirs != mine:
        what = "another one" if theirs["model"] == mine["model"] else f"a {theirs['model']}"
        raise WrongModel(
            f"the cache was filled by {what}, not by this {mine['model']}: weights, dtype or configuration differ "
            f"(digest {theirs['sha256'][:12]} there, {mine['sha256'][:12]} here)"
        )
