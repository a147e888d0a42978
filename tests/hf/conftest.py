"""Build tiny random models: they show the plug-in's behaviour, not the quality of methods."""

from __future__ import annotations

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

from kvfloor.hf.families import own_cache_class
from survey.tiny import families, tiny_model

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


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny()


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    """Return two prompts of 50 and 70 tokens; the shorter one is left-padded."""
    ids = torch.randint(2, 98, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    return {"input_ids": ids, "attention_mask": mask}
