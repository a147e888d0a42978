"""What importing the package does to the rest of the process, and what its source may not contain."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvfloor

SOURCE = Path(kvfloor.__file__).parent


def run(program: str) -> dict:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return json.loads(done.stdout)


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    loaded = run(
        "import sys, json, kvfloor; print(json.dumps({m: m in sys.modules for m in ('torch', 'transformers')}))"
    )
    assert loaded == {"torch": False, "transformers": False}


def test_importing_the_core_leaves_torch_as_it_was() -> None:
    program = """
import json, torch
def settings():
    return [torch.get_default_dtype().__str__(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.initial_seed(), torch.get_rng_state().sum().item()]
before = settings()
from kvfloor import parse, Spec
state = parse("h2o@16").open(Spec(1, 4, 4))
state.step(torch.ones(1, 1, 40, 4), torch.ones(1, 40, 4), torch.ones(1, 40, 4))
print(json.dumps({"same": settings() == before}))
"""
    assert run(program)["same"]


def test_importing_the_plug_in_leaves_the_attention_registries_unchanged() -> None:
    program = """
import json
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
def registries():
    return [sorted(ALL_ATTENTION_FUNCTIONS.keys()), sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys())]
before = registries()
import kvfloor.hf
print(json.dumps({"same": registries() == before, "names": len(before[0])}))
"""
    found = run(program)
    assert found["same"] and found["names"] > 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = kvfloor.nothing


# What could run code from data: in a state, a message, a prompt file or a method's text.
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def weights_only(call: ast.Call) -> bool:
    """The one form of torch.load that reads tensors and plain containers and runs nothing: the trainer's checkpoint."""
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def violations(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES or (node.module == "torch" and "load" in names):
                found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(node.func.id)
            elif ast.unparse(node.func) == "torch.load" and not weights_only(node):
                found.append("torch.load")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "eval('1')",
        "exec(code)",
        "from torch import load",
    ],
)
def test_the_check_finds_what_it_looks_for(text: str) -> None:
    assert violations(ast.parse(text))


def test_no_source_file_unpickles_or_evaluates() -> None:
    found = {str(path): violations(ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")}
    assert len(found) > 100 and {path: bad for path, bad in found.items() if bad} == {}
