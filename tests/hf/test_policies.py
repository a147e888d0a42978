"""Every evicting policy serves the built-in model: generate() runs, the promised room holds, rows are their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvfloor.hf import CompressedCache
from kvfloor.tasks import TASKS
from tests.hf.conftest import Prompt, left_padded

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
def prompts(builtin: tuple[Any, Any]) -> Prompt:
    """Two prompts of the built-in tasks; the shorter one is left-padded."""
    return left_padded(
        [builtin[1](TASKS["recall"].generate(5, i, length).context).input_ids for i, length in ((0, 60), (1, 45))]
    )


@pytest.fixture(scope="module")
def exact(builtin: tuple[Any, Any], prompts: Prompt) -> torch.Tensor:
    cache = CompressedCache(builtin[0].config, "exact")
    return builtin[0].generate(**prompts, **(GREEDY | FEW), past_key_values=cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_generate_runs_in_the_promised_room(builtin: tuple[Any, Any], prompts: Prompt, policy: str) -> None:
    model, _ = builtin
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
    builtin: tuple[Any, Any], prompts: Prompt, exact: torch.Tensor, policy: str
) -> None:
    cache = CompressedCache(builtin[0].config, f"{policy}@400")
    assert torch.equal(builtin[0].generate(**prompts, **(GREEDY | FEW), past_key_values=cache), exact)
