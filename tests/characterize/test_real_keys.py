"""Recorded keys are those that the model's own attention weighs; measures on them equal their definitions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from characterize import (
    allocation_error,
    attention_spread,
    balance_vs_uniform,
    early_tokens,
    isolated_needle,
    subgen_bound,
    summary_error,
    taylor_error,
)
from characterize.attention_spread import correlation
from characterize.lib import real_keys
from characterize.lib.mass import effective_keys, keys_for_mass, mass_of, softmax_weights
from characterize.lib.real_keys import RealKeys, Streams, after, chosen, spaced
from characterize.lib.recall import share_of_best
from characterize.lib.table import ResultTable, median_interval
from kvfloor import Spec, parse
from kvfloor.audit.texts import text_of
from kvfloor.models import load
from tests.support import seeded

N, TEXT = 96, "mixture-1"
TINY = RealKeys("tiny", "builtin", ("mixture-0", TEXT), 64, N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record two short texts with the built-in model, once."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_keys, "cache_folder", lambda: path)
        list(TINY.streams())
    return path


@pytest.fixture
def tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RealKeys:
    monkeypatch.setattr(real_keys, "cache_folder", lambda: folder)
    monkeypatch.setattr(real_keys, "record", None)  # what is on the disk is not recorded again
    return TINY


def drawn(seed: int, rows: int = 2, g: int = 3, n: int = 40, d: int = 8) -> Streams:
    draw = seeded(seed)
    return Streams(draw(rows, g, n, d), draw(rows, n, d), draw(rows, n, d), d**-0.5)


# ---- recording -------------------------------------------------------------------------------------------------


def test_recorded_streams_give_the_models_own_attention_weights(tiny: RealKeys) -> None:
    """The oracle is transformers' eager attention over the whole text, with its own cache of keys and values."""
    model, tokenizer = load("builtin")
    model.set_attn_implementation("eager")
    ids = torch.tensor([tokenizer(text_of(TEXT, N)).input_ids[:N]])
    with torch.inference_mode():
        out = model(ids, output_attentions=True, use_cache=True)
    parts = [part for part in tiny.streams() if part.texts[0] == TEXT]
    assert [part.places[0][0] for part in parts] == [0, 1, 2, 3]
    for part, weights, layer in zip(parts, out.attentions, out.past_key_values.layers, strict=True):
        n = part.k.shape[1]
        assert n == 64 and part.q.shape == (2, 2, n, 64)
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        found = (part.scale * part.q @ part.k.mT.unsqueeze(1)).masked_fill(later, -torch.inf).softmax(-1)
        wanted = weights[0, :, :n, :n]
        torch.testing.assert_close(found.flatten(0, 1), wanted, rtol=1e-4, atol=1e-5)
        assert float((found.transpose(0, 1).flatten(0, 1) - wanted).abs().max()) > 0.01  # not group by group
        torch.testing.assert_close(part.v, layer.values[0, :, :n], rtol=1e-4, atol=1e-5)


def test_all_rows_together_are_the_parts_in_order(tiny: RealKeys) -> None:
    whole, parts = tiny.together(2), list(tiny.streams(2))
    assert whole.places == ((0, 0), (0, 1), (3, 0), (3, 1)) * 2
    assert whole.texts == ("mixture-0",) * 4 + (TEXT,) * 4
    assert torch.equal(whole.v[4:6], parts[2].v) and not torch.equal(whole.v[:2], whole.v[4:6])
    assert whole.spec(seed=3) == Spec(8, 64, 64, 0.125, places=whole.places, seed=3)


def test_asked_queries_come_after_all_their_keys() -> None:
    one = drawn(0, n=5)
    q, k, v = one.asked(2)
    assert k.shape[1] == v.shape[1] == 3 and torch.equal(k, one.k[:, :3])
    assert torch.equal(q, torch.stack([one.q[:, h, i] for h in range(3) for i in (3, 4)], 1))


@pytest.mark.parametrize(("count", "wanted", "found"), [(4, 9, [0, 1, 2, 3]), (30, 4, [0, 10, 19, 29]), (5, 1, [0])])
def test_layers_are_spaced_from_the_first_to_the_last(count: int, wanted: int, found: list[int]) -> None:
    assert spaced(count, wanted) == found


def test_unknown_keys_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--keys", "synthetic,mine"])
    with pytest.raises(SystemExit):
        chosen("Measure.")
    assert "no keys 'mine'; give some of synthetic, built-in 2k" in capsys.readouterr().err


# ---- tables ----------------------------------------------------------------------------------------------------


def test_a_table_keeps_the_rows_of_sources_that_were_not_measured(tmp_path: Path) -> None:
    script, order = str(tmp_path / "some.py"), ("a", "b", "c")
    for name, value in (("b", 1.0), ("a", 2.0), ("b", 3.0)):
        table = ResultTable(script, ("keys", "value"), (name,), order)
        table.add(name, value)
        table.save()
    assert (tmp_path / "some.tsv").read_text() == "keys\tvalue\na\t2\nb\t3\n"
    with pytest.raises(ValueError, match="tsv has the fields"):
        ResultTable(script, ("keys", "other"), ("a",), order)
    ResultTable(script, ("keys", "other"), order, order)


def test_the_median_lies_in_its_interval_which_shrinks_with_the_root_of_n() -> None:
    few, many = (median_interval(seeded(1)(n).tolist()) for n in (40, 4000))
    assert few[1] < few[0] < few[2] and many[1] < 0.0 < many[2]
    assert 5 < (few[2] - few[1]) / (many[2] - many[1]) < 20


# ---- measures --------------------------------------------------------------------------------------------------


def test_keys_that_carry_a_mass_are_counted() -> None:
    weights = torch.tensor([[0.1, 0.5, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert keys_for_mass(weights, 0.85).tolist() == [2, 4, 1]
    assert keys_for_mass(weights, 1.0).tolist() == [3, 4, 1]
    torch.testing.assert_close(effective_keys(weights)[1:], torch.tensor([4.0, 1.0], dtype=torch.float64))


def test_shares_and_mass_of_what_is_read_equal_plain_loops() -> None:
    one = drawn(2, g=1)
    q, k, _ = one.asked(5)
    read = seeded(3)(2, 5, 35) > 0.3
    for row in range(2):
        for i in range(5):
            logits = torch.stack([q[row, i] @ key for key in k[row]])
            best = logits.argsort(descending=True)[:7].tolist()
            wanted = sum(bool(read[row, i, j]) for j in best) / 7
            assert float(share_of_best(read, q, k, 7)[row, i]) == pytest.approx(wanted)
            weights = torch.exp(one.scale * logits)
            mass = float(weights[read[row, i]].sum() / weights.sum())
            assert float(mass_of(read, q, k, one.scale)[row, i]) == pytest.approx(mass)


def test_rank_correlation_knows_order_and_ties() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, x**3) == pytest.approx(1.0) and correlation(x, -x) == pytest.approx(-1.0)
    tied = torch.tensor([1.0, 1.0, 2.0, 2.0])
    assert correlation(x, tied) == pytest.approx(0.8944, abs=1e-4)  # ranks 0, 1, 2, 3 and 0.5, 0.5, 2.5, 2.5


def test_the_polynomial_written_out_is_the_taylor_summarys_answer() -> None:
    """`window+taylor` keeps nothing exact once its one token is below all others; its error must be the same."""
    one = drawn(4, rows=1, g=2, d=3, n=60)
    q, k, v = one.asked(taylor_error.ASKED)
    exact = softmax_weights(q, k, one.scale) @ v
    state = parse("window(block=44)+taylor(degree=2)@1").open(Spec(1, 3, 3, one.scale, dtype=torch.float64))
    state.append(k, v)
    whole = state.read(q).mean
    kept = softmax_weights(q, k, one.scale)[..., -1:]
    taylor = taylor_error.polynomial(2, one.scale * q @ k.mT)
    mine = taylor.clone()
    mine[..., -1] = torch.exp(one.scale * q @ k[:, -1:].mT)[..., 0]  # the one token that the window keeps
    torch.testing.assert_close(mine @ v / mine.sum(-1, keepdim=True), whole, rtol=1e-9, atol=1e-12)
    assert float(kept.max()) < 0.5
    _, _, errors = taylor_error.on(one, "all", (2,))
    wrong = taylor @ v / taylor.sum(-1, keepdim=True) - exact
    assert errors[0] == pytest.approx([float((wrong.norm(dim=-1) / exact.norm(dim=-1)).median())])


@pytest.mark.parametrize("logits", taylor_error.LOGITS)
def test_what_is_approximated_is_exact_to_a_high_degree(logits: str) -> None:
    one = drawn(5, n=120)
    sizes, _, errors = taylor_error.on(one, logits, (0, 2, 30))
    assert max(sizes) < 8
    if logits == "dropped":
        assert errors[0] == errors[1] == errors[2] and min(errors[0]) > 0.01
    else:
        assert max(errors[2]) < 1e-8 < 0.001 < min(errors[0])


def test_centring_and_the_middle_make_logits_smaller() -> None:
    far = drawn(6, n=120)
    moved = Streams(far.q, far.k + 3.0, far.v, far.scale)
    plain, centred, middle = (max(taylor_error.on(moved, name, (2,))[0]) for name in ("evicted", "centred", "middle"))
    assert middle < centred < 0.8 * plain


def test_a_needle_is_an_old_token_with_half_of_the_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated_needle, "LAST", 10)
    one = drawn(7, rows=1, g=2, n=200)
    assert not bool(isolated_needle.needles(one).any())
    for key, found in ((100, True), (2, False), (170, False)):  # old; one of the first; one of the newest
        k = one.k.clone()
        k[0, key] = 40.0 * one.q[0, 1, 195]
        mask = isolated_needle.needles(Streams(one.q, k, one.v, one.scale))
        assert bool(mask[0, 1, 5]) == found


def test_early_tokens_are_counted_among_those_that_are_held() -> None:
    one = drawn(8, g=1, n=64)
    window = early_tokens.held(one, early_tokens.method("window", 8, 16), 8)
    assert window.sort(1).values.tolist() == [list(range(56, 64))] * 2
    k = one.k.clone()
    k[:, 3] = 50.0 * one.q[:, 0, 60]
    assert bool((early_tokens.wanted(Streams(one.q, k, one.v, one.scale), 8) == 3).any(1).all())


def test_subgens_error_lies_far_below_its_bound_and_falls_with_more_pairs() -> None:
    q, k, v = (x.float() for x in (drawn(9, rows=1).q[0, 0, :4], *(y[0] for y in (drawn(9).k, drawn(9).v))))
    few, many = (subgen_bound.measure(q, k, v, 0.3, (0.5, 2, s), 64) for s in (16, 1024))
    assert many.quantile < 0.5 * few.quantile < 0.5 * few.epsilon and 0 < few.clusters <= 1


def test_a_policy_that_learns_from_attention_is_given_the_queries() -> None:
    """Without queries `sinks` holds the same tokens, and `h2o` does not."""
    one = drawn(10, g=1, n=80)
    for text, same in (("sinks(4,block=4)@16", True), ("h2o(block=4)@16", False)):
        found = after(parse(text), one, 4)
        bare = parse(text).open(one.spec())
        bare.append(one.k[:, :-4], one.v[:, :-4])
        held, other = (state.slots.view().position for state in (found, bare))  # type: ignore[attr-defined]
        assert torch.equal(held, other) == same
        assert int(found.seen.min()) == 76


def test_errors_vanish_where_nothing_is_evicted_and_only_there() -> None:
    one = drawn(11, n=60)
    for budget, exact in ((200, True), (24, False)):
        errors = (
            attention_spread.error(one, budget),
            summary_error.error(f"sinks(4)@{budget}", one)[0],
            allocation_error.errors("sinks(4)", (budget, budget), one),
        )
        assert all(bool((error < 1e-9).all() if exact else (error > 0.01).all()) for error in errors)
    uneven = allocation_error.errors("sinks(4)", (200, 24), one)
    assert float(uneven[0]) < 1e-9 and float(uneven[1]) == pytest.approx(float(errors[2][1]))


def test_shares_have_mean_one_and_are_measured_on_another_text(tiny: RealKeys) -> None:
    by_text = allocation_error.shares_by_text(tiny)
    own = allocation_error.measured_shares([one for one in tiny.streams() if one.texts[0] == TEXT])
    ways = by_text["mixture-0"]
    assert ways["floor"] == own["floor"] and ways["keys95"] == own["keys95"] != by_text[TEXT]["keys95"]
    for line in ways.values():
        numbers = [share for layer in line for share in layer]
        assert sum(numbers) / len(numbers) == pytest.approx(1.0) and len(line) == 4
    assert ways["inverted"] == ways["pyramid"][::-1] and ways["pyramid"][0] > ways["mild"][0] > ways["even"][0]


def test_equal_sizes_of_samples_are_compared_stream_by_stream() -> None:
    one = drawn(12, n=132)
    q, k, v = (x.float() for x in one.asked(4))
    part = (q, k, v)
    same = list(balance_vs_uniform.compared("random(block=4)@40", "", [part, part]))  # the same draws
    assert len(same) == 2 and all(torch.allclose(mine, theirs) for mine, theirs, _ in same)
    ((mine, theirs, held),) = balance_vs_uniform.compared("random(block=4)@100", "random(block=4)@20", [part])
    assert held.tolist() == [100.0, 100.0] and float(mine.mean()) < float(theirs.mean())


def test_recordings_name_model_text_and_length(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "recorded").iterdir())
    assert names == [f"builtin-{text}-{N}.safetensors" for text in TINY.texts]
