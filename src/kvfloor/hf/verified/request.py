"""Check the arguments of `generate_verified` before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.hf.positions import table_room
from kvfloor.hf.replaced import SwitchingRotation
from kvfloor.validation import count


def prompts_of(ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> list[list[int]]:
    """Return the token ids of each batch item of ids (B, n), without the slots that the mask (B, n) has 0 in.

    Raises TypeError for what is no tensor of whole numbers, and ValueError for an empty batch or item, a mask of
    another shape, and ids that are not below `vocabulary`.
    """
    if not isinstance(ids, Tensor) or ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a tensor (batch, tokens) of token ids, got {got}")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"ids must be (batch, tokens) with at least one token, got {tuple(ids.shape)}")
    if attention_mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    elif not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor (batch, tokens), got {type(attention_mask).__name__}")
    elif attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)} and ids {tuple(ids.shape)}: they must match")
    else:
        real = attention_mask.bool().to(ids.device)
    if not bool(real.any(1).all()):
        raise ValueError("attention_mask leaves a batch item without a token: give each item at least one")
    chosen = ids[real]
    if int(chosen.min()) < 0 or int(chosen.max()) >= vocabulary:
        raise ValueError(f"token ids are 0 .. {vocabulary - 1}, got {int(chosen.min())} .. {int(chosen.max())}")
    return [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


@dataclass(frozen=True)
class Sampling:
    """Hold the sampling settings of a call; raises TypeError and ValueError naming one that is out of its domain.

    do_sample    False: the likeliest token is chosen, and the other settings must be left out
    temperature  above 0; top_k: 0 (all tokens) or more; top_p: above 0 and at most 1
    seed         seeds a generator of its own, on the CPU
    generator    draws in place of one from `seed`
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, (int, float)):
                raise TypeError(f"{name} must be a number, got {given!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        count("generate_verified", least=0, top_k=self.top_k)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(self.generator).__name__}")
        if self.generator is not None and self.seed:
            raise ValueError("give seed or generator, not both")
        idle = (self.temperature, self.top_k, self.top_p, self.seed, self.generator) == (1.0, 0, 1.0, 0, None)
        if not self.do_sample and not idle:
            raise ValueError("temperature, top_k, top_p, seed and generator are for do_sample=True")

    def drawn_by(self) -> torch.Generator:
        """Return the generator that draws the tokens."""
        return self.generator or torch.Generator().manual_seed(self.seed)


def stops_of(model: PreTrainedModel, given: int | Sequence[int] | None) -> list[int]:
    """Return the ids of the tokens that end an item: those given, or those of the model's generation configuration."""
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = [] if given is None else [given] if isinstance(given, int) else list(given)
    if not all(isinstance(stop, int) and not isinstance(stop, bool) for stop in stops):
        raise TypeError(f"eos_token_id is a token id or several, got {given!r}")
    return stops


def pad_of(model: PreTrainedModel, given: int | None, stops: Sequence[int]) -> int:
    """Return the token id that fills up items which end early: the one given, the model's, or a stop token."""
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    if given is None:
        given = stops[0] if stops else 0
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"pad_token_id is a token id, got {given!r}")
    return given


def require_room(model: PreTrainedModel, longest: int, most: int) -> None:
    """Raise ValueError if `most` tokens in all go beyond the positions that the model's keys can share.

    longest: number of tokens of the longest prompt.
    """
    room = table_room(model)
    if room is not None and most > room:
        raise ValueError(f"this model has a learned table of {room} positions, and {most} tokens would be fed")
    rotation = SwitchingRotation.of(model.config)
    if rotation is not None:
        rotation.refuse_crossing(longest, most - longest)


def require_streamable(streamer: Any, batch: int) -> None:
    """Raise TypeError unless the streamer has the methods put and end, and ValueError for more than one batch item."""
    if streamer is None:
        return
    if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise TypeError(f"streamer must have put and end, as transformers' BaseStreamer, got {type(streamer).__name__}")
    if batch > 1:
        raise ValueError(f"a streamer takes the tokens of one batch item, and there are {batch}")
