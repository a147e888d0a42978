"""LESS: the state of trained kernels against its definition, where kernels come from, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvfloor import CorruptState, Spec, parse
from kvfloor.methods.summaries import low_rank
from kvfloor.methods.summaries.low_rank import Kernels
from tests import support
from tests.support import Draw

D, DV, RANK = 4, 3, 5


def kernels_file(path: Path, layers: int = 1, heads: int = 1, d: int = D, rank: int = RANK, seed: int = 1) -> str:
    """Kernels that weigh something: s1 and s2 of ordinary size."""
    made = Kernels.untrained(layers * heads, d, rank, hidden=6, seed=seed).tensors()
    made["s1"], made["s2"] = torch.full_like(made["s1"], -0.7), torch.full_like(made["s2"], 0.5)
    save_file({name: x.unflatten(0, (layers, heads)).contiguous() for name, x in made.items()}, path)
    return str(path)


@pytest.fixture
def single(tmp_path: Path) -> str:
    return kernels_file(tmp_path / "one.safetensors")


@pytest.fixture
def per_head(tmp_path: Path) -> str:
    return kernels_file(tmp_path / "heads.safetensors", layers=3, heads=2)


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def mapped(x: Tensor, into: Tensor, out: Tensor) -> list[float]:
    """gelu(gelu(x into) out), number by number."""
    hidden = [gelu(sum(float(x[i]) * float(into[i, j]) for i in range(len(x)))) for j in range(into.shape[1])]
    return [gelu(sum(h * float(out[j, r]) for j, h in enumerate(hidden))) for r in range(out.shape[1])]


def features(kernels: dict[str, Tensor], x: Tensor, of: str) -> list[float]:
    """phi or psi of one vector by the published definition."""
    if of == "phi":
        return [abs(y) for y in mapped(x, kernels["query_in"], kernels["query_out"])]
    size, mix, share = (kernels[name].tolist() for name in ("s1", "key_mix", "s2"))
    y = [abs(s) * z for s, z in zip(size, mapped(x, kernels["key_in"], kernels["key_out"]), strict=True)]
    mixed = [sum(y[i] * mix[i][r] for i in range(len(y))) for r in range(len(y))]
    return [abs(a + b * s) for a, b, s in zip(y, mixed, share, strict=True)]


def oracle(kernels: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, held: Tensor, scale: float) -> Tensor:
    """(sum over held of e^x v + sum over the others of phi(q).psi(k) v) / the same sums of 1."""
    phi = features(kernels, q, "phi")
    weights = []
    for i in range(len(k)):
        psi = features(kernels, k[i], "psi")
        low_rank_weight = sum(a * b for a, b in zip(phi, psi, strict=True))
        weights.append(math.exp(scale * float(q @ k[i])) if held[i] else low_rank_weight)
    weight = torch.tensor(weights, dtype=torch.float64)
    return (weight.unsqueeze(1) * v).sum(0) / weight.sum()


opened = partial(support.opened, rows=2, d=D, dv=DV, scale=0.5)


def of_place(path: str, layer: int, head: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: x[layer, head].double() for name, x in load_file(path).items()}


def assert_follows(path: str, head: str, places: list[tuple[int, int]], draw: Draw) -> None:
    k, v, q = draw(2, 40, D), draw(2, 40, DV), draw(2, 3, D)
    state = opened(f"{head}+less(rank={RANK},kernels={path!r})@12", places=places)
    state.append(k, v)
    answers = state.read(q).mean
    for row, place in enumerate(places):
        held = torch.zeros(40, dtype=torch.bool)
        held[state.slots.view().position[row]] = True
        for i in range(3):
            wanted = oracle(of_place(path, *place), q[row, i], k[row], v[row], held, 0.5)
            assert float((answers[row, i] - wanted).abs().max()) <= 1e-6  # the file is float32


@pytest.mark.parametrize("head", ["window(block=1)", "random(block=8)"])
def test_answers_follow_the_definition(draw: Draw, single: str, head: str) -> None:
    assert_follows(single, head, [(0, 0), (0, 0)], draw)


def test_every_row_uses_the_kernels_of_its_place(draw: Draw, per_head: str) -> None:
    assert_follows(per_head, "window(block=4)", [(2, 1), (0, 1)], draw)


@pytest.mark.parametrize("wrong", ["psi without s2", "signed phi", "another head"])
def test_a_wrong_kernel_is_told(draw: Draw, monkeypatch: pytest.MonkeyPatch, per_head: str, wrong: str) -> None:
    if wrong == "signed phi":
        monkeypatch.setattr(Kernels, "phi", lambda self, q: low_rank.F.gelu(q @ self.query_in).matmul(self.query_out))
    elif wrong == "psi without s2":
        right = Kernels.psi
        monkeypatch.setattr(
            Kernels, "psi", lambda self, k: right(Kernels(**(self.tensors() | {"s2": torch.zeros_like(self.s2)})), k)
        )
    else:
        right_of = Kernels.of
        monkeypatch.setattr(Kernels, "of", lambda self, head: right_of(self, torch.zeros_like(head)))
    with pytest.raises(AssertionError):
        assert_follows(per_head, "window(block=4)", [(2, 1), (0, 1)], draw)


def test_rows_take_their_places_along(draw: Draw, per_head: str) -> None:
    places = [(1, 0), (1, 1)]
    state = opened(f"window(block=4)+less(rank={RANK},kernels={per_head!r})@8", places=places)
    k, v, q = draw(2, 30, D), draw(2, 30, DV), draw(2, 2, D)
    state.append(k, v)
    before = state.read(q)
    state.select_rows(torch.tensor([1, 0, 1]))
    assert state.spec.places == ((1, 1), (1, 0), (1, 1))
    after = state.read(q[[1, 0, 1]])
    torch.testing.assert_close(after.mean, before.mean[[1, 0, 1]], rtol=1e-12, atol=1e-14)
    again = state.method.from_bytes(state.to_bytes())
    assert torch.equal(again.read(q[[1, 0, 1]]).mean, after.mean)


def test_kernels_are_shared_and_the_state_is_small(per_head: str) -> None:
    """R (dv + 1) numbers per row and a tag, whatever the kernels' size; the kernels are public."""
    with_state = opened(
        f"window+less(rank={RANK},kernels={per_head!r})@8", places=[(0, 0), (1, 1)], dtype=torch.float32
    )
    plain = opened("window@8", dtype=torch.float32)
    assert with_state.nbytes - plain.nbytes == 2 * RANK * (DV + 1) * 4 + 8
    assert with_state.shared["less/query_in"].shape == (2, D, 6)  # of the two places that the rows have


def test_untrained_kernels_weigh_next_to_nothing(draw: Draw) -> None:
    k, v, q = draw(2, 40, D), draw(2, 40, DV), draw(2, 3, D)
    plain, untrained = opened("window@8"), opened("window+less@8")
    for state in (plain, untrained):
        state.append(k, v)
    assert float((plain.read(q).mean - untrained.read(q).mean).abs().max()) < 1e-2
    mass = untrained.summary.read(q).log_mass
    assert bool((mass > -torch.inf).all()) and bool((mass < -3).all())


def test_the_mass_is_never_negative_whatever_the_query(draw: Draw, single: str) -> None:
    state = opened(f"window(block=1)+less(rank={RANK},kernels={single!r})@1", dtype=torch.float32)
    state.append(draw(2, 60, D, dtype=torch.float32), draw(2, 60, DV, dtype=torch.float32))
    part = state.summary.read(20 * draw(2, 500, D, dtype=torch.float32))
    assert bool((part.log_mass > -torch.inf).any()) and not bool(part.log_mass.isnan().any())
    assert bool(torch.isfinite(part.mean).all())


# ---- the file -----------------------------------------------------------------------------------------------------


def test_the_text_with_a_path_reads_back(tmp_path: Path) -> None:
    for name in ("plain.safetensors", "with space, (and) 'quote'@64.safetensors", 'double"quote.safetensors'):
        path = kernels_file(tmp_path / name)
        method = parse(f"sinks(4)+less(rank={RANK},kernels={path!r})@64")
        assert method.summary.kernels == path  # type: ignore[attr-defined]
        assert parse(str(method)) == method and str(parse(str(method))) == str(method)


def test_a_message_is_refused_once_the_kernels_have_changed(draw: Draw, tmp_path: Path) -> None:
    path = kernels_file(tmp_path / "k.safetensors")
    state = opened(f"window+less(rank={RANK},kernels={path!r})@8")
    state.append(draw(2, 50, D), draw(2, 50, DV))
    message = state.to_bytes()
    kernels_file(tmp_path / "k.safetensors", seed=2)
    with pytest.raises(CorruptState, match="kernels' file has changed"):
        state.method.from_bytes(message)


def test_kernels_for_another_model_are_refused(per_head: str, single: str) -> None:
    text = f"window+less(rank={RANK},kernels={per_head!r})@8"
    with pytest.raises(ValueError, match=r"3 layers of 2 kv heads, and the rows' Spec\.places do not say"):
        opened(text)
    with pytest.raises(ValueError, match="none for layer 3, kv head 0"):
        opened(text, places=[(0, 0), (3, 0)])
    with pytest.raises(ValueError, match="for heads of width 4, not 7"):
        parse(f"window+less(rank={RANK},kernels={single!r})@8").open(Spec(1, 7, DV))
    with pytest.raises(ValueError, match="have rank 5: write rank=5"):
        parse(f"window+less(kernels={single!r})@8")
    assert parse(text).traits.trained_for == (3, 2, D)


def test_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ValueError) as caught:
            parse(f"window+less(rank={RANK},kernels={str(path)!r})@8")
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "No such file" in refusal(tmp_path / "missing")
    (tmp_path / "text").write_text("not tensors")
    assert "is no safetensors file" in refusal(tmp_path / "text")
    (tmp_path / "claims").write_bytes((2**60).to_bytes(8, "little") + b"{}" * 50)
    assert "is no safetensors file" in refusal(tmp_path / "claims")
    assert "not a regular file" in refusal(Path("/dev/zero"))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(40 << 30)
    assert "more than" in refusal(tmp_path / "sparse")
    good = Kernels.untrained(1, D, RANK, hidden=6, seed=0).tensors()
    whole = {name: x.unsqueeze(0).contiguous() for name, x in good.items()}
    for change, said in (
        ({"s1": None}, "kernels are"),
        ({"query_in": torch.zeros(4, 6)}, "must be (layers, kv heads, d, hidden)"),
        ({"key_mix": torch.zeros(1, 1, RANK, RANK + 1)}, "key_mix"),
        ({"s2": torch.zeros(1, 1, RANK, dtype=torch.int32)}, "floats, got torch.int32"),
        ({"key_in": torch.full((1, 1, D, 6), torch.nan)}, "NaN or infinite"),
    ):
        changed = {name: x for name, x in (whole | change).items() if x is not None}
        save_file(changed, tmp_path / "changed")
        assert said in refusal(tmp_path / "changed")


def test_places_are_checked_and_travel(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one place per row: 2 rows, 1 places"):
        Spec(2, D, DV, places=[(0, 0)])
    spec = Spec(2, D, DV, places=[(0, 1), (2, 0)])
    assert Spec.from_dict(spec.as_dict()) == spec
    assert spec.select(torch.tensor([1, 1])).places == ((2, 0), (2, 0))
