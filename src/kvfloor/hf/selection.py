"""Select kvfloor's attention in a configuration under a name that also holds the attention selected before.

Nothing else is stored. The name goes along with deep copies, pickles and parts of a model, each of which has its own,
and transformers' own error messages about it include how to undo it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_BEGIN, _END = "kvfloor over ", " (kvfloor.hf.restore(model) undoes it)"
_AS_THEY_ARE = ("eager", "sdpa")


def name_over(before: str | None) -> str:
    """Name kvfloor's attention where `before` was selected.

    transformers looks for words such as "flash" in a name and prepares other inputs then. It takes a name with a slash
    for a kernel to load. So all names but "eager" and "sdpa", which it may find, are spelled out.
    """
    before = before or "eager"
    return _BEGIN + (before if before in _AS_THEY_ARE else "·".join(before).replace("/", "÷")) + _END


def before(name: str | None) -> str | None:
    """Return the attention selected before, given kvfloor's name; None for the name of any other attention."""
    if name is None or not (name.startswith(_BEGIN) and name.endswith(_END)):
        return None
    return name[len(_BEGIN) : -len(_END)].replace("·", "").replace("÷", "/")


def selects_kvfloor(config: PreTrainedConfig) -> bool:
    """Return True if models of this configuration use kvfloor's attention."""
    return before(config._attn_implementation) is not None


def configurations(model: nn.Module) -> list[PreTrainedConfig]:
    """List the configurations, each once, by which this model and its parts select their attention.

    Configurations of parts whose attention transformers does not let users select are left out.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    fixed = {id(part.config) for part in parts if not part._can_set_attn_implementation()}
    found = {id(part.config): part.config for part in parts if id(part.config) not in fixed}
    for inner in (inner for part in parts for inner in _inner(part.config)):  # of parts that are no models of their own
        if id(inner) not in fixed:
            found.setdefault(id(inner), inner)
    return list(found.values())


def _inner(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from _inner(part)


def give_own_configurations(model: nn.Module) -> None:
    """Replace all configurations of this model by copies: another model built from the same ones keeps them."""
    copies: dict[int, object] = {}
    for part in model.modules():
        for name, held in list(vars(part).items()):
            if isinstance(held, PreTrainedConfig):
                vars(part)[name] = copy.deepcopy(held, copies)


def select(model: nn.Module) -> set[str]:
    """Select kvfloor's attention in all parts of the model; returns the names under which it must be registered."""
    if not all(selects_kvfloor(config) for config in configurations(model)):
        give_own_configurations(model)
    for config in configurations(model):
        if not selects_kvfloor(config):
            config._attn_implementation_internal = name_over(config._attn_implementation)
    return {str(config._attn_implementation) for config in configurations(model)}


def deselect(model: nn.Module) -> None:
    """Restore in every part the attention selected before kvfloor's; a part with another selection keeps it."""
    for config in configurations(model):
        earlier = before(config._attn_implementation)
        if earlier is not None:
            config._attn_implementation_internal = earlier
