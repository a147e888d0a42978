"""Other ways to run the engine give the same tokens: a compiled model, and a model shared out among processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.serving import TOLERANCE, alike, distance, engine, generated, prompts, small_llama

LENGTHS, ANSWER = (1, 2, 31, 64, 65, 300), 40
TENSORS = {"tensor_parallel_size": 2}
STAGES = {"pipeline_parallel_size": 2, "enforce_eager": False}
COMPILED = {"enforce_eager": False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "method"),
    [
        (COMPILED, "h2o@64"),
        (TENSORS, "h2o@64"),
        (TENSORS, "random@64"),
        (TENSORS | COMPILED, "sinks+value_sum@64"),
        (STAGES, "h2o@64"),
    ],
    ids=str,
)
def test_the_answers_are_those_of_one_plain_process(tmp_path: Path, options: dict[str, Any], method: str) -> None:
    model, asked = small_llama(tmp_path), prompts(*LENGTHS)
    with engine(tmp_path, method, **options) as llm:
        config = llm.llm_engine.vllm_config
        assert not config.scheduler_config.async_scheduling  # vLLM switches it off on CPUs; the pages say so
        answers = generated(llm, asked, ANSWER)
    with engine(tmp_path, method) as llm:
        plain = generated(llm, asked, ANSWER)
    for prompt, answer, other in zip(asked, answers, plain, strict=True):
        assert distance(model, method, prompt, answer) < TOLERANCE, len(prompt)
        assert alike(answer, other), len(prompt)
    assert distance(model, "exact", asked[-1], answers[-1]) > 10 * TOLERANCE  # the method was at work


def test_pipeline_parallelism_in_eager_mode_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The refusal is raised in the workers, so vLLM's own error is the one that comes through."""
    small_llama(tmp_path)
    with pytest.raises(Exception, match=r"."), engine(tmp_path, "h2o@64", pipeline_parallel_size=2):
        pass
    assert "fails on a CPU in vLLM itself, at the first request: leave --enforce-eager out" in "".join(
        capfd.readouterr()
    )
