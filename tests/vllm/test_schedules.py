"""Many schedules and many prompts in vLLM: the long checks of the same laws as in `test_engine.py`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.vllm.serving import TOLERANCE, Answer, Driver, alike, distance, engine, generated, prompts, small_llama

pytestmark = pytest.mark.slow

SCHEDULES, LONGEST_ANSWER = 1000, 24


@pytest.mark.parametrize("method", ["h2o@64", "sinks+value_sum@64"])
def test_a_thousand_schedules_give_the_tokens_of_each_request_alone(tmp_path: Path, method: str) -> None:
    small_llama(tmp_path)
    rng = random.Random(0)
    asked = prompts(*(rng.choice([1, 2, 31, 33, 64, rng.randrange(1, 200)]) for _ in range(40)), seed=1)
    with engine(tmp_path, method, num_gpu_blocks_override=6, max_num_batched_tokens=96) as llm:
        alone = [generated(llm, [prompt], LONGEST_ANSWER)[0] for prompt in asked]
        driver, flips = Driver(llm), 0
        for schedule in range(SCHEDULES):
            who = rng.sample(range(len(asked)), rng.randrange(2, 8))
            waiting = [(f"{schedule}-{i}", i) for i in who]
            names = dict(waiting)
            driver.answers.clear()
            while waiting or driver.engine.has_unfinished_requests():
                for _ in range(rng.choice([0, 1, 1, 3])):
                    if waiting:
                        name, i = waiting.pop()
                        driver.add(name, asked[i], rng.randrange(1, LONGEST_ANSWER + 1))
                driver.poison()
                driver.step()
                if rng.random() < 0.02:
                    driver.engine.reset_prefix_cache(reset_running_requests=True)
            for name, i in names.items():
                (answer,) = driver.answers[name]
                n = len(answer.tokens)
                expected = Answer(alone[i].tokens[:n], alone[i].log_probabilities[:n])
                assert alike(answer, expected), (schedule, len(asked[i]))
                flips += answer.tokens != expected.tokens
    assert flips < SCHEDULES / 100  # near-ties are rare, or the comparison would say little


@pytest.mark.parametrize("method", ["sinks(4)@256", "h2o@256"])
def test_a_hundred_prompts_on_a_trained_model(method: str) -> None:
    from kvfloor.audit.texts import SHIPPED, text_of
    from kvfloor.models import load
    from kvfloor.models.load import find

    folder = find("smollm2", False, print)
    model, tokenizer = load(folder)
    ids = [tokenizer(text_of(name, 0), verbose=False).input_ids for name in SHIPPED]
    rng = random.Random(0)
    lengths = [1, 2, 3000, 2500, *(rng.choice([5, 40, 200, 257, rng.randrange(1, 1200)]) for _ in range(96))]
    asked = []
    for i, n in enumerate(lengths):
        start = rng.randrange(len(ids[i % 3]) - n)
        asked.append(ids[i % 3][start : start + n])
    with engine(Path(folder), method, max_model_len=4096, max_num_batched_tokens=512, num_gpu_blocks_override=9) as llm:
        answers = generated(llm, asked, 16)
    worst = max(distance(model, method, prompt, answer) for prompt, answer in zip(asked, answers, strict=True))
    print(f"largest difference of a log-probability: {worst:.2g} nats")
    assert worst < TOLERANCE
