"""A coded save is small, errs as little as it is told to, goes on, and refuses what it cannot code or read."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfloor import CorruptState
from kvfloor.core import message
from kvfloor.hf import CodingBasis, CompressedCache, WrongBasis, coded, coding_basis, prepare
from kvfloor.hf.bases import FIRST, CalibrationText, aim_for
from kvfloor.hf.coded import FINER, NEWEST
from kvfloor.methods.transform import integers
from tests.corruption import (
    require_edits_are_noticed,
    require_every_flip_is_noticed,
    require_every_truncation_is_noticed,
)
from tests.hf.conftest import Talk, served, tiny

pytestmark = pytest.mark.skipif(not integers.installed(), reason="zstandard is not installed")


def ids(seed: int, n: int) -> torch.Tensor:
    return torch.randint(2, 98, (2, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return prepare(tiny())


@pytest.fixture(scope="module")
def basis(model: PreTrainedModel) -> CodingBasis:
    return coding_basis(model, ids(5, 300)[0], ids(9, 300)[0], predicted=60)


def heard(model: PreTrainedModel, method: str = "exact", n: int = 300, **options: Any) -> Talk:
    talk = Talk(model, CompressedCache(model.config, method, **options))
    talk.hear(ids(0, n))
    return talk


def reloaded(talk: Talk, path: Path, aim: float, basis: CodingBasis | None = None) -> Talk:
    talk.cache.save(path, coded=aim, basis=basis)
    return Talk(talk.model, CompressedCache.load(path, talk.model, basis=basis), talk.mask)


def held(talk: Talk, name: str) -> torch.Tensor:
    """Return the keys, values or positions of all layers, row by row, by position."""
    found = []
    for layer in talk.cache.compressed:
        fields = layer.state.export()["slots"]
        counts = fields["held"].tolist()
        order = [row.argsort() for row in fields["position"].split(counts)]
        found += [row[at] for row, at in zip(fields[name].split(counts), order, strict=True)]
    return torch.cat(found)


def error(one: Talk, other: Talk, name: str) -> float:
    wanted = held(one, name).double()
    return float((held(other, name).double() - wanted).square().sum() / wanted.square().sum())


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_smaller_aims_err_less_and_take_more_bytes(model: PreTrainedModel, tmp_path: Path) -> None:
    talk = heard(model)
    sizes, errors, answers = [], [], []
    for aim in (1e-1, 1e-2, 1e-3, 1e-4):
        loaded = reloaded(talk, tmp_path / "cache", aim)
        sizes.append(os.path.getsize(tmp_path / "cache"))
        errors.append(error(talk, loaded, "k") + error(talk, loaded, "v"))
        exact = CompressedCache(model.config, "exact")
        whole = torch.cat([ids(0, 300), ids(1, 20)], 1)
        wanted = Talk(model, exact).hear(whole)[:, -20:]
        answers.append(float((loaded.hear(ids(1, 20)) - wanted).abs().mean()))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert answers == sorted(answers, reverse=True)
    talk.cache.save(tmp_path / "plain")
    assert 5 * sizes[1] < os.path.getsize(tmp_path / "plain")


def test_the_error_of_own_axes_is_the_one_aimed_at(model: PreTrainedModel, tmp_path: Path) -> None:
    """The aim is mean relative squared error times `coded.NATS`; of tokens that are not sharp, a little less."""
    talk = heard(model, n=1000)
    loaded = reloaded(talk, tmp_path / "cache", 0.01)
    spent = 0.0
    for one, other in zip(talk.cache.compressed, loaded.cache.compressed, strict=True):
        for name, nats in coded.NATS.items():
            given, found = (x.state.export()["slots"][name].view(2, 2, 1000, -1).double() for x in (one, other))
            middle = given[:, :, 4:-128]
            spread = (middle - middle.mean((0, 2), keepdim=True)).square().sum() if name == "v" else None
            if spread is not None:  # keys have their mean before RoPE
                off = (found[:, :, 4:-128] - middle).square().sum() / spread
                assert 0.3 * 0.01 / (2 * nats) < off < 3 * 0.01 / (2 * nats)
                spent += float(off)
    assert spent > 0


def test_the_newest_tokens_err_less_and_the_first_not_at_all(model: PreTrainedModel, tmp_path: Path) -> None:
    talk = heard(model, n=500)
    loaded = reloaded(talk, tmp_path / "cache", 0.03)
    off = (held(loaded, "v") - held(talk, "v")).square().mean(1).view(-1, 500).mean(0)
    assert float(off[FIRST:-NEWEST].mean()) > 2 ** (FINER - 1) * float(off[-NEWEST:].mean())
    for name in ("k", "v"):
        one, other = (held(each, name).unflatten(0, (-1, 500))[:, :FIRST] for each in (talk, loaded))
        assert torch.equal(one, other)


def test_a_loaded_cache_goes_on_as_a_plain_copy_of_it(model: PreTrainedModel, tmp_path: Path) -> None:
    """What was decoded is an ordinary cache: saved as it is and loaded, it answers bit for bit alike."""
    loaded = reloaded(heard(model), tmp_path / "coded", 0.01)
    loaded.cache.save(tmp_path / "plain")
    again = Talk(model, CompressedCache.load(tmp_path / "plain", model), loaded.mask)
    for n in (1, 7, 1):
        assert torch.equal(loaded.hear(ids(n, n)), again.hear(ids(n, n)))


def test_generate_goes_on(model: PreTrainedModel, tmp_path: Path) -> None:
    first, second = ids(3, 260)[:1], ids(4, 8)[:1]
    cache = CompressedCache(model.config, "exact")
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    said = model.generate(first, **greedy, past_key_values=cache)
    cache.save(tmp_path / "cache", coded=1e-6)
    loaded = CompressedCache.load(tmp_path / "cache", model)
    whole = torch.cat([said, second], 1)
    assert torch.equal(
        model.generate(whole, **greedy, past_key_values=loaded), model.generate(whole, **greedy, past_key_values=cache)
    )


def test_saving_changes_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    talk = heard(model)
    talk.cache.save(tmp_path / "before")
    talk.cache.save(tmp_path / "cache", coded=0.01)
    first = (tmp_path / "cache").read_bytes()
    talk.cache.save(tmp_path / "cache", coded=0.01)
    talk.cache.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    assert (tmp_path / "cache").read_bytes() == first  # equal content makes equal bytes


@pytest.mark.parametrize("method", ["sinks(4)@200", "window+value_sum@200"])
def test_whole_tokens_of_other_methods_are_coded_too(model: PreTrainedModel, tmp_path: Path, method: str) -> None:
    talk = heard(model, method)
    loaded = reloaded(talk, tmp_path / "cache", 1e-6)
    assert torch.equal(held(loaded, "position"), held(talk, "position"))
    assert error(talk, loaded, "k") < 1e-4
    for n in (1, 40, 1):
        one, other = (each.hear(ids(n, n)) for each in (talk, loaded))
        assert torch.allclose(one, other, atol=0.02)
    assert torch.equal(held(loaded, "position"), held(talk, "position"))


def test_padded_batches_are_coded_too(model: PreTrainedModel, tmp_path: Path) -> None:
    talk = Talk(model, CompressedCache(model.config, "exact"))
    mask = torch.ones(2, 300, dtype=torch.int64)
    mask[0, :90] = 0
    talk.hear(ids(0, 300), mask)
    loaded = reloaded(talk, tmp_path / "cache", 1e-6)
    assert error(talk, loaded, "k") < 1e-4 and error(talk, loaded, "v") < 1e-4
    assert torch.allclose(loaded.hear(ids(1, 5)), talk.hear(ids(1, 5)), atol=0.02)


def test_half_precision_is_coded_too(tmp_path: Path) -> None:
    talk = heard(prepare(tiny().to(torch.bfloat16)))
    loaded = reloaded(talk, tmp_path / "cache", 1e-5)
    assert held(loaded, "k").dtype == torch.bfloat16 and error(talk, loaded, "k") < 1e-3


def test_keys_take_fewer_bytes_without_their_rotation(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few distinct tokens make few distinct keys in the first layer, which RoPE spreads over all axes."""
    talk = Talk(model, CompressedCache(model.config, "exact"))
    talk.hear(ids(0, 400) % 4 + 7)
    talk.cache.save(tmp_path / "cache", coded=1e-3)
    monkeypatch.setattr(coded, "measured_turns", lambda model: {})
    talk.cache.save(tmp_path / "rotated", coded=1e-3)
    small, large = (os.path.getsize(tmp_path / name) for name in ("cache", "rotated"))
    assert small < 0.9 * large
    assert error(talk, Talk(model, CompressedCache.load(tmp_path / "rotated", model)), "k") < 0.02


# ---- a basis ---------------------------------------------------------------------------------------------------------


def test_the_metric_predicts_the_divergence() -> None:
    """The oracle: the measured divergence after small random errors, in float64, as fine as each token's energy asks.

    With errors inversely proportional to energies, the divergence is the metric of a typical token times all tokens'.
    """
    double = prepare(tiny().double())
    tokens = ids(6, 260)[:1]
    text = CalibrationText(double, tokens[:, :200], tokens[:, 200:])
    layers = text.axes(draws=120)
    draw, size = torch.Generator().manual_seed(0), 1e-7
    exact = text.predict({}).detach()
    measured = []
    for _ in range(12):
        expected, changed = 0.0, {}
        for i, layer in layers.items():
            changed[i] = {}
            vectors = {name: text.wide(x, i, name) for name, x in text.given(i).items()}
            finer = layer.fineness(vectors["k"][FIRST:], text.distance)
            for name, one in layer.axes.items():
                x = vectors[name].double()
                noise = size * torch.randn(len(x) - FIRST, len(one.variances), generator=draw, dtype=torch.float64)
                noise = noise * 2.0 ** (-finer[name].double() / 2).unsqueeze(1)
                x[FIRST:] += noise @ one.backward.double()
                changed[i][name] = text.heads(x, i, name)
                expected += size**2 * len(one.variances)
        with torch.no_grad():
            found = text.predict(changed)
        measured.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
    assert sum(measured) / len(measured) == pytest.approx(expected, rel=0.6)


def test_the_metric_is_that_of_a_typical_token_and_fineness_has_the_rest(model: PreTrainedModel) -> None:
    """Tokens whose gradients are longer by factors, of geometric mean 1, change no axis, and are coded finer."""
    tokens = ids(6, 260)[:1]
    text = CalibrationText(model, tokens[:, :200], tokens[:, 200:])
    draw = torch.Generator().manual_seed(0)
    even, uneven = {}, {}
    for name in ("k", "v"):
        g = torch.randn(3, 196, 32, generator=draw) * torch.linspace(1, 0.1, 32)
        even[name] = g / g.square().sum(-1).mean(0).sqrt().unsqueeze(1)
        factor = torch.linspace(-3, 3, 196).exp2()
        uneven[name] = even[name] * factor.unsqueeze(1)
    one, other = text.layer_axes(0, even), text.layer_axes(0, uneven)
    found = other.fineness(text.wide(text.given(0)["k"], 0, "k")[FIRST:], text.distance)
    for name in ("k", "v"):
        metrics = [each.axes[name].forward.double() @ each.axes[name].forward.double().T for each in (one, other)]
        assert torch.allclose(*metrics, rtol=1e-3, atol=1e-6)
        assert found[name][-20:].float().mean() > found[name][:20].float().mean() + 3


def test_the_aim_is_reached_on_the_held_out_text(builtin: tuple[Any, Any]) -> None:
    model, _ = builtin
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randint(5, 200, (1, 400), generator=draw) for _ in range(2))
    found = coding_basis(model, one, other, predicted=100)
    text = CalibrationText(model, other[:, :300], other[:, 300:])
    assert 0.002 < text.divergence(found.layers, 0.01) < 0.03


@pytest.mark.parametrize("power", [0.7, 1.0, 1.7])
def test_the_aim_of_a_power_is_found(power: float) -> None:
    found = aim_for(lambda aim: 40 * aim**power)
    assert 40 * found**power == pytest.approx(0.01, rel=0.05)
    assert aim_for(lambda aim: 0.0) > 0  # a divergence that is never reached


def test_a_basis_needs_no_bytes_in_the_saved_cache(model: PreTrainedModel, basis: CodingBasis, tmp_path: Path) -> None:
    talk = heard(model)
    loaded = reloaded(talk, tmp_path / "cache", 1e-16, basis)  # a random model: no error shows
    assert error(talk, loaded, "v") < 0.1
    _, fields = message.unpack((tmp_path / "cache").read_bytes())
    assert all(not fields[str(i)]["coded"]["axes"] for i in range(3))


def test_a_basis_goes_through_its_file(basis: CodingBasis, tmp_path: Path) -> None:
    basis.save(tmp_path / "basis")
    again = CodingBasis.load(tmp_path / "basis")
    assert again.digest == basis.digest and again.model == basis.model
    for i, layer in basis.layers.items():
        for name, one in layer.axes.items():
            other = again.of(i).axes[name]
            assert torch.equal(other.forward, one.forward)
            assert torch.equal(again.of(i).weights[name], layer.weights[name])
            assert torch.allclose(other.forward @ other.backward, torch.eye(len(one.mean)), atol=1e-3)
    data = (tmp_path / "basis").read_bytes()

    def read(damaged: bytes) -> object:
        (tmp_path / "broken").write_bytes(damaged)
        return CodingBasis.load(tmp_path / "broken")

    require_every_flip_is_noticed(data, read, random.Random(0).sample(range(len(data)), 30))


def test_another_basis_is_refused(model: PreTrainedModel, basis: CodingBasis, tmp_path: Path) -> None:
    talk = heard(model)
    talk.cache.save(tmp_path / "cache", coded=0.01, basis=basis)
    other = coding_basis(model, ids(8, 300)[0], ids(9, 300)[0], predicted=60)
    with pytest.raises(WrongBasis, match=f"coded in the basis {basis.digest[:12]}, and none was given"):
        CompressedCache.load(tmp_path / "cache", model)
    with pytest.raises(WrongBasis, match=f"and this one is {other.digest[:12]}: pass basis="):
        CompressedCache.load(tmp_path / "cache", model, basis=other)
    with pytest.raises(TypeError, match="basis must be a CodingBasis"):
        CompressedCache.load(tmp_path / "cache", model, basis="basis")  # pyright: ignore[reportArgumentType]
    twin = prepare(tiny(num_attention_heads=2))
    before = (tmp_path / "cache").read_bytes()
    with pytest.raises(WrongBasis, match="calibrated for a LlamaForCausalLM with other weights"):
        heard(twin).cache.save(tmp_path / "cache", coded=0.01, basis=basis)
    assert (tmp_path / "cache").read_bytes() == before


def test_a_calibration_text_that_is_too_short_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"at least 128 token ids, of which 60 are predicted; got shape \(1, 110\)"):
        coding_basis(model, ids(0, 300)[0], ids(0, 110)[0], predicted=60)
    with pytest.raises(ValueError, match="prepare"):
        coding_basis(tiny(), ids(0, 300)[0], ids(1, 300)[0], predicted=60)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, options, said",
    [
        ("random@64", {}, "codes the kv heads of a token together, and under random@64 they hold different tokens"),
        ("quant(bits=4)", {}, "does not keep keys and values as they are given"),
        ("exact:k4v4", {}, "does not keep keys and values as they are given"),
        ("exact|pages(page=4,pages=3)", {}, "has an index of the keys"),
        ("sinks(4)@64", {"positions": "cache"}, "turns keys to places in the cache"),
    ],
)
def test_what_cannot_be_coded_is_refused_by_name(
    model: PreTrainedModel, tmp_path: Path, method: str, options: Any, said: str
) -> None:
    talk = Talk(model, CompressedCache(model, method, **options))
    talk.hear(ids(0, 200))
    (tmp_path / "cache").write_bytes(b"older")
    with pytest.raises(ValueError, match=said):
        talk.cache.save(tmp_path / "cache", coded=0.01)
    assert (tmp_path / "cache").read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1
    talk.cache.save(tmp_path / "cache")


def test_values_that_are_the_keys_are_refused(tmp_path: Path) -> None:
    model = prepare(served("deepseek_v3"))
    talk = Talk(model, CompressedCache(model.config, "exact"))
    talk.hear(ids(0, 40) % 50 + 2)
    if not any(layer.state is not None and layer.state.spec.tied for layer in talk.cache.compressed):
        pytest.skip("this release of transformers caches every head's keys")
    with pytest.raises(ValueError, match="has values that are its keys"):
        talk.cache.save(tmp_path / "cache", coded=0.01)


def test_a_sharded_model_is_refused() -> None:
    cache: Any = SimpleNamespace(ranks=SimpleNamespace(count=2), compressed=[])
    with pytest.raises(ValueError, match="all kv heads in one process"):
        coded.check(cache, 0.01, None)


@pytest.mark.parametrize("aim", [0, -1.0, float("nan"), float("inf"), "0.01", True])
def test_an_impossible_aim_is_refused(model: PreTrainedModel, tmp_path: Path, aim: Any) -> None:
    with pytest.raises(ValueError, match="coded must be a positive number, got"):
        heard(model, n=8).cache.save(tmp_path / "cache", coded=aim)
    with pytest.raises(ValueError, match="give coded= too"):
        heard(model, n=8).cache.save(tmp_path / "cache", basis=object())  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_without_zstandard_one_line_says_what_to_install(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = heard(model)
    talk.cache.save(tmp_path / "cache", coded=0.01)
    before = (tmp_path / "cache").read_bytes()
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    for call in (
        lambda: talk.cache.save(tmp_path / "cache", coded=0.1),
        lambda: CompressedCache.load(tmp_path / "cache", model),
    ):
        with pytest.raises(ValueError, match=r'pip install "kvfloor\[coded\]"') as caught:
            call()
        assert not isinstance(caught.value, CorruptState) and "\n" not in str(caught.value)
    assert (tmp_path / "cache").read_bytes() == before


@pytest.mark.parametrize("where", ["encode", "replace_file"])
def test_a_save_that_breaks_off_leaves_the_old_file_and_the_cache(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    talk = heard(model)
    talk.cache.save(tmp_path / "cache", coded=0.01)
    before = (tmp_path / "cache").read_bytes()
    calls: list[int] = []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if where == "encode" and len(calls) < 4:
            return real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "encode":
            real = coded.encode
            patch.setattr(coded, "encode", fail)
        else:
            patch.setattr("kvfloor.files.os.replace", fail)
        with pytest.raises(KeyboardInterrupt):
            talk.cache.save(tmp_path / "cache", coded=0.02)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    talk.cache.save(tmp_path / "cache", coded=0.01)
    assert (tmp_path / "cache").read_bytes() == before


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[PreTrainedModel, bytes]:
    """Return a model of one layer, and the bytes of a coded cache of it."""
    model = prepare(tiny(num_hidden_layers=1))
    heard(model, n=12).cache.save(tmp_path / "cache", coded=0.01)
    return model, (tmp_path / "cache").read_bytes()


def test_every_flipped_bit_and_every_truncation_is_noticed(
    small: tuple[PreTrainedModel, bytes], tmp_path: Path
) -> None:
    model, data = small
    assert len(data) < 10_000
    require_every_flip_is_noticed(data, message.unpack)
    require_every_truncation_is_noticed(data, message.unpack)

    def read(damaged: bytes) -> object:
        (tmp_path / "broken").write_bytes(damaged)
        return CompressedCache.load(tmp_path / "broken", model)

    draw = random.Random(0)
    require_every_flip_is_noticed(data, read, draw.sample(range(len(data)), 40))
    require_every_truncation_is_noticed(data, read, draw.sample(range(len(data)), 40))
    for _ in range(60):
        require_edits_are_noticed(data, read, draw)


def _codes(change: Any) -> Any:
    def edit(header: Any, fields: Any) -> None:
        header["layers"][0]["coded"]["sizes"], fields["0"]["coded"]["codes"] = change(
            header["layers"][0]["coded"]["sizes"], fields["0"]["coded"]["codes"]
        )

    return edit


def _put(value: Any, *path: Any) -> Any:
    def edit(header: Any, fields: Any) -> None:
        at = {"header": header, "fields": fields}
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value

    return edit


FORGERIES = {
    "a step of 0": _put(0.0, "header", "coded", "step"),
    "a step that is no number": _put("x", "header", "coded", "step"),
    "no step": lambda header, fields: header["coded"].pop("step"),
    "no entry": lambda header, fields: header.pop("coded"),
    "an entry that is a list": _put([1], "header", "coded"),
    "a rotation that is not there": _put(7, "header", "layers", 0, "coded", "turn"),
    "no rotations": _put([], "header", "coded", "rotations"),
    "codes cut": _codes(lambda sizes, codes: (sizes, codes[:-1])),
    "sizes swapped": _codes(lambda sizes, codes: ([sizes[1], sizes[0], *sizes[2:]], codes)),
    "a size below 0": _codes(lambda sizes, codes: ([sizes[0] + sizes[1] + 1, -1, *sizes[2:]], codes)),
    "fewer parts": _codes(lambda sizes, codes: (sizes[:-1], codes[: sum(sizes[:-1])])),
    "zeros": _codes(lambda sizes, codes: (sizes, codes * 0)),
    "codes as float": _codes(lambda sizes, codes: (sizes, codes.float())),
    "axes of another width": lambda h, f: f["0"]["coded"]["axes"]["k"].update(backward=torch.zeros(3, 5)),
    "a mean that is infinite": lambda h, f: f["0"]["coded"]["axes"]["k"]["mean"].fill_(float("inf")),
    "no axes": lambda h, f: f["0"]["coded"]["axes"].pop("v"),
    "more tokens": lambda h, f: f["0"]["state"]["slots"]["held"].add_(1),
    "heads that differ": lambda h, f: f["0"]["state"]["slots"]["held"].copy_(torch.tensor([12, 11, 12, 13])),
    "no tokens left out": _put(None, "header", "layers", 0, "coded"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_somebody_changed_with_its_digest_is_no_cache(
    small: tuple[PreTrainedModel, bytes], tmp_path: Path, name: str
) -> None:
    model, data = small
    header, fields = message.unpack(data)
    (tmp_path / "forged").write_bytes(message.pack(header, fields))
    CompressedCache.load(tmp_path / "forged", model)  # the edit is what is refused, not the packing
    FORGERIES[name](header, fields)
    (tmp_path / "forged").write_bytes(message.pack(header, fields))
    with pytest.raises(CorruptState):
        CompressedCache.load(tmp_path / "forged", model)
