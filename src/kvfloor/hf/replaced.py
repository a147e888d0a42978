"""Refuse calls that would bypass a compressed cache.

There are two kinds: a forward in which another attention function than kvfloor's reads the keys, and a generate() that
would replace the cache by a DynamicCache. A compressed cache is one whose layers do not hold all keys and values, but
what a compression method keeps of them. A slot is one column of the padded batch.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from kvfloor.hf.selection import selects_kvfloor


def refuse_other_attention(served_by: weakref.ref[nn.Module] | None) -> None:
    """Raise RuntimeError if the model has switched away from kvfloor's attention since it filled a cache layer.

    served_by: the model's attention module that called the cache layer last, None before the first call. Another
    attention function would attend to the newest tokens alone, because a compressed cache returns no others to the
    model.
    """
    module = None if served_by is None else served_by()
    config = getattr(module, "config", None)
    if isinstance(config, PreTrainedConfig) and not selects_kvfloor(config):
        raise RuntimeError(
            f"the attention of this model is {config._attn_implementation!r} now, which cannot read a compressed "
            f"cache: call kvfloor.hf.prepare(model) again, or go on with a stock cache. The cache is as it was"
        )


class SwitchingRotation:
    """Hold the length at which a model (Phi-3, PhiMoE, Phi-4 multimodal) changes the angles of its rotary embedding.

    Keys rotated below that length do not fit keys rotated above it. So at that length generate() replaces any
    cache by a DynamicCache and feeds all tokens to it again. A compressed cache no longer has all tokens and raises
    an error instead.
    """

    def __init__(self, length: int, angles_differ: bool, dropped_unasked: bool) -> None:
        """Store the length at which a model changes its angles, and how its generate() reacts.

        length            tokens up to which the first angles are used
        angles_differ     False if the configuration uses the same angles below and above the length
        dropped_unasked   True if generate() replaces a cache without calling the cache's `get_seq_length` (slots fed so
                          far), where an error could be raised in time
        """
        self._length, self._angles_differ, self._dropped_unasked = length, angles_differ, dropped_unasked

    @classmethod
    def of(cls, config: PreTrainedConfig) -> SwitchingRotation | None:
        """Return the object for models of this configuration; None if it states no length at which the angles change.

        The length is original_max_position_embeddings.
        """
        length = getattr(config, "original_max_position_embeddings", None)
        if not isinstance(length, int):
            return None
        rope = getattr(config, "rope_parameters", None) or {}
        reachable = (getattr(config, "max_position_embeddings", None) or 0) > length
        return cls(length, rope.get("rope_type", "default") != "default", reachable and _drops_unasked(config))

    def seen(self, slots: int) -> int:
        """Return `slots` as an int that raises ValueError if generate() is about to replace the cache.

        slots: columns of the padded batch fed so far. Before generate() replaces the cache, it compares this int with
        the length at which the angles change. The error is raised by that comparison.
        """
        return _SlotsSeen(slots, self)

    def refuse_unasked(self, seen: int) -> None:
        """Raise ValueError if the model's generate() may later replace the cache without calling `get_seq_length`.

        In older transformers releases, generate() replaces the cache by a DynamicCache at the length where the rotary
        angles change. Only a call of `get_seq_length` (slots fed so far) could raise an error just before that.
        seen: the number of slots fed so far.
        """
        if self._dropped_unasked and seen <= self._length:
            raise ValueError(
                f"{self.told(seen)}. generate() of transformers {transformers.__version__} drops a cache there without "
                f"asking it, so that generating is refused below that length too; newer releases ask"
            )

    def refuse_crossing(self, seen: int, new: int) -> None:
        """Raise ValueError if `new` slots would take a cache of `seen` slots past the length where angles change.

        An empty cache (`seen` 0) may pass the length: its keys are then all rotated by the same angles.
        """
        if self._angles_differ and 0 < seen <= self._length < seen + new:
            raise ValueError(self.told(seen))

    def told(self, seen: int) -> str:
        """Return the error message for a cache with `seen` slots: that the angles change, and what to do instead."""
        return (
            f"this model turns its keys by other angles above {self._length} tokens "
            f"(original_max_position_embeddings), so the {seen} in this cache do not go with more than that, and "
            f"generate() would go on with a DynamicCache instead: give an empty compressed cache all the tokens in one "
            f"forward, model(input_ids, past_key_values=cache), and generate from there; or use a stock cache"
        )


def _drops_unasked(config: PreTrainedConfig) -> bool:
    """Return True if generate() decides to replace the cache without calling `get_seq_length`.

    config: the configuration of the model, whose class has this generate(). `get_seq_length` is the cache's count of
    slots fed. In older transformers releases, generate() decides by a position count of its own.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    prepares = getattr(family, "prepare_inputs_for_generation", None)
    return prepares is not None and "cache_position" in inspect.signature(prepares).parameters


class _SlotsSeen(int):
    """Represent the number of slots fed to a cache, for generate() to compare with the length where angles change.

    A comparison `count <= length` with that length raises ValueError if it would be True.
    """

    _rotation: SwitchingRotation

    def __new__(cls, slots: int, rotation: SwitchingRotation) -> _SlotsSeen:
        seen = super().__new__(cls, slots)
        seen._rotation = rotation
        return seen

    def __le__(self, other: Any) -> bool:
        if int(self) <= other and other == self._rotation._length:
            raise ValueError(self._rotation.told(int(self)))
        return int(self) <= other
