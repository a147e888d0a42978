"""Check compressed caches on a sharded model, in two processes (gloo), against those on the unsharded one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, Gemma3TextConfig, LlamaConfig, Olmo2Config

from kvfloor.hf import CompressedCache, prepare
from tests.hf.sharded import CACHES, FEW, MORE, figures, made, said, went_on

pytest.importorskip("transformers.distributed.sharding_utils", reason="tensor parallelism of an older transformers")

COUNTERS = 200  # bytes: numbers that every rank's state of a layer has for itself
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}
THREE: dict[str, Any] = SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
SLIDING: dict[str, Any] = SIZES | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
LATENT: dict[str, Any] = SIZES | {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SLIDING),
    "uneven": LlamaConfig(**THREE),
    "latent": DeepseekV2Config(**LATENT, n_routed_experts=4, n_group=1, topk_group=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models, and with the caches that the unsharded one saved."""
    made_in = tmp_path_factory.mktemp("ranks")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(made_in / name)
    model = whole(made_in, "llama")
    for name in CACHES:
        cache = made(model, name)
        said(model, cache)
        cache.save(made_in / f"whole {name}")
    return made_in


@pytest.fixture(scope="module")
def few(folder: Path) -> list[dict[str, Any]]:
    """Return what both ranks wrote down of the caches FEW."""
    return run(folder, "few")


@pytest.fixture(scope="module")
def more(folder: Path) -> list[dict[str, Any]]:
    """Return what both ranks wrote down of the caches MORE."""
    return run(folder, "more")


def run(folder: Path, group: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("sharded.py")), str(folder), group],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{group} {rank}.pt", weights_only=False) for rank in range(2)]


def whole(folder: Path, name: str) -> Any:
    return prepare(AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32").eval())


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return whole(folder, "llama")


def same(found: dict[str, Any], expected: dict[str, Any], layers: int = 2) -> bool:
    """Return True if a sharded cache's figures are those of the unsharded one: bytes up to each rank's counters."""
    alike = all(found[name] == expected[name] for name in ("tokens", "left"))
    for ours, theirs in zip(found["report"], expected["report"], strict=True):
        exactly = ("layer", "method", "heads", "seen", "tokens", "held", "evicted", "staged_bytes", "guarantee")
        alike &= all(ours[name] == theirs[name] for name in exactly)
        alike &= 0 <= ours["state_bytes"] - theirs["state_bytes"] <= COUNTERS
        alike &= len(ours["row_bytes"]) == len(theirs["row_bytes"])
        alike &= all(abs(a - b) <= COUNTERS for a, b in zip(ours["row_bytes"], theirs["row_bytes"], strict=False))
    sizes = [(found[name], expected[name]) for name in ("nbytes", "peak", "read")]
    sizes += [(found["kinds"][kind], expected["kinds"][kind]) for kind in expected["kinds"]]
    return alike and all(0 <= ours - theirs <= layers * COUNTERS for ours, theirs in sizes)


def require_whole(name: str, model: Any, ranks: list[dict[str, Any]]) -> None:
    """Require that both ranks report the unsharded model's cache, and that each is told of its own heads' evictions."""
    expected, found = figures(model, name), [rank["figures"][name] for rank in ranks]
    assert sorted(found[0]["left"] + found[1]["left"]) == expected["left"]
    for rank in found:
        assert rank["asked"] == []  # of the other ranks, while tokens are generated
        assert same(rank | {"left": expected["left"]}, expected)


@pytest.mark.parametrize("name", FEW)
def test_every_rank_reports_the_cache_of_the_unsharded_model(name: str, model: Any, few: list[dict[str, Any]]) -> None:
    require_whole(name, model, few)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_rank_reports_other_caches_too(name: str, model: Any, more: list[dict[str, Any]]) -> None:
    require_whole(name, model, more)


@pytest.mark.parametrize("name", FEW)
def test_a_planted_fault_is_noticed(name: str, model: Any, few: list[dict[str, Any]]) -> None:
    expected = figures(model, name)
    left = sorted(few[0]["mutants"][name]["left"] + few[1]["mutants"][name]["left"])
    assert not same(few[0]["mutants"][name] | {"left": left}, expected)


def test_a_budget_in_bytes_is_of_all_ranks_together(few: list[dict[str, Any]]) -> None:
    assert 0.9 * 2**18 < few[0]["figures"]["bytes"]["nbytes"] <= 2**18


def test_the_configuration_of_a_prepared_model_is_enough(few: list[dict[str, Any]]) -> None:
    assert few[0]["config"] == 2


def require_file(name: str, model: Any, folder: Path, ranks: list[dict[str, Any]]) -> None:
    """Require that the file which both ranks saved is the unsharded model's, and goes on under one rank and two."""
    unsaved = ranks[0]["saved"][f"unsaved {name}"]["next"]
    plain = CompressedCache.load(folder / f"whole {name}", model)
    gathered = CompressedCache.load(folder / f"sharded {name}", model)
    for ours, theirs in zip(gathered.compressed, plain.compressed, strict=True):
        assert ours.state is not None and theirs.state is not None
        assert (ours.state.method, ours.state.spec) == (theirs.state.method, theirs.state.spec)
        assert ours.state.nbytes == theirs.state.nbytes
    assert went_on(model, gathered) == went_on(model, plain) == unsaved
    for rank in ranks:
        for written in ("sharded", "whole"):
            again = rank["saved"][f"{written} {name}"]
            assert again["next"] == unsaved
            assert again["report"] == ranks[0]["saved"][f"sharded {name}"]["report"]


@pytest.mark.parametrize("name", FEW)
def test_a_file_is_of_the_whole_and_goes_on_under_any_number_of_ranks(
    name: str, model: Any, folder: Path, few: list[dict[str, Any]]
) -> None:
    require_file(name, model, folder, few)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_files_of_other_caches_go_on_too(name: str, model: Any, folder: Path, more: list[dict[str, Any]]) -> None:
    require_file(name, model, folder, more)


def test_where_every_rank_holds_all_keys_the_cache_is_counted_once(folder: Path, few: list[dict[str, Any]]) -> None:
    expected = figures(whole(folder, "olmo2"), "random")
    assert few[0]["gathered keys"] == few[1]["gathered keys"] == expected


def test_sliding_layers_count_with_all_their_heads(folder: Path, few: list[dict[str, Any]]) -> None:
    expected = figures(whole(folder, "gemma3"), "random")
    assert same(few[0]["sliding"] | {"left": expected["left"]}, expected)


REFUSALS = {
    "uneven": "ValueError: LlamaForCausalLM has 3 kv heads, which 2 ranks cannot share evenly",
    "latent": "ValueError: DeepseekV2ForCausalLM shards its query heads over 2 ranks and not its keys",
    "old configuration": "ValueError: this cache was made for 1 rank(s), and the model is sharded over 2",
    "pickle": "ValueError: this cache holds 1/2 of the kv heads",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_is_refused_on_every_rank(name: str, few: list[dict[str, Any]]) -> None:
    assert all(rank["refused"][name].startswith(REFUSALS[name]) for rank in few), few[0]["refused"]


def test_calls_that_do_not_match_end_in_an_error_and_hang_nobody(few: list[dict[str, Any]]) -> None:
    first, second = (rank["refused"] for rank in few)
    assert "rank 0 calls cache.nbytes and rank 1 calls cache.report()" in first["other calls"]
    assert "rank 1 calls cache.report() and rank 0 calls cache.nbytes" in second["other calls"]
    assert first["one rank's file"].startswith("RuntimeError: CompressedCache.load() failed on rank 1: ValueError")
    assert second["one rank's file"].startswith("ValueError")
    assert "some rank did not make the same call within 2 seconds" in first["lone"]
