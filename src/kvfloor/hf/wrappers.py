"""The transformers model inside what people hold: torch.compile, PEFT, DataParallel and others wrap it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_INSIDE = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel, DeepSpeed, FSDP


def unwrapped(model: object) -> PreTrainedModel:
    """Return the transformers model that `model` is or wraps. Raises TypeError if there is none."""
    inner, seen = model, []
    while not isinstance(inner, PreTrainedModel) and not any(inner is each for each in seen):
        seen.append(inner)
        within = [vars(inner)["_modules"].get(name) for name in _INSIDE] if isinstance(inner, nn.Module) else []
        base = getattr(inner, "get_base_model", None)  # PEFT
        inner = base() if callable(base) else next((each for each in within if each is not None), inner)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"a transformers model (PreTrainedModel) is needed, got {type(model).__name__}: give the model that is "
            f"inside it (PEFT: get_base_model(), DataParallel: .module, torch.compile: ._orig_mod)"
        )
    return inner
