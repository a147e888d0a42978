"""Compute attention inside vLLM from bounded KV caches that live in the engine's own blocks of memory.

A bounded KV cache keeps at most a fixed number of tokens per kv head, its budget, and evicts the others. A method is
the configuration of such a cache: which tokens it evicts, and its budget. A state is the cache of one request in one
layer, and a pool reads and writes the states of all requests of one layer.
A forward is one run of the model over the new tokens of several requests. vLLM uses three classes: a backend names the
other two and the memory that a layer needs, a builder plans each forward once for all layers, and an implementation
computes one layer's attention. In shapes, T are the tokens of a forward, H kv heads, g query heads per kv head, d the
width of a key and of a value.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.distributed import get_tensor_model_parallel_rank  # pyright: ignore[reportMissingImports]
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.utils import extract_layer_index  # pyright: ignore[reportMissingImports]
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.v1.attention.backend import (  # pyright: ignore[reportMissingImports]
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)

from kvfloor.core.pool import Pool
from kvfloor.vllm import settings
from kvfloor.vllm.batch import Plan, Planner
from kvfloor.vllm.meter import LogTimer, line
from kvfloor.vllm.refusals import require_plain, require_servable
from kvfloor.vllm.served import TABLE, size
from kvfloor.vllm.spec import block_spec

_logger = init_logger("vllm.kvfloor")


class BoundedBackend(AttentionBackend):
    """Tell vLLM the other classes of this backend, the dtypes that it supports, and the memory that a layer needs."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[BoundedImpl]:
        return BoundedImpl

    @staticmethod
    def get_builder_cls() -> type[BoundedBuilder]:
        return BoundedBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Return the description of a layer's memory: one block per request, with as many bytes as its state takes.

        spec: vLLM's own description (AttentionSpec), in whose place the result is used. Raises ValueError for a layer
        that is not plain attention over all tokens.
        """
        return block_spec(spec)


class BoundedBuilder(AttentionMetadataBuilder[Plan]):
    """Plan each forward, once for all layers."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._planner, self._clock = Planner(), LogTimer(settings.log_seconds())
        self._last: Plan | None = None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Plan:
        """Return the plan of a forward: which requests begin, end their prompt, or get tokens.

        common_attn_metadata: vLLM's data about the requests of the forward, such as their lengths and block indices.
        The other arguments are not used. Raises ValueError if a query, key or value of the previous forward was NaN or
        infinite: on a device other than the CPU this is not read earlier.
        """
        del common_prefix_len, fast_build
        if self._last is not None:
            self._last.require_finite()
        given, n = common_attn_metadata, common_attn_metadata.num_reqs
        # The bound is exact, as there is no speculative decoding; it spares a transfer from the device.
        lengths = given.seq_lens if given.seq_lens_cpu_upper_bound is None else given.seq_lens_cpu_upper_bound
        prompting = torch.zeros(n, dtype=torch.bool)
        prompting[: len(given.is_prefilling)] = given.is_prefilling[:n]
        blocks = given.block_table_tensor[:n, 0]
        starts = given.query_start_loc_cpu[: n + 1]
        self._last = self._planner.plan(starts, lengths[:n], blocks, prompting, report=self._clock.due())
        return self._last


class BoundedImpl(AttentionImpl[Plan]):
    """Append the new tokens of each request to its state, and answer their queries, in one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        """Compute the sizes of the layer's states, and store them for `BoundedBackend.customize_spec`.

        The arguments are vLLM's. Raises ValueError for settings of vLLM, a model or a method that cannot be served.
        """
        config = get_current_vllm_config()
        require_servable(config)
        require_plain(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **others,
        )
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, num_kv_heads, head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sliding_window = sliding_window
        rank = get_tensor_model_parallel_rank()
        self._served = size(config, rank, num_heads, num_kv_heads, head_size, self.scale, logits_soft_cap or None)
        self._memory: Tensor | None = None
        self._pool: Pool | None = None
        if TABLE.add(config, self._served):
            _announce(config, self._served)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Plan | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the attention outputs of a forward into `output` (T, H g, d) and return it.

        query          (T, H g, d); key, value: (T, H, d)
        kv_cache       (blocks, 1, 1, bytes) uint8, the engine's memory of this layer
        attn_metadata  the plan that the builder made; None in the engine's warm-up, which has no requests
        Rows of `output` that belong to no request are left as they are. `layer` is vLLM's attention layer, for its
        name. Raises NotImplementedError for `output_scale` and `output_block_scale`, which ask for quantised outputs.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("kvfloor does not quantise attention outputs")
        plan = attn_metadata
        if plan is None:
            return output
        pool = self._pool_of(layer, kv_cache)
        if len(plan.begun):
            pool.clear(plan.begun)
        if len(plan.over):
            pool.seal(plan.over)
        heads, g, d = self.num_kv_heads, self._served.g, self.head_size
        out = output.view(-1, heads * g, d)
        if len(plan.singles):
            at, n = plan.places_on(query.device), len(plan.places)
            q, k, v = query[at].view(n, heads, g, 1, d), key[at].view(n, heads, 1, d), value[at].view(n, heads, 1, d)
            out[at] = pool.step(plan.step_of(pool), q, k, v).reshape(n, heads * g, d)
        for block, start, stop in plan.chunks:
            t = stop - start
            q = query[start:stop].view(1, t, heads, g, d).permute(0, 2, 3, 1, 4)
            k, v = (x[start:stop].view(1, t, heads, d).transpose(1, 2) for x in (key, value))
            answer = pool.step(torch.tensor([block]), q, k, v)
            out[start:stop] = answer[0].permute(2, 0, 1, 3).reshape(t, heads * g, d)
        if plan.report and extract_layer_index(layer.layer_name) == 0:
            _logger.info(line(pool, plan.blocks))
        return output

    def _pool_of(self, layer: Any, kv_cache: Tensor) -> Pool:
        """Return the pool over `kv_cache`, the engine's memory of this layer.

        The pool is made at the first call, and again if the engine passes another memory. It cannot be made earlier,
        because the engine allocates the memory after it has made the layer.
        """
        if self._pool is None or self._memory is not kv_cache:
            spec = self._served.at(extract_layer_index(layer.layer_name), kv_cache.device)
            blocks = kv_cache[:, 0, 0]
            self._pool = Pool(self._served.method, spec, self._served.g, blocks, self._served.tokens)
            self._memory = kv_cache
        return self._pool


class RefusedLatent(AttentionBackend):
    """Refuse models with latent attention (MLA), which vLLM would otherwise serve without any bounded cache."""

    @staticmethod
    def get_name() -> NoReturn:
        raise ValueError(
            "kvfloor cannot serve this: this model has latent attention (MLA), which stores no keys and values: run it "
            f"without {settings.METHOD}"
        )

    get_impl_cls = get_builder_cls = get_name


def _announce(config: Any, served: Any) -> None:
    """Log the method, its budget, and the bytes that each request takes per layer and in all layers of this process.

    config: vLLM's configuration (VllmConfig); served: the method and the sizes of a layer's states (`Served`).
    """
    layers = config.model_config.get_num_layers(config.parallel_config)
    budget = served.method.budget
    _logger.info(
        "kvfloor: every request keeps %s (%s tokens per kv head) in one block of %s bytes per layer, "
        "%s bytes in %s layers",
        served.method,
        f"{budget:,}" if isinstance(budget, int) else f"all of its at most {served.tokens:,}",
        f"{served.nbytes:,}",
        f"{served.nbytes * layers:,}",
        layers,
    )
