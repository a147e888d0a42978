"""What vLLM is told, and what is refused, when it starts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.serving import ENVIRONMENT, engine, generated, prompts, small_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    small_llama(place)
    return place


def overrides(**environment: str) -> dict[str, str]:
    """Load vLLM's plug-ins in a fresh process, and return the backends that were replaced."""
    program = """
import json
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends import registry
print("REGISTRY", json.dumps({member.name: path for member, path in registry._ATTN_OVERRIDES.items()}))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVFLOOR")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | ENVIRONMENT | environment, capture_output=True, text=True
    )
    found = [line.removeprefix("REGISTRY ") for line in done.stdout.splitlines() if line.startswith("REGISTRY ")]
    if not found:
        raise ValueError(done.stderr)
    return json.loads(found[0])


def test_a_run_that_did_not_ask_is_left_alone() -> None:
    assert overrides() == overrides(KVFLOOR_METHOD=" ") == {}


def test_vllm_finds_the_plug_in_by_its_entry_point() -> None:
    assert overrides(KVFLOOR_METHOD="sinks(4)@64") == {
        "CPU_ATTN": "kvfloor.vllm.backend.BoundedBackend",
        "CPU_MLA": "kvfloor.vllm.backend.RefusedLatent",
        "AMX_MLA": "kvfloor.vllm.backend.RefusedLatent",
    }


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("sinks(4)@64", {"enable_prefix_caching": True}, "pass --no-enable-prefix-caching"),
        ("sinks(4)@64", {"kv_cache_dtype": "fp8"}, "leave --kv-cache-dtype out"),
        ("sinks(4)@64", {"runner": "pooling"}, "pooling models"),
        ("raas@64", {}, "grows with its tokens"),
        ("snapkv@64", {}, "grows with its tokens"),
        ("h2o", {}, "write one after '@'"),
        ("sinks(4)@1KiB", {}, "raise the budget"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    folder: Path, method: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason), engine(folder, method, **options):
        pass


def test_a_model_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=64, sliding_window=32)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding-window layers"), engine(tmp_path, "sinks(4)@64"):
        pass


def test_a_model_with_latent_attention_is_refused(tmp_path: Path) -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = DeepseekV2Config(**sizes, **latent, num_key_value_heads=2, vocab_size=64, first_k_dense_replace=1)
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="latent attention"), engine(tmp_path, "sinks(4)@64"):
        pass


@pytest.mark.parametrize(("budget", "tokens"), [("25%", 256), ("100KiB", 64)])
def test_a_share_or_a_size_becomes_tokens(folder: Path, budget: str, tokens: int) -> None:
    with engine(folder, f"sinks(4)@{budget}", max_model_len=1024) as llm:
        served = next(iter(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values())).impl._served
    assert served.method.budget == tokens


def test_the_log_says_what_is_kept_and_what_requests_hold(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVFLOOR_LOG_SECONDS", "0.001")
    logger = logging.getLogger("vllm.kvfloor")
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    try:
        with engine(folder, "sinks(4)@64") as llm:
            generated(llm, prompts(300, 10), 8)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.NOTSET)
    lines = [record.getMessage() for record in caplog.records if record.name == "vllm.kvfloor"]
    assert lines[0].startswith("kvfloor: every request keeps sinks@64 (64 tokens per kv head) in one block of ")
    assert any("2 requests in this step, 310 tokens seen" in line for line in lines), lines


def test_speculative_decoding_is_refused(folder: Path) -> None:
    """Keep this test the last: what it imports (llvmlite) makes this vLLM fail at the next engine of the process."""
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    refused = pytest.raises(ValueError, match="leave --speculative-config out")
    with refused, engine(folder, "sinks(4)@64", speculative_config=drafts):
        pass
