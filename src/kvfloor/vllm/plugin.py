"""Register kvfloor's attention with vLLM, if the environment variable KVFLOOR_METHOD names a method.

A method is the configuration of a bounded KV cache, as text such as "sinks(4)@1024". vLLM finds the function `register`
by the entry point group "vllm.general_plugins" and calls it in each of its processes, before vLLM chooses an attention
backend. A backend is vLLM's name for an implementation of attention with its memory.
"""

from __future__ import annotations

import os

from kvfloor.vllm import settings

BACKEND = "kvfloor.vllm.backend.BoundedBackend"
LATENT = "kvfloor.vllm.backend.RefusedLatent"


def register() -> None:
    """Register kvfloor's backend with vLLM if KVFLOOR_METHOD names a method; else do nothing.

    On a CPU, where vLLM has one backend, kvfloor's replaces it. On other devices kvfloor's is registered as CUSTOM, for
    the option --attention-backend CUSTOM. Raises ValueError if KVFLOOR_METHOD or KVFLOOR_LOG_SECONDS is malformed, and
    for a release of vLLM that kvfloor was not tested with, unless KVFLOOR_VLLM_UNTESTED=1.
    """
    if not os.environ.get(settings.METHOD, "").strip():
        return
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
    from vllm.v1.attention.backends.registry import (  # pyright: ignore[reportMissingImports]
        AttentionBackendEnum,
        register_backend,
    )

    import vllm  # pyright: ignore[reportMissingImports]

    settings.method_asked()
    settings.require_tested(vllm.__version__)
    settings.log_seconds()
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
        for latent in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
            register_backend(latent, LATENT)
    else:
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
