"""The command line as scripts see it: JSON on stdout and nothing else, exit codes, one line on stderr."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfloor import models
from kvfloor.tasks import EVERY
from tests.cli.running import kvfloor


def test_help_does_not_load_torch() -> None:
    code = "import sys; import kvfloor.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_wait_briefly_unless_the_user_decides(given: dict[str, str], spins: str) -> None:
    code = "import os, kvfloor.cli as cli, sys\ntry: cli.main()\nfinally: print(os.environ.get('GOMP_SPINCOUNT'))"
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run([sys.executable, "-c", code, "--version"], env=rest | given, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split()[-1] == spins


@pytest.mark.parametrize("arguments", [(), ("break",), ("floors",)])
def test_help_is_there(arguments: tuple[str, ...]) -> None:
    run = kvfloor(*arguments, "--help")
    assert run.returncode == 0 and run.stdout.startswith(f"Usage: {' '.join(('kvfloor', *arguments))} ")


def test_without_a_command_it_says_which_there_are() -> None:
    run = kvfloor()
    assert run.returncode == 2 and run.stdout == "" and "audit" in run.stderr


def test_python_m_is_the_same_command() -> None:
    run = subprocess.run([sys.executable, "-m", "kvfloor", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == kvfloor("--version").stdout


def test_version() -> None:
    assert kvfloor("--version").stdout.startswith("kvfloor 0.")


def test_floors_json() -> None:
    run = kvfloor("floors", "--n", "1024", "--d", "64", "--json")
    document = json.loads(run.stdout)
    assert run.returncode == 0 and document["schema"] == 1
    assert set(document) == {"schema", "bits", "bytes", "upper_bits", "regime", "theorem", "constants", "possible"}
    assert document["bits"] == pytest.approx(1024 * (0.9 * 64 * math.log2(26) - 0.4689955935892812))


FLOORS = {
    "window": (("--n", "1024", "--attention", "window", "--window", "64"), "sliding window"),
    "tensor": (("--n", "64", "--attention", "tensor"), "tensor, four caches"),
    "two caches": (("--n", "64", "--attention", "tensor", "--caches", "2"), "tensor, two caches"),
    "visual": (("--n", "16", "--attention", "visual", "--ratio", "4"), "visual pyramid"),
    "max": (("--n", "1024", "--metric", "max", "--epsilon", "0.1"), "max norm"),
    "frobenius": (("--n", "1024", "--metric", "frobenius", "--epsilon", "0.1", "--radius", "9"), "frobenius norm"),
    "operator": (("--n", "1024", "--metric", "operator", "--epsilon", "0.1"), "operator norm"),
}


@pytest.mark.parametrize("case", FLOORS)
def test_floors_of_every_attention_and_metric(case: str) -> None:
    arguments, regime = FLOORS[case]
    document = json.loads(kvfloor("floors", "--d", "32", *arguments, "--json").stdout)
    assert document["schema"] == 1 and document["regime"] == regime and document["bits"] > 0
    told = kvfloor("floors", "--d", "32", *arguments).stdout
    assert "the worst case" in told and told.count("possible:") == len(document["possible"]) > 0
    for memory in document["possible"]:
        assert memory["ratio"] == pytest.approx(memory["bits"] / document["bits"]) and memory["ratio"] >= 1


def test_methods_json() -> None:
    document = json.loads(kvfloor("methods", "--json").stdout)
    names = {row["name"] for row in document["rows"]}
    assert {"exact", "window", "sinks", "random", "h2o", "value_sum", "subgen_sketch", "everything", "top_k"} <= names
    assert {"name", "kind", "paper", "guarantee", "memory", "traits"} <= set(document["rows"][0])
    rows = {row["name"]: row for row in document["rows"]}
    assert rows["tensor"]["kind"] == rows["subgen_tensor"]["kind"] == "variant" and "public_bits" not in rows
    assert rows["h2o"]["guarantee"] == "none" and rows["subgen_sketch"]["guarantee"].endswith("given radius")
    assert [rows[name]["memory"] for name in ("window", "subgen_sketch", "quant")] == [
        *("constant", "constant under a budget", "grows with the stream"),
    ]
    assert all(row["about"].endswith(".") and "\n" not in row["about"] for row in document["rows"])


def test_break_json_certifies_every_bit_of_exact() -> None:
    document = json.loads(kvfloor("break", "exact", "--n", "256", "--d", "32", "--json").stdout)
    assert document["hidden_bits"] == 256 * 32
    assert document["certified_bits"] >= 0.99 * document["hidden_bits"]
    assert document["verdict"] == "holds"
    assert document["certified_bits"] <= 8 * document["message_bytes"]


def test_check_json_and_exit_code(tmp_path: Path) -> None:
    run = kvfloor("check", "window@32", "--json")
    document = json.loads(run.stdout)
    assert run.returncode == 0 and document["failed"] == [] and len(document["passed"]) > 20
    broken = """
from dataclasses import dataclass
from typing import ClassVar
from kvfloor.core.policy import Policy

@dataclass(frozen=True)
class Moody(Policy):
    name: ClassVar[str] = "moody"
    def priority(self, held):
        import torch
        return torch.rand(held.position.shape)
"""
    (tmp_path / "mine.py").write_text(broken)
    run = kvfloor("check", "mine:Moody@32", "--json", cwd=tmp_path)
    assert run.returncode == 1
    assert json.loads(run.stdout)["failed"]


BAD = {
    "unknown method": (("break", "windw@3"), "did you mean 'window'"),
    "impossible budget": (("audit", "--methods", "sinks(9)", "--budgets", "8"), "too small"),
    "unknown task": (("audit", "--tasks", "chess"), "unknown task 'chess'"),
    "no such model": (("audit", "--model", "/nowhere"), "no model at '/nowhere'"),
    "too few samples": (("audit", "--n", "5"), "at least 32"),
    "bad requirement": (("audit", "--require", "score>>1"), "is no condition"),
    "requirement about no row": (("audit", "--require", "sinks(8):score>=0"), "is about no row"),
    "bad contexts": (("audit", "--contexts", "many"), "--contexts"),
    "no contexts": (("audit", "--contexts", ","), "--contexts"),
    "unknown option": (("floors", "--nn", "3"), "--nn"),
    "unknown command": (("flors",), "flors"),
    "missing option": (("floors", "--n", "3"), "--d"),
    "foreign argument": (("break", "exact", "--barrier", "packing", "--bits", "2"), "takes no bits"),
    "unknown protocol": (("audit", "--protocols", "later"), "after, visible"),
    "unknown barrier": (("break", "exact", "--barrier", "wall"), "wall"),
    "negative n": (("floors", "--n", "-1", "--d", "4"), "n"),
    "unknown attention": (
        ("floors", "--n", "8", "--d", "4", "--attention", "cube"),
        "standard, window, tensor, visual",
    ),
    "window without size": (("floors", "--n", "8", "--d", "4", "--attention", "window"), "needs window"),
    "norm without error": (("floors", "--n", "8", "--d", "4", "--metric", "max"), "needs epsilon"),
    "bad probability": (("floors", "--n", "8", "--d", "4", "--p", "1.5"), "p"),
    "no class": (("check", "nowhere:Nothing"), "cannot be imported"),
    "no seed above 2^63": (("break", "exact", "--seed", "9223372036854775808"), "'--seed'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, tmp_path: Path) -> None:
    arguments, told = BAD[case]
    run = kvfloor(*arguments, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert told in run.stderr and run.stderr.startswith("kvfloor: ") and run.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.jsonl"))


def test_optimised_python_tells_the_same(tmp_path: Path) -> None:
    code = """
import json, sys
from kvfloor import cli
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as end:
        print(end.code)
"""
    cases = json.dumps([arguments for arguments, _ in BAD.values()])
    run = subprocess.run([sys.executable, "-O", "-c", code, cases], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.split() == ["2"] * len(BAD)
    assert run.stderr.splitlines() == [
        kvfloor(*arguments, cwd=tmp_path).stderr.strip() for arguments, _ in BAD.values()
    ]


def test_a_users_module_that_breaks_off_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "breaks_off.py").write_text("1 / 0")
    run = kvfloor("check", "breaks_off:Mine@8", cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "ZeroDivisionError" in run.stderr


def test_unwritable_out_is_found_before_anything_runs(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    run = kvfloor("audit", "--out", str(blocker / "inside"))
    assert run.returncode == 2 and "cannot write" in run.stderr and run.stderr.count("\n") == 1


def test_a_model_that_ignores_the_attention_interface_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=2000, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "m")
    for file in models.builtin_path().glob("tokenizer*"):
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    run = kvfloor("audit", "--model", str(tmp_path / "m"), cwd=tmp_path)
    assert run.returncode == 2 and "BloomForCausalLM" in run.stderr


def test_tasks_lists_every_group_and_task() -> None:
    run = kvfloor("tasks", "--json")
    document = json.loads(run.stdout)
    assert run.returncode == 0 and document["schema"] == 1
    groups = {row["group"] for row in document["rows"]}
    assert groups == {"builtin", "ruler", "assistant"} and len(document["rows"]) == len(EVERY)
    shown = kvfloor("tasks").stdout
    assert all(f"  {row['task']} " in shown and row["about"] in shown for row in document["rows"])


def test_audit_json_report_and_require(tmp_path: Path) -> None:
    arguments = ("--tasks", "kv", "--texts", "mixture-0", "--facts", "0", "--contexts", "96", "--n", "32", "--json")
    arguments += ("--budgets", "24", "--methods", "h2o")
    run = kvfloor("audit", *arguments, "--require", "h2o:state_bytes<=1 and score>=0", cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "not met" in run.stderr
    document = json.loads(run.stdout)
    parts = {"rows", "certified", "texts", "heads", "output_errors", "examples", "left_out", "recommendation", "report"}
    parts |= {"facts", "facts_note"}
    assert set(document) == {"schema", "model", "seed"} | parts
    assert all(row["parts"] == {"answer": row["score"]} for row in document["rows"]) and document["left_out"] == []
    assert {one["method"] for one in document["output_errors"]} == {row["method"] for row in document["rows"]} - {
        "exact"
    }
    assert [one["kind"] for one in document["examples"]] == ["text", "task"]
    assert len(document["heads"]) == 8
    assert set(document["recommendation"]) == {"method", "why"}
    by_method = {row["method"]: row for row in document["rows"]}
    assert set(by_method) == {"exact", "quant", "quant(bits=4)", "random@24", "window@24", "sinks@24", "h2o@24"}
    assert by_method["h2o@24"]["state_bytes"] < by_method["exact"]["state_bytes"]
    assert all(row["n"] == 32 and row["floor_bytes"] > 0 for row in document["rows"])
    parts = {(row["configuration"], row["name"], row["budget"], row["baseline"]) for row in document["rows"]}
    assert {("h2o", "h2o", "24", False), ("quant(bits=4)", "quant", None, True), ("exact", "exact", None, True)} < parts
    report = (tmp_path / document["report"]).read_text(encoding="utf-8")
    assert "<script" not in report and "h2o@24" in report
    for name, part in (("rows", "rows"), ("output_errors", "output_errors"), ("examples", "examples")):
        lines = (tmp_path / f"out/audit/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(document[part])
