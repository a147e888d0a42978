"""Find the transformers model inside a wrapper such as torch.compile, PEFT or DataParallel."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

_INSIDE = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel, DeepSpeed, FSDP


def unwrapped(model: object) -> PreTrainedModel:
    """Return the transformers model (PreTrainedModel) that `model` is or wraps. Raises TypeError if there is none."""
    *_, inner = _layers(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"a transformers model (PreTrainedModel) is needed, got {type(model).__name__}: give the model that is "
            f"inside it (PEFT: get_base_model(), DataParallel: .module, torch.compile: ._orig_mod)"
        )
    return inner


def refuse_own_cache(model: object) -> None:
    """Raise ValueError if `model` uses PEFT's prefix tuning, which replaces the given cache by its own."""
    for wrapper in _layers(model):
        kind = getattr(getattr(wrapper, "active_peft_config", None), "peft_type", None)
        if getattr(kind, "value", kind) == "PREFIX_TUNING":
            raise ValueError(
                "PEFT's prefix tuning puts a cache that holds the prefix in the place of the one it is given, so that "
                "a compressed cache would stay empty: use prompt tuning, LoRA or another adapter, or a stock cache"
            )


def _layers(model: object) -> Iterator[object]:
    """Yield `model`, the module that it wraps, the module wrapped by that one, and so on to the innermost."""
    inner, seen = model, []
    while not any(inner is each for each in seen):
        yield inner
        seen.append(inner)
        if isinstance(inner, PreTrainedModel) or not isinstance(inner, nn.Module):
            return
        within = [vars(inner)["_modules"].get(name) for name in _INSIDE]
        base = getattr(inner, "get_base_model", None)  # PEFT
        inner = base() if callable(base) else next((each for each in within if each is not None), inner)
