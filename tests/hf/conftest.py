"""Build tiny random models: they show the plug-in's behaviour, not the quality of methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.cache_utils import Cache

from kvfloor import models
from kvfloor.hf import prepare
from kvfloor.hf.families import own_cache_class
from survey.tiny import families, tiny_model

Prompt = dict[str, torch.Tensor]
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}


def tiny(family: str = "llama", **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 99,
    }
    if family == "mistral":
        sizes["sliding_window"] = None
    config = FAMILIES[family](**(sizes | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def served(family: str) -> PreTrainedModel:
    """Build a tiny model of this family; skip the test if this release has none, or one that kvfloor refuses."""
    release = f"transformers {transformers.__version__}"
    if family not in families():
        pytest.skip(f"{release} has no {family}")
    own = own_cache_class(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])
    if own is not None:
        pytest.skip(f"{family} fills a {own} of its own in {release}, and is refused")
    return tiny_model(family)


class Talk:
    """Feed a model and its cache, of two rows, step by step under one growing mask; past slots can be hidden."""

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: torch.Tensor | None = None) -> None:
        self.model, self.cache = model, cache
        self.mask = torch.zeros(2, 0, dtype=torch.int64) if mask is None else mask

    @torch.inference_mode()
    def hear(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, hide: tuple[int, slice] | None = None
    ) -> torch.Tensor:
        """Return the logits (2, n, vocabulary) of these ids."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids) if mask is None else mask], 1)
        if hide is not None:
            self.mask[hide] = 0  # of a new tensor
        where = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return self.model(ids, attention_mask=self.mask, position_ids=where, past_key_values=self.cache).logits


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny()


@pytest.fixture
def prepared() -> PreTrainedModel:
    return prepare(tiny())


@pytest.fixture(scope="session")
def builtin() -> tuple[Any, Any]:
    """Return the built-in model, prepared, and its tokenizer."""
    model, tokenizer = models.load()
    return prepare(model), tokenizer


def left_padded(rows: list[list[int]]) -> Prompt:
    """Return a batch of these rows of ids, padded on the left, with its mask."""
    width = max(map(len, rows))
    ids, mask = (
        [[0] * (width - len(row)) + part for row, part in zip(rows, parts, strict=True)]
        for parts in (rows, [[1] * len(row) for row in rows])
    )
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture
def prompt() -> Prompt:
    """Return two prompts of 50 and 70 tokens; the shorter one is left-padded."""
    ids = torch.randint(2, 98, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    return {"input_ids": ids, "attention_mask": mask}
