"""lm-eval on local tasks: exact equals lm-eval's own model class, a small budget differs, the command line works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor import models
from kvfloor.tasks import TASKS

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval comes with the extra kvfloor[eval]; make test-eval has it")
pytest.importorskip("accelerate", reason="lm-eval's own model class, the oracle here, needs it")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kvfloor.hf import prepare  # noqa: E402
from kvfloor.hf.lm_eval import CompressedLM  # noqa: E402

KINDS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three local tasks over six recall prompts of about 40 to 115 tokens: one YAML each, one file of documents."""
    path = tmp_path_factory.mktemp("tasks")
    lines = []
    for i in range(6):
        sample = TASKS["recall"].generate(5, i, 40 + 15 * i)
        answer = sample.questions[0].answer
        choices = [f" {answer}", *(f" {(int(answer) + step) % 100:02d}" for step in (7, 31))]
        order = [choices[(j + i) % 3] for j in range(3)]
        lines.append({"prompt": sample.prompt(), "answer": answer, "choices": order, "right": order.index(choices[0])})
    (path / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"data_files": {"test": str(path / "documents.jsonl")}}
    for name, kind in KINDS.items():
        task = {"task": f"kvfloor_{name}", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"} | kind
        (path / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def builtin() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return models.load("builtin")


def evaluated(model: Any, folder: Path, *names: str) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[f"kvfloor_{name}" for name in names],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


def answers(results: dict[str, Any], name: str) -> list[Any]:
    """What the model said to each document, unfiltered: log-probabilities or text."""
    samples = sorted(results["samples"][f"kvfloor_{name}"], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for responses in sample["resps"] for response in responses]


@pytest.fixture(scope="module")
def stock(builtin: tuple[Any, Any], folder: Path) -> dict[str, Any]:
    model, tokenizer = models.load("builtin")
    return evaluated(HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, device="cpu"), folder, *KINDS)


def ours(builtin: tuple[Any, Any], method: str, **options: Any) -> CompressedLM:
    return CompressedLM(builtin[0], method, tokenizer=builtin[1], max_length=512, device="cpu", **options)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"batch_size": 8, "chunk": 7}])
def test_exact_equals_lm_evals_own_class(
    builtin: tuple[Any, Any], folder: Path, stock: dict[str, Any], options: dict[str, Any]
) -> None:
    results = evaluated(ours(builtin, "exact", **options), folder, *KINDS)
    for (log_p, greedy), (expected, expected_greedy) in zip(
        answers(results, "choose"), answers(stock, "choose"), strict=True
    ):
        assert log_p == pytest.approx(expected, abs=2e-4) and greedy == expected_greedy
    assert answers(results, "say") == answers(stock, "say")
    assert answers(results, "read") == pytest.approx(answers(stock, "read"), rel=1e-5)
    assert (
        results["results"]["kvfloor_choose"]["acc,none"] > 0.8
    )  # the tasks are solvable, so falling short means something


def test_windows_longer_texts_as_lm_eval_does(builtin: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = models.load("builtin")
    expected = evaluated(HFLM(pretrained=model, tokenizer=tokenizer, max_length=48, device="cpu"), folder, "read")
    short = CompressedLM(builtin[0], "exact", tokenizer=builtin[1], max_length=48, device="cpu")
    assert answers(evaluated(short, folder, "read"), "read") == pytest.approx(answers(expected, "read"), rel=1e-5)


@pytest.mark.parametrize("method", ["sinks(4)@16", "h2o(block=4)@16", "snapkv(block=4)@16"])
def test_a_small_budget_is_really_applied(
    builtin: tuple[Any, Any], folder: Path, stock: dict[str, Any], method: str
) -> None:
    """Methods that evict while the prompt streams in, and one that compresses at its end only, all move the answers."""
    results = evaluated(ours(builtin, method, batch_size=4), folder, *KINDS)
    moved = [a[0] - b[0] for a, b in zip(answers(results, "choose"), answers(stock, "choose"), strict=True)]
    assert sum(abs(shift) > 0.01 for shift in moved) > len(moved) // 2
    assert results["results"]["kvfloor_choose"]["acc,none"] < stock["results"]["kvfloor_choose"]["acc,none"]
    told = results["config"]["kvfloor"]
    assert told["method"] == str(ours(builtin, method).method) and told["most_tokens_seen"] > 80
    assert told["sequences"] == 6 * 3 + 6 + 6
    if not method.startswith("snapkv"):  # SnapKV keeps what is decoded
        assert told["most_tokens_held"] <= 16 + 31 and answers(results, "read") != answers(stock, "read")


@pytest.mark.parametrize("method", ["random(block=4)@24", "h2o(block=4)@24"])
def test_a_requests_answer_does_not_depend_on_its_batch(builtin: tuple[Any, Any], folder: Path, method: str) -> None:
    alone, together = (evaluated(ours(builtin, method, batch_size=n), folder, "choose", "say") for n in (1, 5))
    pairs = zip(answers(alone, "choose"), answers(together, "choose"), strict=True)
    assert all(a[0] == pytest.approx(b[0], abs=2e-4) for a, b in pairs)
    assert answers(alone, "say") == answers(together, "say")


def test_wrong_arguments_are_named(builtin: tuple[Any, Any]) -> None:
    for options, words in (
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"dtype": "int8"}, "dtype must be float32"),
        ({"chunk": 0}, "chunk must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            ours(builtin, "exact", **options)
    with pytest.raises(ValueError, match="pass tokenizer="):
        CompressedLM(prepare(builtin[0]))
    with pytest.raises(ValueError, match="tensor attention"):
        ours(builtin, "tensor")
    with pytest.raises(ValueError, match="never downloaded"):
        CompressedLM("some/model")


def test_the_command_line_is_lm_evals_own(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvfloor.hf.lm_eval", "--model", "kvfloor"]
        + ["--model_args", '{"pretrained": "builtin", "method": "sinks(4,block=8)@32"}', "--batch_size", "2"]
        + ["--tasks", "kvfloor_choose", "--include_path", str(folder), "--output_path", str(tmp_path)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results*.json")
    results = json.loads(written.read_text())
    assert results["config"]["kvfloor"]["method"] == "sinks(block=8)@32"  # 4 first tokens are usual
    assert 0 < results["config"]["kvfloor"]["state_bytes"] < results["config"]["kvfloor"]["exact_bytes"]
