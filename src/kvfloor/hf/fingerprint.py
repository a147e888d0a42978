"""A digest that tells one model from another: its class, what its configuration fixes, a sample of every weight."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.message import raw_bytes

SAMPLE = 1024  # numbers looked at per parameter

# What a cache depends on and weights do not show. Named one by one: a newer transformers release adds fields.
_FIXED = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "rope_theta",
    "rope_parameters",
    "rms_norm_eps",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "hidden_act",
)


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """{"model": class name, "sha256": hex digest} of the model as it is now.

    The same weights give the same digest on any device; another dtype gives another one, since a cache cannot
    continue bit for bit there. A weight that was changed at fewer places than the sample sees goes unnoticed.
    """
    config = model.config.get_text_config(decoder=True)
    plain = config.to_dict()  # a field that varies from layer to layer can be read only here, an alias only below
    fixed = {name: plain[name] if name in plain else getattr(config, name, None) for name in _FIXED}
    digest = hashlib.sha256(json.dumps([type(model).__name__, fixed], sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"\n{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(raw_bytes(_sample(parameter.detach())))
    return {"model": type(model).__name__, "sha256": digest.hexdigest()}


def _sample(parameter: Tensor) -> Tensor:
    """About `SAMPLE` numbers; the odd step does not stay in one column of a matrix whose width is a power of two."""
    flat = parameter.reshape(-1)
    return flat[:0] if parameter.is_meta else flat[:: flat.numel() // SAMPLE | 1]
