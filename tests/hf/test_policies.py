"""Every evicting policy serves the built-in model: generate() runs, the promised room holds, rows are their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvfloor import models
from kvfloor.hf import CompressedCache, prepare
from kvfloor.tasks import TASKS

NEW_TOKENS, BUDGET = 19, 14
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
FEW = {"max_new_tokens": 6, "min_new_tokens": 6}
POLICIES = [
    "tova(block=4)",
    "snapkv(block=4)",
    "snapkv(decode=evict,pool=avg,block=4)",
    "raas(page=4,sinks=2,block=4)",
    "knorm(block=4)",
    "keydiff(block=4)",
    "ridge_leverage(sketch=16,block=4)",
    "expected(block=4)",
    "h2o(prefill=dense,block=4)",
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    model, tokenizer = models.load("builtin")
    return prepare(model), tokenizer


@pytest.fixture(scope="module")
def prompts(loaded: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    """Two prompts of the built-in tasks; the shorter one is left-padded."""
    ids = [loaded[1](TASKS["recall"].generate(5, i, length).context).input_ids for i, length in ((0, 60), (1, 45))]
    width = max(map(len, ids))
    padded = [[0] * (width - len(x)) + x for x in ids]
    mask = [[0] * (width - len(x)) + [1] * len(x) for x in ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="module")
def exact(loaded: tuple[Any, Any], prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    cache = CompressedCache(loaded[0].config, "exact")
    return loaded[0].generate(**prompts, **(GREEDY | FEW), past_key_values=cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_generate_runs_in_the_promised_room(
    loaded: tuple[Any, Any], prompts: dict[str, torch.Tensor], policy: str
) -> None:
    model, _ = loaded
    cache = CompressedCache(model.config, f"{policy}@{BUDGET}", requests=[3, 4])
    out = model.generate(**prompts, **GREEDY, past_key_values=cache)
    real = prompts["attention_mask"].sum(1).tolist()
    for layer in cache.compressed:
        state: Any = layer.state
        held = state.held.view(2, -1)
        for item, prompt in enumerate(real):
            seen = prompt + NEW_TOKENS - 1  # the last token is never fed back
            most = state.method.capacity(seen, prompt=prompt)
            most = BUDGET + NEW_TOKENS - 1 if most is None else most
            assert BUDGET <= int(held[item].min()) <= int(held[item].max()) <= most
            assert int(held[item].max()) < seen
    alone = CompressedCache(model.config, f"{policy}@{BUDGET}", requests=[4])
    only = model.generate(prompts["input_ids"][1:, -real[1] :], **GREEDY, past_key_values=alone)
    assert torch.equal(only[0, real[1] :], out[1, -NEW_TOKENS:])


@pytest.mark.parametrize("policy", POLICIES)
def test_room_for_everything_changes_no_token(
    loaded: tuple[Any, Any], prompts: dict[str, torch.Tensor], exact: torch.Tensor, policy: str
) -> None:
    cache = CompressedCache(loaded[0].config, f"{policy}@400")
    assert torch.equal(loaded[0].generate(**prompts, **(GREEDY | FEW), past_key_values=cache), exact)
