"""A trained model far past its trained positions: with positions in the cache its loss is that near the start."""

from __future__ import annotations

import copy
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfloor.hf import CompressedCache, prepare

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvfloor-smollm2"
FAR, PASSAGE, SCORED, CHUNK = 12_288, 1024, 512, 512  # the model was trained for 8,192 positions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "config.json").exists(), reason="SmolLM2 is not there, see characterize/endless.py"
    ),
]


@torch.no_grad()
def losses(model: Any, positions: Any, ids: Tensor) -> tuple[float, float]:
    """Mean loss of the passage's last tokens near the start of the stream, and after `FAR` tokens of it."""
    passage, before = ids[:, FAR : FAR + PASSAGE], ids[:, :FAR]
    cache: Any = CompressedCache(model, "sinks(4)@512", positions=positions)
    model(before[:, :4], past_key_values=cache)
    found = [loss(model, copy.deepcopy(cache), passage)]
    for start in range(4, FAR, CHUNK):
        model(before[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1)
    return found[0], loss(model, cache, passage)


def loss(model: Any, cache: Any, passage: Tensor) -> float:
    logits = torch.cat([model(part, past_key_values=cache).logits[0] for part in passage.split(CHUNK, 1)])
    return float(torch.nn.functional.cross_entropy(logits[-SCORED - 1 : -1].float(), passage[0, -SCORED:]))


def test_the_loss_far_down_the_stream_is_that_near_its_start() -> None:
    model = prepare(AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval())
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    topics = pydoc_data.topics.topics
    ids = tokenizer("\n".join(topics[key] for key in sorted(topics))[:80_000], return_tensors="pt").input_ids
    assert ids.shape[1] >= FAR + PASSAGE
    near, far = losses(model, "cache", ids)
    assert abs(far - near) < 0.1
    start, drifted = losses(model, "stream", ids)
    assert abs(start - near) < 0.05 and drifted > near + 0.3  # the sinks are too far away
