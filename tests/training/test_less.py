"""The trainer of LESS kernels: what it simulates is what the state does, and what it learns is worth something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.bounded import Bounded
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.methods.summaries.low_rank import Kernels, Less
from kvfloor.training.fit import Recipe, answers, fit, loss_of, output_weight, train
from kvfloor.training.less import rivals, run
from kvfloor.training.lessons import Lesson, Text, departures, lesson, recorded, task_items, texts
from tests.hf.conftest import tiny
from tests.support import Draw, stream

SMALL = Recipe(rank=4, hidden=8, samples=4, length=48, epochs=2, batch=2)


def bounded(text: str) -> Bounded:
    method = parse(text)
    assert isinstance(method, Bounded)
    return method


def taken(draw: Draw, n: int = 60, heads: int = 2, g: int = 2, d: int = 6) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    return *stream(draw, heads, g, n, d, dtype=torch.float32), d**-0.5, None


def heavy(kernels: Kernels) -> Kernels:
    """Kernels as if trained: their mass is of the size of softmax masses."""
    return replace(kernels, s1=torch.full_like(kernels.s1, 2.0), s2=torch.full_like(kernels.s2, 0.5))


POLICIES = (
    "sinks(count=2,block=8)@16",
    "h2o(recent=4,block=8)@16",
    "random(block=4)@12",
    "h2o(prefill=dense,block=8)@16",
)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_trained_is_what_the_state_answers(draw: Draw, tmp_path: Path, policy: str) -> None:
    """The trainer's parallel form against the state, stepped: the same kernels, the same answers to every query."""
    method, prompt, seen = bounded(policy), 37, taken(draw)
    q, k, v, scale, _ = seen
    kernels = heavy(Kernels.untrained(2, 6, 4, 8, seed=5))
    path = tmp_path / "k.safetensors"
    save_file({name: x.unsqueeze(0).contiguous() for name, x in kernels.tensors().items()}, path)
    one = lesson(method, 0, Text([0] * prompt, [0] * (60 - prompt)), seen)
    assert one is not None
    found = answers(kernels, one)
    state = replace(method, summary=Less(4, str(path))).open(
        Spec(2, 6, 6, scale, dtype=torch.float32, places=[(0, 0), (0, 1)])
    )
    out = state.step(q[:, :, :prompt], k[:, :prompt], v[:, :prompt])
    state.seal()
    out = torch.cat([out, state.step(q[:, :, prompt:], k[:, prompt:], v[:, prompt:])], 2)
    first = 60 - found.shape[2]
    torch.testing.assert_close(found, out[:, :, first:], rtol=1e-4, atol=1e-5)
    exact = parse("exact").open(Spec(2, 6, 6, scale, dtype=torch.float32)).step(q, k, v)
    torch.testing.assert_close(one.exact, exact[:, :, first:], rtol=1e-4, atol=1e-5)
    assert float((found - one.exact).abs().max()) > 1e-2  # tokens are missing


def test_departures_are_when_the_policy_says() -> None:
    """sinks(count=2)@8 in blocks of 4: tokens 0 and 1 stay, the others leave in order, four at each block's end."""
    n = 24
    q, k = torch.zeros(1, 1, n, 4), torch.zeros(1, n, 4)
    left = departures(bounded("sinks(count=2,block=4)@8"), Spec(1, 4, 4), q, k, k, prompt=10)
    wanted = [n + 1] * n
    for i in range(2, 18):
        wanted[i] = 12 + 4 * ((i - 2) // 4)
    assert left[0].tolist() == wanted


def test_nothing_to_learn_where_nothing_left(draw: Draw) -> None:
    assert lesson(bounded("window@64"), 0, Text([0] * 30, [0] * 30), taken(draw)) is None


def lessons(draw: Draw) -> list[Lesson]:
    """Texts whose evicted tokens all have one value and small logits: easy to stand for."""
    made = []
    for _ in range(5):
        q, k, v, scale, cap = taken(draw)
        one = lesson(
            bounded("window(block=8)@8"), 0, Text([0] * 30, [0] * 30), (0.3 * q, 0.3 * k, v * 0 + 1, scale, cap)
        )
        two = lesson(bounded("window(block=8)@8"), 0, Text([0] * 30, [0] * 30), (0.3 * q, 0.3 * k, v, scale, cap))
        made += [x for x in (one, two) if x is not None]
    return made


def test_training_lowers_the_error_on_texts_it_did_not_see(draw: Draw) -> None:
    material, said = lessons(draw), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = Kernels.untrained(2, 6, 4, 16, seed=0)
        kernels = fit(material, None, start, Recipe(epochs=12, lr=2e-2, dropout=0.0), said.append)
    unseen = material[-1]
    with torch.no_grad():
        before, after = (float(loss_of(k, unseen, None)) for k in (start, kernels))
    assert after < 0.6 * before
    assert said and "->" in said[0]


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        return prepare(tiny(hidden_size=32, intermediate_size=48, num_hidden_layers=2))


def material(count: int = 4) -> list[Text]:
    source = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 98, (count, 48), generator=source).tolist()
    return [Text(row[:40], row[40:]) for row in ids]


def test_what_is_recorded_is_what_the_layer_saw(model: Any) -> None:
    text = material(1)[0]
    q, k, v, scale, cap = next(recorded(model, [text], 1))
    assert q.shape == (2, 2, 48, 8) and k.shape == v.shape == (2, 48, 8) and scale == 8**-0.5 and cap is None
    cache = CompressedCache(model.config, "exact")
    Dialogue.start(model, cache, 1).feed([text.context + text.rest])
    held = cache.compressed[1].state.slots.view()  # type: ignore[union-attr]
    torch.testing.assert_close(k, held.k, rtol=0, atol=0)
    torch.testing.assert_close(v, held.v, rtol=0, atol=0)


def test_the_output_weight_is_the_layers_own(model: Any) -> None:
    weight = output_weight(model, 1, 32)
    assert weight is not None and torch.equal(weight, model.model.layers[1].self_attn.o_proj.weight)
    assert output_weight(model, 1, 33) is None and output_weight(model, 7, 32) is None


def test_a_trained_file_serves_the_models_cache(model: Any, tmp_path: Path) -> None:
    """From the model to a file to `generate()`; the same arguments give the same bits, and no global seed is used."""
    method, path = bounded("sinks(count=2,block=4)@12"), tmp_path / "less.safetensors"
    before = torch.get_rng_state()
    tensors = train(model, material(), method, SMALL, lambda text: None)
    again = train(model, material(), method, SMALL, lambda text: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert tensors["query_in"].shape == (2, 2, 8, 8)
    path.write_bytes(save(tensors, {"model": "tiny"}))
    assert [file.name for file in tmp_path.iterdir()] == ["less.safetensors"]
    cache = CompressedCache(model.config, f"sinks(count=2,block=4)+less(rank=4,kernels={str(path)!r})@12")
    ids = torch.tensor([material(1)[0].context])
    model.generate(ids, do_sample=False, max_new_tokens=6, past_key_values=cache)
    assert max(max(entry["held"]) for entry in cache.report()) <= 15
    places = [layer.state.spec.places for layer in cache.compressed]  # type: ignore[union-attr]
    assert places == [((0, 0), (0, 1)), ((1, 0), (1, 1))]
    masses = cache.compressed[1].state.summary.sums[..., -1]  # type: ignore[union-attr]
    assert bool((masses > 0).any())


def test_a_policy_that_drops_nothing_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="keeps \\(nearly\\) all of these texts"):
        train(model, material(), bounded("window@64"), SMALL, lambda text: None)


def test_rivals_have_as_many_bytes_as_the_state(tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    kernels = Kernels.untrained(1, 64, 8, 16, seed=0).tensors()
    save_file({name: x.unsqueeze(0).contiguous() for name, x in kernels.items()}, path)
    spec = Spec(1, 64, 64, places=[(0, 0)])
    plain, more, with_state = rivals(bounded("sinks(4)@64"), Less(8, str(path)), spec)
    assert (plain.budget, more.budget, with_state.budget) == (64, 68, 64)  # rank 8 costs four tokens
    assert abs(more.open(spec).nbytes - with_state.open(spec).nbytes) <= 8


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return type("Encoded", (), {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]})()


def test_texts_are_contexts_with_their_question_and_right_answer() -> None:
    items = task_items(Words(), 9, 200, seed=1)
    made = texts(Words(), items)
    assert len(made) == 9
    for text, item in zip(made, items, strict=True):
        assert len(text.context) == len(item.context.split()) + 1 <= 200
        assert text.rest == [len(word) for word in f"{item.question} {item.answer}".split()]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"policy": "exact"}, "must be an eviction policy with a budget in tokens"),
        ({"policy": "window@25%"}, "must be an eviction policy with a budget in tokens"),
        ({"policy": "nothing@64"}, "unknown policy"),
        ({"name": "/nowhere"}, "no model at"),
        ({"out": "no/k.safetensors"}, "its folder does not exist"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path: Path, changed: dict[str, str], said: str) -> None:
    given = {"name": "builtin", "policy": "window@64", "out": "k.safetensors"} | changed
    with pytest.raises(ValueError, match=said):
        run(given["name"], given["policy"], tmp_path / given["out"], None, 0, SMALL, print)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("samples", 1), ("lr", 0.0), ("dropout", 1.0), ("seed", -1)])
def test_an_impossible_recipe_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"train-less: {name} must"):
        Recipe(**{name: value})
