"""Every setting that excludes bounded caches is refused by one line, and a plain one is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvfloor.vllm.refusals import require_plain, require_servable
from kvfloor.vllm.settings import TESTED, log_seconds, method_asked, require_tested


def config(**changes: Any) -> Any:
    """A configuration as vLLM's, with these attributes changed, each in the part that has it."""
    parts: dict[str, dict[str, Any]] = {
        "cache_config": {"enable_prefix_caching": False},
        "parallel_config": {
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
            "pipeline_parallel_size": 1,
        },
        "model_config": {
            "use_mla": False,
            "is_encoder_decoder": False,
            "is_hybrid": False,
            "is_mm_prefix_lm": False,
            "runner_type": "generate",
            "enforce_eager": True,
        },
        "device_config": {"device_type": "cpu"},
    }
    whole: dict[str, Any] = {"speculative_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        owner = next((part for part in parts.values() if name in part), whole)
        assert name in owner
        owner[name] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**part) for name, part in parts.items()})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"speculative_config": "ngram"}, "--speculative-config"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 1"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 1"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"pipeline_parallel_size": 2}, "leave --enforce-eager out"),
        ({"kv_transfer_config": "connector"}, "--kv-transfer-config"),
        ({"use_mla": True}, "latent attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_hybrid": True}, "Mamba"),
        ({"is_mm_prefix_lm": True}, "both directions"),
        ({"runner_type": "pooling"}, "pooling"),
    ],
)
def test_a_setting_is_refused_by_one_line(change: dict[str, Any], says: str) -> None:
    require_servable(config())
    with pytest.raises(ValueError, match=says) as refused:
        require_servable(config(**change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("other", [{"enforce_eager": False}, {"device_type": "cuda"}])
def test_pipeline_parallelism_is_served_where_vllm_can(other: dict[str, Any]) -> None:
    require_servable(config(pipeline_parallel_size=2, **other))


PLAIN = {
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
    "attn_type": "decoder",
    "kv_sharing_target_layer_name": None,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_cache_dtype": "fp8"}, "not fp8: leave --kv-cache-dtype out"),
        ({"sliding_window": 128}, "sliding-window layers"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sinks": 1.0}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "type encoder_only"),
        ({"attn_type": "encoder_decoder"}, "type encoder_decoder"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "share the keys and values"),
        ({"chunk_lookback": 1}, "chunk_lookback = 1, which is not known"),
    ],
)
def test_a_layer_is_refused_by_one_line(change: dict[str, Any], says: str) -> None:
    require_plain(**PLAIN)
    require_plain(**PLAIN, sinks=None)
    with pytest.raises(ValueError, match=says) as refused:
        require_plain(**PLAIN | change)
    assert "\n" not in str(refused.value)


def test_the_method_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, "", " "):
        monkeypatch.delenv("KVFLOOR_METHOD", raising=False)
        if text is not None:
            monkeypatch.setenv("KVFLOOR_METHOD", text)
        assert method_asked() is None
    monkeypatch.setenv("KVFLOOR_METHOD", " h2o(recent=8)@64 ")
    assert str(method_asked()) == "h2o(recent=8)@64"
    for text in ("h3o@64", "h2o@", "tensor_subgen"):
        monkeypatch.setenv("KVFLOOR_METHOD", text)
        with pytest.raises(ValueError, match=f"KVFLOOR_METHOD={text}"):
            method_asked()


def test_an_untested_release_is_refused_unless_one_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFLOOR_VLLM_UNTESTED", raising=False)
    for release in TESTED:
        require_tested(release)
        require_tested(f"{release}+cpu")
    for release in ("0.31.0", "0.32.1", "0.320.0"):
        with pytest.raises(
            ValueError, match=rf"tested with vLLM .* only and this is {release}.*KVFLOOR_VLLM_UNTESTED=1"
        ):
            require_tested(release)
    monkeypatch.setenv("KVFLOOR_VLLM_UNTESTED", "1")
    require_tested("0.31.0")


def test_the_seconds_between_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFLOOR_LOG_SECONDS", raising=False)
    assert log_seconds() == 10
    for text, seconds in (("0", float("inf")), ("2.5", 2.5)):
        monkeypatch.setenv("KVFLOOR_LOG_SECONDS", text)
        assert log_seconds() == seconds
    for text in ("-1", "often", "nan", ""):
        monkeypatch.setenv("KVFLOOR_LOG_SECONDS", text)
        with pytest.raises(ValueError, match="KVFLOOR_LOG_SECONDS"):
            log_seconds()
