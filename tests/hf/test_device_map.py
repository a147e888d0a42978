"""Check a compressed cache on a model whose layers are on several devices, the CPU and the disk, through accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfloor.audit import traces
from kvfloor.hf import prepare
from kvfloor.hf.decode import Dialogue
from tests.hf.conftest import tiny
from tests.hf.sharded import figures, made

pytest.importorskip("accelerate")


def spread(folder: Path, **places: str) -> Any:
    """Return the model in `folder` with its parts on the CPU, but for `places`: name with __ for the dots -> device."""
    parts = (
        "model.embed_tokens",
        "model.rotary_emb",
        *(f"model.layers.{i}" for i in range(2)),
        "model.norm",
        "lm_head",
    )
    device_map = dict.fromkeys(parts, "cpu") | {name.replace("__", "."): at for name, at in places.items()}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", device_map=device_map, offload_folder=folder / "offloaded"
    ).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4).save_pretrained(tmp_path)
    return tmp_path


def whole(folder: Path) -> Any:
    return prepare(AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval())


@pytest.mark.parametrize("name", ["random", "bytes", "by head", "floor", "ranked"])
@pytest.mark.parametrize("places", [{"model__layers__0": "disk"}, {"model__embed_tokens": "disk", "lm_head": "disk"}])
def test_a_cache_is_that_of_the_whole_model(name: str, places: dict[str, str], folder: Path) -> None:
    model = prepare(spread(folder, **places))
    assert any(weight.is_meta for weight in model.parameters())
    assert figures(model, name) == figures(whole(folder), name)


def test_an_audit_reads_a_model_whose_embedding_is_offloaded(folder: Path) -> None:
    model = prepare(spread(folder, model__embed_tokens="disk"))
    assert model.device.type == "meta"
    answers = []
    for one in (model, whole(folder)):
        dialogue = Dialogue.start(one, made(one, "random"), 1)
        dialogue.feed([[3, 4, 5, 6]])
        answers.append((dialogue.answer(3, None)[0], [trace.k for trace in traces.record(one, [[3, 4]], [[5]])]))
    assert answers[0][0] == answers[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(answers[0][1], answers[1][1], strict=True))
