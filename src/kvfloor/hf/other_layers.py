"""Save, restore, move and count the tensors of transformers' own cache layers.

These are layers with a sliding window, a convolution or linear attention. A hybrid layer has full attention beside a
convolution or linear attention. For such a layer, callers pass in `names` the attributes of the convolution or linear
attention, so that only these are handled. On a sharded model, a layer's keys and values are those of this process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BY_HEAD = ("keys", "values")
"""Attributes of a layer with a sliding window, (B, Hkv, n, width): a sharded model's ranks hold other kv heads each."""


def has_heads(layer: Any) -> bool:
    """Return True if this layer of one of transformers' classes holds tensors of keys and values now.

    False for a layer that makes them at its first update and had none yet, and for a kind of layer without keys.
    """
    return isinstance(getattr(layer, "keys", None), Tensor)


def export(layer: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return attributes of a layer as a dict that can be serialised: nested dicts of tensors and JSON values.

    names: names of the attributes to return; None: all. Raises TypeError naming an attribute that cannot be saved.
    """
    chosen = vars(layer) if names is None else {name: getattr(layer, name) for name in names}
    return {name: _plain(value, f"{type(layer).__name__}.{name}") for name, value in chosen.items()}


def adopt(layer: Any, fields: dict[str, Any], device: torch.device, names: Iterable[str] | None = None) -> None:
    """Set on an empty layer the attributes that `export` returned for a layer of the same class, tensors on `device`.

    names: names of the attributes that `fields` must hold; None: all that the empty layer has. Raises ValueError if
    `fields` lacks one of these attributes, or contains the name of a method of the class.
    """
    missing = set(vars(layer) if names is None else names) - set(fields)
    if missing:
        raise ValueError(f"{type(layer).__name__} keeps {', '.join(sorted(missing))} here, which the saved one did not")
    strange = [name for name in fields if callable(getattr(type(layer), name, None))]
    if strange:
        raise ValueError(f"{', '.join(sorted(strange))} of {type(layer).__name__} cannot be given from a file")
    for name, value in fields.items():
        setattr(layer, name, _living(value, device))


def move(layer: Any, device: str | torch.device, names: Iterable[str] | None = None) -> None:
    """Move the tensors of a layer to `device`, and replace by `device` each torch.device among its attributes.

    names: names of the attributes to move or replace; None: all.
    """
    for name in vars(layer) if names is None else names:
        value = getattr(layer, name)
        if isinstance(value, Tensor):
            setattr(layer, name, value.to(device))
        elif isinstance(value, dict):
            setattr(layer, name, {key: x.to(device) if isinstance(x, Tensor) else x for key, x in value.items()})
        elif isinstance(value, torch.device):
            setattr(layer, name, torch.device(device))


def devices(layer: Any, names: Iterable[str] | None = None) -> set[torch.device]:
    """Return the devices of a layer's tensors, and each torch.device among the layer's attributes.

    The layer will make its next tensors on the devices among its attributes. names: names of the attributes to look at;
    None: all.
    """
    chosen = vars(layer).values() if names is None else [getattr(layer, name) for name in names]
    values = [x for value in chosen for x in (value.values() if isinstance(value, dict) else [value])]
    return {x.device if isinstance(x, Tensor) else x for x in values if isinstance(x, (Tensor, torch.device))}


def nbytes(layer: Any, names: Iterable[str] | None = None) -> int:
    """Return the bytes of the storages of a layer's tensors, each storage counted once.

    names: names of the attributes whose tensors are counted; None: all.
    """
    chosen = vars(layer).values() if names is None else [getattr(layer, name) for name in names]
    tensors = [x for value in chosen for x in (value.values() if isinstance(value, dict) else [value])]
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def blank(layer: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return a deep copy of an empty layer's attributes, by which `refresh` can make the layer empty again later.

    names: names of the attributes to copy; None: all.
    """
    return copy.deepcopy({name: getattr(layer, name) for name in (vars(layer) if names is None else names)})


def refresh(layer: Any, empty: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Make a layer empty again, even after a failure in the middle of an update.

    All attributes are set to those of an empty layer. A layer's own reset is not enough after such a failure, and
    differs from release to release.
    empty: the attributes of an empty layer, name -> value, as `blank` returned them. names: names of the attributes in
    `empty`; None: all attributes, and then those of the layer that are not in `empty` are deleted.
    """
    for name in [name for name in vars(layer) if name not in empty] if names is None else ():
        delattr(layer, name)
    vars(layer).update(copy.deepcopy(empty))


def count_changes(layer: Any) -> None:
    """Replace a layer's linear states that are inference-mode tensors by copies that count their in-place changes.

    Linear states are those of convolutions and linear attention. torch's count of a tensor's changes
    (`Tensor._version`) shows later whether a forward has updated the state.
    """
    for states in (layer.conv_states, layer.recurrent_states):
        for index, state in states.items():
            if state is not None and state.is_inference():
                with torch.inference_mode(False), torch.no_grad():
                    states[index] = state.clone()


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["device"]  # the device is chosen at loading, by the model
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return {str(key): _plain(item, f"{path}[{key}]") for key, item in value.items()}
    raise TypeError(f"{path} is a {type(value).__name__}: such a layer cannot be saved")


def _living(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {int(key): _living(item, device) for key, item in value.items()}
    if value == ["device"]:
        return device
    if isinstance(value, list):
        kind, name = value
        dtype = getattr(torch, name, None)
        if kind != "dtype" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value} is neither a dtype nor a device")
        return dtype
    return value
