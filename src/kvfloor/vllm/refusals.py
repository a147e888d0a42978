"""Refuse, when vLLM starts, the settings and models that cannot be served with bounded KV caches.

A bounded cache keeps at most a fixed number of tokens per kv head. Every refusal is a ValueError of one line that says
what was found and, where there is a remedy, what to do. After these checks, no request is refused while it runs.
"""

from __future__ import annotations

from typing import Any


def require_servable(config: Any) -> None:
    """Raise ValueError if a setting of vLLM or a property of the model is not supported with bounded caches.

    config: vLLM's configuration (VllmConfig)
    """
    model, parallel = config.model_config, config.parallel_config
    found = {
        "prefix caching is on, which shares blocks of tokens between requests; a request with a bounded cache has one "
        "block of its own: pass --no-enable-prefix-caching, or enable_prefix_caching=False": (
            config.cache_config.enable_prefix_caching
        ),
        "speculative decoding takes rejected tokens back, and evicted tokens cannot come back: leave "
        "--speculative-config out": config.speculative_config is not None,
        "decode context parallelism divides a request's tokens among devices: pass "
        "--decode-context-parallel-size 1": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism divides a request's tokens among devices: pass "
        "--prefill-context-parallel-size 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual-batch overlap runs two halves of a batch side by side, which is not supported: leave --enable-dbo out": (
            parallel.use_ubatching
        ),
        "pipeline parallelism with --enforce-eager fails on a CPU in vLLM itself, at the first request: leave "
        "--enforce-eager out": (
            parallel.pipeline_parallel_size > 1 and model.enforce_eager and config.device_config.device_type == "cpu"
        ),
        "a KV connector transfers blocks of tokens, which a bounded cache does not have: leave --kv-transfer-config "
        "out": config.kv_transfer_config is not None,
        "this model has latent attention (MLA), which stores no keys and values": model.use_mla,
        "this model is an encoder-decoder, whose cross-attention reads a fixed input": model.is_encoder_decoder,
        "this model has layers with other memory than attention, such as Mamba's": model.is_hybrid,
        "this model attends to images in both directions": model.is_mm_prefix_lm,
        "pooling models return no tokens one by one: a bounded cache would save nothing": (
            model.runner_type != "generate"
        ),
    }
    for reason, holds in found.items():
        if holds:
            raise ValueError(f"kvfloor cannot serve this: {reason}")


def require_plain(**given: Any) -> None:
    """Raise ValueError if a layer's attention is not plain causal attention over keys and values of its own.

    given: the arguments from which vLLM makes the layer's attention, by name: alibi_slopes, sliding_window,
    kv_cache_dtype, attn_type, and so on. An argument that this function does not know must be None.
    """
    dtype = given.pop("kv_cache_dtype")
    if dtype != "auto":
        raise ValueError(
            f"kvfloor cannot serve this: keys and values are kept in the model's own dtype, not {dtype}: leave "
            f"--kv-cache-dtype out"
        )
    kind = str(getattr(given["attn_type"], "value", given["attn_type"]))
    reasons = {
        "sliding_window": "this model has sliding-window layers, which bound their memory themselves",
        "alibi_slopes": "this model adds a bias by distance (ALiBi) to its logits",
        "sinks": "this model has logits of its own for attention sinks",
        "kv_sharing_target_layer_name": "layers of this model share the keys and values of an earlier layer",
    }
    if kind != "decoder":
        raise ValueError(f"kvfloor cannot serve this: this model has attention of type {kind}, not causal attention")
    for name, value in given.items():
        if name != "attn_type" and value is not None:
            reason = reasons.get(name, f"this model's attention has {name} = {value!r}, which is not known here")
            raise ValueError(f"kvfloor cannot serve this: {reason}")
