"""vLLM with bounded caches gives the tokens of kvfloor's cache for transformers, whatever else the engine does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor.core.pool import Pool
from tests.vllm.serving import TOLERANCE, Driver, distance, engine, generated, prompts, small_llama

METHODS = (
    "exact",
    "sinks(4)@64",
    "h2o@64",
    "random@64",
    "expected@64",
    "snapkv(decode=evict,prefill=stream)@64",
    "window+value_sum@64",
    "sinks|hip(k=32)@96",
)
LENGTHS = (1, 2, 31, 64, 65, 300, 900)  # around the budget, in less than a chunk and in several


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_many_lengths_in_one_batch(model: Any, folder: Path, method: str) -> None:
    asked = prompts(*LENGTHS)
    with engine(folder, method) as llm:
        answers = generated(llm, asked, 40)
    assert [len(answer.tokens) for answer in answers] == [40] * len(asked)
    for prompt, answer in zip(asked, answers, strict=True):
        assert distance(model, method, prompt, answer) < TOLERANCE, len(prompt)


def test_a_long_prompt_streams_through_a_small_state(model: Any, folder: Path) -> None:
    method, asked = "sinks(4)@64", prompts(3000, 5)
    with engine(folder, method, max_model_len=4096) as llm:
        answers = generated(llm, asked, 10)
    assert all(distance(model, method, p, a) < TOLERANCE for p, a in zip(asked, answers, strict=True))


def test_the_reference_tells_methods_apart(model: Any, folder: Path) -> None:
    """The mutants: an engine with another budget, another policy, or none."""
    asked = prompts(300)
    for wrong in ("sinks(4)@63", "sinks(5)@64", "window@64", "exact"):
        with engine(folder, wrong) as llm:
            (answer,) = generated(llm, asked, 20)
        assert distance(model, "sinks(4)@64", asked[0], answer) > 10 * TOLERANCE, wrong


def test_exact_equals_stock_vllm(folder: Path) -> None:
    asked, tokens = prompts(*LENGTHS), {}
    for method in (None, "exact"):
        with engine(folder, method) as llm:
            tokens[method] = [answer.tokens for answer in generated(llm, asked, 40)]
    assert tokens["exact"] == tokens[None]


def test_bfloat16(tmp_path: Path) -> None:
    model = small_llama(tmp_path).to(torch.bfloat16)
    asked, method = prompts(5, 200), "sinks(4)@64"
    with engine(tmp_path, method, dtype="bfloat16") as llm:
        answers = generated(llm, asked, 20)
    for prompt, answer in zip(asked, answers, strict=True):
        assert distance(model, method, prompt, answer) < 0.5
        assert distance(model, "exact", prompt, answer) > 0.5 or len(prompt) < 64


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["h2o@64", "sinks|hip(k=32)@96"])
def driven(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Driver]]:
    """An engine with six blocks, of which five are for requests."""
    with engine(folder, request.param, num_gpu_blocks_override=6) as llm:
        yield request.param, Driver(llm)


@pytest.mark.parametrize("seed", range(3))
def test_no_request_depends_on_its_neighbours(model: Any, driven: tuple[str, Driver], seed: int) -> None:
    """Random arrivals at an engine with five blocks, whose free blocks are filled with NaN before every step."""
    method, driver = driven
    rng = random.Random(seed)
    asked = prompts(*(rng.choice([1, 2, 30, 64, 150, 400, rng.randrange(1, 600)]) for _ in range(14)), seed=seed)
    waiting, most = list(enumerate(asked)), 0
    driver.answers.clear()
    while waiting or driver.engine.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            if waiting:
                i, prompt = waiting.pop()
                driver.add(str(i), prompt, rng.randrange(1, 60))
        driver.poison()
        driver.step()
        most = max(most, len(driver.used))
    assert most == 5 and len(driver.answers) == len(asked)
    for i, prompt in enumerate(asked):
        assert distance(model, method, prompt, driver.answers[str(i)][0]) < TOLERANCE, (i, len(prompt))


def test_samples_of_one_prompt_are_requests_of_their_own(model: Any, driven: tuple[str, Driver]) -> None:
    method, driver = driven
    (prompt,) = prompts(200, seed=5)
    driver.add("n", prompt, 20, n=3, temperature=1.0)
    most = 0
    while driver.engine.has_unfinished_requests():
        driver.step()
        most = max(most, len(driver.used))
    assert most == 3
    answers = driver.answers["n"]
    assert len({tuple(answer.tokens) for answer in answers}) == 3
    assert all(distance(model, method, prompt, answer, greedy=False) < TOLERANCE for answer in answers)


@pytest.mark.parametrize("driven", ["h2o@64"], indirect=True)
def test_a_request_that_is_preempted_starts_again(model: Any, driven: tuple[str, Driver]) -> None:
    """The engine drops the states of all running requests, and computes their tokens again, as if they were a prompt.

    The same tokens come out for methods that do not tell a prompt from an answer.
    """
    method, driver = driven
    asked = prompts(40, 300, 100, seed=6)
    for i, prompt in enumerate(asked):
        driver.add(f"again {i}", prompt, 60)
    for step in range(25):
        if step in (12, 20):
            assert driver.engine.reset_prefix_cache(reset_running_requests=True)
            assert not driver.used
            driver.poison()
        driver.step()
    driver.finish()
    for i, prompt in enumerate(asked):
        (answer,) = driver.answers[f"again {i}"]
        assert len(answer.tokens) == 60
        assert distance(model, method, prompt, answer) < TOLERANCE, i


def test_the_engine_preempts_no_request_by_itself(driven: tuple[str, Driver]) -> None:
    """A request never needs a second block, so requests wait for a block instead of taking one from another."""
    _method, driver = driven
    seen: list[int] = []
    for i, prompt in enumerate(prompts(*[50] * 9, seed=7)):
        driver.add(f"many {i}", prompt, 70)
    while driver.engine.has_unfinished_requests():
        driver.step()
        seen += [request.num_preemptions for request in driver.scheduler.requests.values()]
    assert seen and max(seen) == 0


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_engine_counts_a_request_as_one_block_per_layer(folder: Path) -> None:
    with engine(folder, "sinks(4)@64") as llm:
        config = llm.llm_engine.vllm_config
        layers = list(config.compilation_config.static_forward_context.values())
        block = layers[0].impl._served.nbytes
        blocks = config.cache_config.num_gpu_blocks
        assert {tuple(layer.kv_cache.shape) for layer in layers} == {(blocks, 1, 1, block)}
        assert blocks == 2**30 // (2 * block)
        assert config.cache_config.kv_cache_max_concurrency == pytest.approx(blocks)
        assert 64 * 2 * 2 * 32 * 4 <= block < 1.7 * 64 * 2 * 2 * 32 * 4  # keys and values of 64 tokens, and the rest


def test_a_block_that_is_not_cleared_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the tests with poisoned blocks: new requests take their blocks as they are."""
    monkeypatch.setattr(Pool, "clear", lambda pool, ids: None)
    with engine(folder, "h2o@64", num_gpu_blocks_override=3) as llm:
        driver = Driver(llm)
        driver.poison()
        driver.add("poisoned", prompts(100)[0], 4)
        with pytest.raises(Exception, match=r"."):
            driver.finish()


def test_a_prompt_that_never_ends_is_found(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the end of prompts: hip chooses anew at other intervals after it."""
    method, asked = "sinks|hip(k=32)@96", prompts(300)
    monkeypatch.setattr(Pool, "seal", lambda pool, ids: None)
    with engine(folder, method) as llm:
        (answer,) = generated(llm, asked, 40)
    assert distance(model, method, asked[0], answer) > 10 * TOLERANCE
