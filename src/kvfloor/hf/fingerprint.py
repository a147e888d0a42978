"""Compute a digest of a model, so that a saved cache is loaded only for the model that filled it.

The digest covers the model's class, its configuration, the active adapters (such as LoRA) and a sample of the entries
of every weight.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.message import raw_bytes
from kvfloor.hf.weights import adapters_of, stored

SAMPLE = 1024  # numbers looked at per parameter

# Fields that a cache depends on and weights do not show. Named one by one: a newer transformers release adds fields.
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


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Return the model's {"model": class name, "adapters": names of the active ones, "sha256": hex digest}.

    The same weights give the same digest on any device, offloaded to disk or not. The digest changes with the dtype or
    the quantisation, with an active or merged adapter, and with an adapter's scaling factor. It does not change with an
    inactive adapter, or with weight entries outside the sample. Collective on a sharded model: every rank must call it,
    since the weights are gathered from all ranks. Raises ValueError naming a weight whose numbers cannot be read, such
    as one on the meta device.
    """
    adapters = adapters_of(model)
    config = model.config.get_text_config(decoder=True)
    plain = config.to_dict()  # a field that varies from layer to layer can be read only here, an alias only below
    fixed = {name: plain[name] if name in plain else getattr(config, name, None) for name in _FIXED}
    about = [type(model).__name__, fixed, adapters.scales]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, numbers in stored(model, adapters):
        digest.update(f"\n{name} {numbers.dtype} {tuple(numbers.shape)}\n".encode())
        digest.update(raw_bytes(_sample(numbers)))
    return {"model": type(model).__name__, "adapters": adapters.active, "sha256": digest.hexdigest()}


def _sample(numbers: Tensor) -> Tensor:
    """Return about 1024 entries (`SAMPLE`) of the flattened weight `numbers`, evenly spaced at an odd step.

    With an even step, all entries could come from one column of a matrix whose width is a power of two.
    """
    flat = numbers.reshape(-1)
    return flat[:: flat.numel() // SAMPLE | 1]
