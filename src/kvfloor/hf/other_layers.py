"""What transformers' own layers hold (sliding windows, convolutions, linear attention), taken out and put back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def export(layer: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """These attributes (None: all) as `message.flatten` takes them; TypeError names one that cannot be saved."""
    chosen = vars(layer) if names is None else {name: getattr(layer, name) for name in names}
    return {name: _plain(value, f"{type(layer).__name__}.{name}") for name, value in chosen.items()}


def adopt(layer: Any, fields: dict[str, Any], device: torch.device, names: Iterable[str] | None = None) -> None:
    """Give a fresh layer of the same class what `export` took; ValueError if the classes' attributes differ."""
    missing = set(vars(layer) if names is None else names) - set(fields)
    if missing:
        raise ValueError(f"{type(layer).__name__} keeps {', '.join(sorted(missing))} here, which the saved one did not")
    for name, value in fields.items():
        setattr(layer, name, _living(value, device))


def move(layer: Any, device: str | torch.device, names: Iterable[str] | None = None) -> None:
    """Put the tensors among these attributes (None: all) on `device`, and let the layer know."""
    for name in vars(layer) if names is None else names:
        value = getattr(layer, name)
        if isinstance(value, Tensor):
            setattr(layer, name, value.to(device))
        elif isinstance(value, dict):
            setattr(layer, name, {key: x.to(device) if isinstance(x, Tensor) else x for key, x in value.items()})
        elif isinstance(value, torch.device):
            setattr(layer, name, torch.device(device))


def nbytes(layer: Any, names: Iterable[str] | None = None) -> int:
    """Bytes of the storages that these attributes (None: all) hold."""
    chosen = vars(layer).values() if names is None else [getattr(layer, name) for name in names]
    tensors = [x for value in chosen for x in (value.values() if isinstance(value, dict) else [value])]
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device"]  # where the layer lives next is for the model to say
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return {str(key): _plain(item, f"{path}[{key}]") for key, item in value.items()}
    raise TypeError(f"{path} is a {type(value).__name__}: such a layer cannot be saved")


def _living(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {int(key): _living(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return device if value == ["device"] else getattr(torch, value[1])
    return value
