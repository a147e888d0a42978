"""Select kvfloor's attention in a model's configuration, under a name that contains the earlier attention's name.

The earlier attention is the one that was selected before. The name, such as "kvfloor over sdpa (...)", is the only
record of it. So deep copies, pickles and separate parts of a model keep this record. The name also contains the call
that undoes the selection, which transformers' error messages then show.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_BEGIN, _END = "kvfloor over ", " (kvfloor.hf.restore(model) undoes it)"
_AS_THEY_ARE = ("eager", "sdpa")


def name_over(before: str | None) -> str:
    """Return the name of kvfloor's attention for a model in which the attention `before` was selected.

    transformers searches this name for words such as "flash", and prepares other inputs if it finds one. A slash in the
    name makes transformers load a kernel. So `before` is written with dots between its letters, unless it is "eager" or
    "sdpa". None: no attention was selected, which counts as "eager".
    """
    before = before or "eager"
    return _BEGIN + (before if before in _AS_THEY_ARE else "·".join(before).replace("/", "÷")) + _END


def before(name: str | None) -> str | None:
    """Return the name of the earlier attention, such as "sdpa", from a name by `name_over`; None for any other name."""
    if name is None or not (name.startswith(_BEGIN) and name.endswith(_END)):
        return None
    return name[len(_BEGIN) : -len(_END)].replace("·", "").replace("÷", "/")


def selects_kvfloor(config: PreTrainedConfig) -> bool:
    """Return True if models of this configuration use kvfloor's attention."""
    return before(config._attn_implementation) is not None


def configurations(model: nn.Module) -> list[PreTrainedConfig]:
    """List the configurations of a model and of its parts, each once: those that select an attention function.

    Configurations of parts whose attention cannot be selected in transformers are left out.
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
    """Replace all configurations in this model by copies, so that changes do not reach other models that share them."""
    copies: dict[int, object] = {}
    for part in model.modules():
        for name, held in list(vars(part).items()):
            if isinstance(held, PreTrainedConfig):
                vars(part)[name] = copy.deepcopy(held, copies)


def select(model: nn.Module) -> set[str]:
    """Select kvfloor's attention in all parts of the model, and return the names by which they select it.

    The caller must register the attention under these names in transformers, which looks it up by name.
    """
    if not all(selects_kvfloor(config) for config in configurations(model)):
        give_own_configurations(model)
    for config in configurations(model):
        if not selects_kvfloor(config):
            config._attn_implementation_internal = name_over(config._attn_implementation)
    return {str(config._attn_implementation) for config in configurations(model)}


def deselect(model: nn.Module) -> None:
    """Select the earlier attention again in every part of the model that uses kvfloor's."""
    for config in configurations(model):
        earlier = before(config._attn_implementation)
        if earlier is not None:
            config._attn_implementation_internal = earlier
