"""Summaries in `generate()` on the built-in model: bounded bytes, rows alone as in a batch, kernels of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open

from kvfloor.audit import traces
from kvfloor.hf import CompressedCache
from kvfloor.methods.grammar import parse
from kvfloor.models import builtin_path
from kvfloor.training.less import weights_tag
from kvfloor.training.lessons import task_items, texts
from tests.hf.conftest import left_padded

torch.set_num_threads(1)

METHODS = [
    "sinks(4)+value_sample(copies=8)@32",
    "window+value_sample(copies=4,groups=3)@32",
    "sinks(4)+less@32",
    "sinks(4)+less(kernels=builtin)@32",
    "h2o(recent=16)+less(kernels=builtin)@32",
    "sinks(4)+moments@32",
    "sinks(4)+moments(covariance=none)@32",
    "sinks(4)+taylor(degree=1)@32",
    "sinks(4)+taylor(radius=2.0)@32",
    "window_sample(copies=3)@32",
]


def prompts(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of up to 100 and 80 tokens, the shorter one left-padded."""
    long, other = (text.context + text.rest for text in texts(tokenizer, task_items(tokenizer, 2, 90, seed=7)))
    batch = left_padded([long[:80], other[:100]])
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("method", METHODS)
def test_generate_works_in_bounded_memory_and_a_padded_row_equals_the_row_alone(
    builtin: tuple[Any, Any], method: str
) -> None:
    model, tokenizer = builtin
    ids, mask = prompts(tokenizer)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    together = CompressedCache(model.config, method, requests=[7, 8])
    said = model.generate(ids, attention_mask=mask, past_key_values=together, **greedy)
    assert said.shape[1] == ids.shape[1] + 6
    assert max(max(entry["held"]) for entry in together.report()) <= 32 + 31
    brief = CompressedCache(model.config, method)
    model(ids[:, -4:], past_key_values=brief)
    assert together.nbytes == brief.nbytes
    real = mask[0].bool()
    alone = CompressedCache(model.config, method, requests=[7])
    only = model.generate(ids[:1, real], past_key_values=alone, **greedy)
    assert torch.equal(only[0, int(real.sum()) :], said[0, ids.shape[1] :])
    part, whole = alone.compressed[1].state, together.compressed[1].state
    assert part is not None and whole is not None
    q = torch.linspace(-1, 1, 64).expand(part.spec.rows, 1, -1)
    mine, theirs = part.read(q), whole.read(q.repeat(2, 1, 1))
    torch.testing.assert_close(mine.mean, theirs.mean[: part.spec.rows], rtol=1e-3, atol=1e-3)


def test_beams_carry_what_was_absorbed(builtin: tuple[Any, Any]) -> None:
    model, tokenizer = builtin
    ids, _ = prompts(tokenizer)
    cache = CompressedCache(model.config, "sinks(4)+less(kernels=builtin)@32")
    said = model.generate(ids[1:], num_beams=3, do_sample=False, max_new_tokens=8, past_key_values=cache)
    assert said.shape[1] > ids.shape[1]


def test_a_byte_budget_counts_the_summary(builtin: tuple[Any, Any]) -> None:
    model, tokenizer = builtin
    ids, _ = prompts(tokenizer)
    for method in ("sinks(4)+less(kernels=builtin)@512KiB", "sinks(4)+moments@512KiB"):
        cache = CompressedCache(model.config, method)
        model(ids[1:], past_key_values=cache)
        assert 0.9 * 2**19 < cache.nbytes <= 2**19


def test_the_shipped_kernels_are_of_the_shipped_weights(builtin: tuple[Any, Any]) -> None:
    """If this fails the model has new weights: kvfloor train-less --policy 'sinks(4)@64' --out FILE
    makes kernels for them, FILE being less.safetensors in the folder of the model."""
    with safe_open(builtin_path() / "less.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["weights"] == weights_tag(builtin[0]) and facts["policy"] == "sinks@64"


def test_the_shipped_kernels_beat_as_many_bytes_of_tokens(builtin: tuple[Any, Any]) -> None:
    """LESS < the policy with four tokens more < the policy, in attention-output error, on samples never learnt from."""
    model, tokenizer = builtin
    material = texts(tokenizer, task_items(tokenizer, 9, 384, seed=0))
    seen = traces.record(model, [text.context for text in material], [text.rest for text in material])
    plain, more, less = (
        torch.tensor(traces.errors(seen, parse(method))).square().mean().sqrt()
        for method in ("sinks(4)@64", "sinks(4)@68", "sinks(4)+less(kernels=builtin)@64")
    )
    assert less < 0.9 * more < more < plain
