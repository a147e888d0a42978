"""Build small models and vLLM engines in this process, and check what an engine returned against transformers.

The reference is kvfloor's cache for transformers, fed with the tokens that the engine chose: the prompt in one piece,
then one token at a time. So every token is checked by itself, and a near-tie cannot hide what comes after it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
os.environ.update(ENVIRONMENT)

TOLERANCE = 2e-3  # nats of a token's log-probability, between two float32 computations
VOCABULARY = 512


def small_llama(folder: Path, **changes: Any) -> Any:
    """Save a random Llama with two layers, two kv heads and two query heads per kv head, and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes
        | {
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "initializer_range": 0.15,
            "max_position_embeddings": 4096,
        }
        | changes
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Return one random prompt of token ids per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@contextmanager
def engine(folder: Path, method: str | None, **options: Any) -> Iterator[Any]:
    """Run vLLM on the model in a folder, with bounded caches of this method; None: stock vLLM."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvfloor.vllm.plugin import register
    from vllm import LLM

    usual = {"max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 128, "dtype": "float32"}
    usual |= {"enable_prefix_caching": False, "enforce_eager": True, "skip_tokenizer_init": True}
    for member in (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
        member.clear_override()
    selector._cached_get_attn_backend.cache_clear()
    os.environ.pop("KVFLOOR_METHOD", None)
    if method is not None:
        os.environ["KVFLOOR_METHOD"] = method
    register()
    llm = None
    try:
        llm = LLM(str(folder), disable_log_stats=True, generation_config="vllm", **usual | options)
        yield llm
    finally:
        os.environ.pop("KVFLOOR_METHOD", None)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Answer:
    """Hold the tokens that an engine generated after a prompt, and their log-probabilities."""

    tokens: list[int]
    log_probabilities: list[float]


def greedy(count: int, **changes: Any) -> Any:
    """Return vLLM's settings for `count` greedy tokens, whatever they are, with log-probabilities."""
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    usual: dict[str, Any] = {"output_kind": RequestOutputKind.FINAL_ONLY}
    usual |= {"temperature": 0, "max_tokens": count, "ignore_eos": True, "detokenize": False, "logprobs": 1}
    return SamplingParams(**usual | changes)


def generated(llm: Any, asked: Sequence[list[int]], count: int) -> list[Answer]:
    """Return the engine's answers to prompts that are given all at once."""
    done = llm.generate([{"prompt_token_ids": p} for p in asked], greedy(count), use_tqdm=False)
    return [answer_of(output) for output in done]


def answer_of(output: Any, index: int = 0) -> Answer:
    """Return one of the answers in an engine's output."""
    one = output.outputs[index]
    tokens = list(one.token_ids)
    return Answer(tokens, [step[token].logprob for step, token in zip(one.logprobs, tokens, strict=True)])


def alike(one: Answer, other: Answer) -> bool:
    """Return True if two greedy answers have equal tokens, up to one that was as probable as another but for rounding.

    After such a token the answers go different ways, so the rest is not compared.
    """
    for a, b, p, q in zip(one.tokens, other.tokens, one.log_probabilities, other.log_probabilities, strict=True):
        if abs(p - q) > TOLERANCE:
            return False
        if a != b:
            return True
    return True


class Driver:
    """Step an engine by hand, with access to its scheduler and to the memory of its layers."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        layers = self.engine.vllm_config.compilation_config.static_forward_context
        self.memory = [layer.kv_cache for layer in layers.values()]
        self.answers: dict[str, list[Answer]] = {}

    def add(self, name: str, prompt: list[int], count: int, **changes: Any) -> None:
        self.engine.add_request(name, {"prompt_token_ids": prompt}, greedy(count, **changes))

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.answers[output.request_id] = [answer_of(output, i) for i in range(len(output.outputs))]

    def finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    @property
    def used(self) -> set[int]:
        """The blocks of running requests."""
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return {block.block_id for blocks in manager.req_to_blocks.values() for block in blocks}

    def poison(self) -> None:
        """Fill the memory of all blocks that no request has with bytes that are NaN as numbers of any dtype."""
        for memory in self.memory:
            free = sorted(set(range(len(memory))) - self.used)
            memory[free] = 255


@torch.inference_mode()
def distance(model: Any, method: str | None, prompt: list[int], answer: Answer, greedy: bool = True) -> float:
    """Return the largest distance, in nats, of an engine's answer from that of transformers with kvfloor's cache.

    Two distances count at every token: between both log-probabilities of the token, and between the reference's best
    token and this one, which is 0 unless the engine chose another token; it does not count for sampled tokens (`greedy`
    False). method None: no compressed cache.
    """
    from transformers import DynamicCache

    from kvfloor.hf import CompressedCache, prepare

    prepare(model)
    cache = DynamicCache(config=model.config) if method is None else CompressedCache(model.config, method)
    given, worst = torch.tensor([prompt]), 0.0
    for token, said in zip(answer.tokens, answer.log_probabilities, strict=True):
        step = model(given, past_key_values=cache, use_cache=True).logits[0, -1].float().log_softmax(-1)
        worst = max(worst, abs(float(step[token]) - said), float(step.max() - step[token]) if greedy else 0.0)
        given = torch.tensor([[token]])
    return worst
