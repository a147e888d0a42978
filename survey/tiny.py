"""Build tiny random models: one per family that transformers has for causal language modelling.

A family is a key of transformers' own mapping, such as "llama" or "gemma3_text". Its default configuration is shrunk
through the field names that most families share (`SIZES`); `CHANGES` holds the fields of single families.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 4, 2, 16
WINDOW = 16
VOCABULARY = 100
_STD = 0.15  # of every weight matrix: makes attention as peaked and logits as large as in a trained model

_WIDTH = HEADS * HEAD_DIM
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    "head_dim": HEAD_DIM,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), WINDOW),
    "vocab_size": VOCABULARY,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 99,
}

_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2
_SHARED = {  # the last two of six layers read the keys of the third and the fourth
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {  # every head projects its own key from one shared latent, so there are as many kv heads as heads
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": 12 + HEAD_DIM,
    "v_head_dim": 10,
}
_LATENT_FAMILIES = "axk1 bailing_hybrid deepseek_v2 deepseek_v3 glm4_moe_lite kimi_linear minicpm3 youtu"
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LATENT_FAMILIES.split(), _LATENT),
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    **{family: {"attn_logit_softcapping": 1.0} for family in ("gemma2", "vaultgemma")},  # at 50 it would change nothing
    "gemma3n_text": _SHARED,
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _SHARED),
    "gpt_neo": {"num_layers": LAYERS, "attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": _MAMBA | {"layer_types": _LINEAR_AND_FULL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    **{family: {"layer_types": ["conv", "full_attention"] * 2} for family in ("lfm2", "lfm2_moe")},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 8, "chunk_size": 8},
    **{family: {"sliding_window": 24} for family in ("laguna", "moshi", "deepseek_v4")},  # a field that cannot be None
    "mamba2": {"num_heads": 8},
    "longcat_flash": _LATENT | {"num_layers": LAYERS // 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "recurrent_gemma": {"sliding_window": 24, "attention_window_size": 24},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """List the families of causal language models in this transformers release."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return a configuration of a few layers with every layer type that the family's default configuration has."""
    kind = CONFIG_MAPPING[family]
    wanted = SIZES | CHANGES.get(family, {}) | changes
    return kind(**_shrunk(kind(), wanted))


def _shrunk(default: PreTrainedConfig, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `wanted` that this configuration has, with its layer types and shrunk sub-configurations."""
    sizes = {name: value for name, value in wanted.items() if name in SIZES and _can_be_set(default, name)}
    types = getattr(default, "layer_types", None)
    if types and _can_be_set(default, "layer_types"):
        sizes["layer_types"] = cycled(types, wanted["num_hidden_layers"])
    if "layer_types" in wanted:
        sizes["layer_types"] = wanted["layer_types"]
    if "sliding_attention" not in sizes.get("layer_types", ()) and wanted["sliding_window"] == SIZES["sliding_window"]:
        sizes |= {"sliding_window": None} if "sliding_window" in sizes else {}  # else every layer would slide
    for part in getattr(default, "sub_configs", {}):
        inner = getattr(default, part, None)
        if isinstance(inner, PreTrainedConfig):
            sizes[part] = _shrunk(inner, wanted) | {"model_type": inner.model_type}
    decoder = hasattr(default, "vocab_size")  # takes names that are not fields too, such as Gemma 4's global_head_dim
    own = {name: value for name, value in wanted.items() if name not in SIZES and (decoder or hasattr(default, name))}
    return sizes | own


def _can_be_set(default: PreTrainedConfig, name: str) -> bool:
    """Return True if this configuration has a field of this name, and not just a read-only property."""
    field = getattr(type(default), default.attribute_map.get(name, name), None)
    if isinstance(field, property) and field.fset is None:
        return False
    try:
        return hasattr(default, name)
    except RuntimeError:  # transformers raises it if the field varies from layer to layer
        return True


def cycled(types: Iterable[str], layers: int) -> list[str]:
    """Repeat the distinct layer types in turn, full attention last, up to `layers` of them."""
    distinct = sorted(dict.fromkeys(types), key=lambda kind: kind == "full_attention")
    return [distinct[i % len(distinct)] for i in range(layers)]


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a seeded random model of this family in float32, with its default attention implementation.

    A model that caps its attention logits runs eager attention, because sdpa leaves the cap out: older releases of
    transformers do so without a warning.
    """
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    attention = {"attn_implementation": "eager"} if capped else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and 0 < float(weight.std()) < _STD:
                weight.mul_(_STD / float(weight.std()))
            elif name.endswith("sinks"):
                weight.copy_(torch.randn(weight.shape, generator=generator))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
