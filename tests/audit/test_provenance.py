"""The hashes are those of the files that were measured."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kvfloor.audit import provenance
from kvfloor.audit.provenance import file_hash, model_hashes, text_hashes
from kvfloor.models.load import builtin_path
from kvfloor.models.packaged import PACKAGED


def test_hashes_are_of_the_weights_and_of_the_texts_bytes(tmp_path: Path) -> None:
    weights = (builtin_path() / "model.safetensors").read_bytes()
    assert model_hashes("builtin") == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert model_hashes("smollm2") == {PACKAGED["smollm2"].file: PACKAGED["smollm2"].sha256}
    (tmp_path / "mine.txt").write_bytes(b"one\r\ntwo")
    found = text_hashes([str(tmp_path / "mine.txt"), "speech", "mixture-0"], 300)
    assert found["mine.txt"] == hashlib.sha256(b"one\r\ntwo").hexdigest()
    assert list(found) == ["mine.txt", "speech", "mixture-0"] and len(set(found.values())) == 3
    assert text_hashes(["mixture-0"], 3000)["mixture-0"] != found["mixture-0"]
    assert file_hash(None) == {} and file_hash(tmp_path / "mine.txt") == {"mine.txt": found["mine.txt"]}


def test_weights_too_large_to_read_again_have_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in "ab":
        (tmp_path / f"model-{part}.safetensors").write_bytes(bytes(2048))
    assert set(model_hashes(str(tmp_path)).values()) == {hashlib.sha256(bytes(2048)).hexdigest()}
    monkeypatch.setattr(provenance, "MOST_HASHED", 4095)
    assert model_hashes(str(tmp_path))["model-b.safetensors"] == "not computed: 2.00 KiB"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model_hashes(str(tmp_path / "model.gguf")) == {"model.gguf": hashlib.sha256(b"GGUF").hexdigest()}
