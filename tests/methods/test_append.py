"""SubGen's kernel in C takes blocks as the torch definition does, bit by bit; mutants of it do not."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.methods.sketches import append
from kvfloor.methods.sketches.clusters import Clusters, Reservoir
from tests.faulty_c import faulty

pytestmark = pytest.mark.skipif(append.library() is None, reason="no C compiler here")

SETTINGS = (
    "subgen_sketch(delta=1.5,t=3,s=20,block=16)",
    "subgen_sketch(delta=1.5,t=3,s=20,centres=9,block=16)",
    "subgen_sketch(delta=0.001,t=1,s=7,block=5)",
    "subgen_sketch(delta=100.0,t=2,s=300,block=64)",
    "subgen_sketch(delta=2.5,t=4,s=33,centres=40,block=32)",
    "subgen_tensor(delta1=1.5,delta2=2.0,block=16,t=2,s=20)",
)


def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "library", lambda: None)


def stream(n: int, d: int, kind: str, seed: int = 0, rows: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    k, v = torch.randn(rows, n, d, generator=draw), torch.randn(rows, n, d, generator=draw)
    if kind == "ties":  # few keys again and again, values of which some are 0
        k, v = k[:, :7].repeat(1, -(-n // 7), 1)[:, :n], v * (torch.rand(rows, n, 1, generator=draw) > 0.3)
    if kind == "far":  # the product alone cannot tell these apart
        k = 1000 + 0.5 * k
    if kind == "even":  # many pairs are equally far apart
        k = (2 * k).round() * (torch.arange(d) < 3)
    if kind == "huge":  # squares overflow: torch answers
        k = k * 1e20
    return k, v


def fed(text: str, k: Tensor, v: Tensor, pieces: int, present: Tensor | None = None) -> bytes:
    spec = Spec(rows=len(k), d=k.shape[2], dv=v.shape[2], scale=0.3, seed=5, dtype=k.dtype)
    state = parse(text).open(spec)
    if "tensor" in text:  # each token has two keys and two values
        k, v = torch.cat([k, k.flip(1)], 2), torch.cat([v, v.flip(0)], 2)
    for at in range(0, k.shape[1], pieces):
        cut = slice(at, at + pieces)
        state.append(k[:, cut], v[:, cut], **({} if present is None else {"present": present[:, cut]}))
    return state.to_bytes()


@pytest.mark.parametrize("kind", ["normal", "ties", "far", "even", "huge"])
@pytest.mark.parametrize("text", SETTINGS)
def test_it_is_the_definition_bit_by_bit(monkeypatch: pytest.MonkeyPatch, text: str, kind: str) -> None:
    for d in (6, 24):
        k, v = stream(200, d, kind)
        present = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)) > 0.2
        mine = [fed(text, k, v, pieces) for pieces in (200, 7)], fed(text, k, v, 64, present)
        with monkeypatch.context() as without:
            in_torch(without)
            defined = fed(text, k, v, 200), fed(text, k, v, 50, present)
        assert mine[0][0] == mine[0][1] == defined[0] and mine[1] == defined[1]


def test_the_kernel_is_what_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    for name in ("joined", "offered"):
        work = getattr(append, name)
        monkeypatch.setattr(append, name, lambda *a, work=work: called.append(work(*a)) or called[-1])
    fed(SETTINGS[0], *stream(64, 8, "normal"), 64)
    assert called == [True] * 8
    fed(SETTINGS[0], *stream(64, 8, "huge"), 64)
    assert called[8:] == [True, False] * 4  # pairs, and clusters
    fed(SETTINGS[0], *(x.double() for x in stream(16, 8, "normal")), 64)
    fed(SETTINGS[0], *(x.bfloat16() for x in stream(16, 8, "normal")), 64)
    assert called[16:] == [False] * 4


def parts(rows: int = 4, d: int = 5) -> tuple[Clusters, Reservoir]:
    spec = Spec(rows=rows, d=d, dv=d, scale=1.0, seed=3)
    return Clusters(spec, 2, None), Reservoir(spec, 9)


def contents(*held: Any) -> list[Tensor]:
    return [x.clone() for one in held for x in vars(one).values() if isinstance(x, Tensor)]


@pytest.mark.parametrize("start", [0, 2**31 - 3, 2**32 - 3, 2**40, 2**52])
def test_some_rows_and_late_positions(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    k, v = stream(12, 5, "normal", rows=4)
    rows, position = torch.tensor([0, 2, 3]), start + torch.arange(12).expand(3, 12)
    found = []
    for native in (True, False):
        with monkeypatch.context() as maybe:
            if not native:
                in_torch(maybe)
            keys, pairs = parts()
            for cut in (slice(0, 6), slice(6, 12)):
                given = rows, k[rows, cut], position[:, cut]
                keys.join(*given, 1.5, "samples")
                pairs.offer(rows, k[rows, cut], v[rows, cut], position[:, cut], "pairs")
        found.append(contents(keys, pairs))
        assert int(keys.count[1].sum()) == 0 and int(keys.count[2].sum()) == 12
    for mine, defined in zip(*found, strict=True):
        assert torch.equal(mine, defined)


def test_without_memory_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = stream(16, 5, "normal", rows=4)
    keys, pairs = parts()
    rows, position = torch.arange(4), torch.arange(16).expand(4, 16)
    keys.join(rows, k, position, 1.5, "samples")
    pairs.offer(rows, k, v, position, "pairs")
    keys._grow(64)
    before = contents(keys, pairs)
    library = append.library()
    failing = types.SimpleNamespace(join=lambda given: 2, offer=lambda given: 2)
    monkeypatch.setattr(append, "library", lambda: failing)
    for call in (
        lambda: keys.join(rows, k, position + 16, 1.5, "samples"),
        lambda: pairs.offer(rows, k, v, position + 16, "pairs"),
    ):
        with pytest.raises(MemoryError, match="no memory to take"):
            call()
    assert all(torch.equal(x, y) for x, y in zip(before, contents(keys, pairs), strict=True))
    monkeypatch.setattr(append, "library", lambda: library)
    keys.join(rows, k, position + 16, 1.5, "samples")
    assert int(keys.count.sum()) == 128


def test_other_structures_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("int64_t r, b, d, dv, s;", "int64_t r, b, d, dv, s, more;")
    monkeypatch.setattr(append, "SOURCE", faulty(append.SOURCE, tmp_path / "source", more))
    assert append.loaded(tmp_path / "made") is None


def test_without_a_compiler_torch_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = stream(40, 6, "normal")
    mine = fed(SETTINGS[0], k, v, 40)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(append, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(append, "library", append.library.__wrapped__)
    assert append.library() is None and fed(SETTINGS[0], k, v, 40) == mine


def test_without_vector_instructions_the_bits_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = stream(120, 24, "far")
    mine = fed(SETTINGS[0], k, v, 40)
    monkeypatch.setattr(append, "instructions", lambda: ())
    plain = append.loaded(tmp_path)
    monkeypatch.setattr(append, "library", lambda: plain)
    assert plain is not None and fed(SETTINGS[0], k, v, 40) == mine


MUTANTS = (
    ("if (far < apart[first + j])", "if (far <= apart[first + j])", "even"),
    ("4 * 0x1p-23f * (float)(g->d + 4)", "0 * (float)(g->d + 4)", "far"),
    ("u < count && fresh[u] <= j", "u < count", "normal"),
    ("used + count >= g->cap", "used + count + 1 >= g->cap", "normal"),
    ("if (covered) continue;", "", "normal"),
    ("beyond |= apart[j] > delta", "beyond |= 0", "overfull"),
    ("counter = (uint64_t)g->position", "counter = 1 + (uint64_t)g->position", "normal"),
    ("if (was_top) top = largest(best, s);", "top = at;", "normal"),
    ("+ 2.0 * s * series", "+ 2.0 * s", "normal"),
    ("x[i] += x[half + i]; \\", "x[0] += x[half + i]; \\", "far"),
    ("if (!(norm > 0)) continue;", "if (!(norm > 0)) norm = 1;", "ties"),
)


@pytest.mark.parametrize(("right", "fault", "kind"), MUTANTS)
def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, fault: str, kind: str) -> None:
    monkeypatch.setattr(append, "SOURCE", faulty(append.SOURCE, tmp_path / "source", (right, fault)))
    monkeypatch.setattr(append, "OPTIONS", ("-O0", *append.OPTIONS[1:]))
    broken = append.loaded(tmp_path / "made")
    k, v = stream(300, 24, kind)
    fits, delta = append.library(), {"far": "2.8", "even": "1.5"}.get(kind, "5.5")
    same = []
    for found in (fits, broken, None):
        monkeypatch.setattr(append, "library", lambda found=found: found)
        states = []
        for setting in SETTINGS[:2]:
            state = parse(setting.replace("1.5", delta)).open(Spec(rows=3, d=24, dv=24, scale=0.3, seed=5))
            state.append(k, v)
            states += [state.to_bytes(), str(state.keys.overfull.tolist())]  # pyright: ignore[reportAttributeAccessIssue]
        same.append(states)
    assert same[0] == same[2] and same[1] != same[2]
