"""The game itself: what is certified against what is known, and what each side is given."""

import dataclasses
import json
import math

import pytest
import torch

import kvfloor
from kvfloor import floors
from kvfloor.barriers import game, play
from kvfloor.barriers.instance import Hidden, Instance


@pytest.fixture
def bob_in_process(monkeypatch):
    """Bob without the start of an interpreter: still only the request and the message reach him."""

    def answer(request, message, shape):
        request = json.loads(json.dumps(request))
        method, instance = kvfloor.parse(request["method"]), Instance(**request["instance"])
        rows = torch.arange(instance.n) if request["rows"] is None else torch.tensor(request["rows"])
        return game.ask(method.from_bytes(message), instance.queries(instance.keys(), rows)[0]).view(shape), ""

    monkeypatch.setattr(game, "_ask_fresh_process", answer)


def test_exact_certifies_all_hidden_bits():
    result = play("exact", n=1024, d=64)
    assert result.hidden_bits == 65_536
    assert 0.99 * 65_536 < result.certified_bits <= 8 * result.message_bytes
    assert result.certified_bits == pytest.approx(65_536 - math.log2(3) - 20)
    assert (result.verdict, result.bit_error, result.row_success) == ("holds", 0.0, 1.0)
    assert result.floor_bits == floors.space(1024, 64).bits
    json.dumps(result.as_dict(), allow_nan=False)


def test_window_certifies_the_quarter_it_keeps():
    result = play("window@256", n=1024, d=64)
    assert result.certified_bits == pytest.approx(65_536 / 4, rel=0.01)
    assert result.certified_bits <= 65_536 / 4
    assert result.live_certified_bits == result.certified_bits
    assert (result.verdict, result.row_success) == ("breaks", 0.25)


METHODS = [
    "exact", "window@32", "sinks(4)@32", "random@32", "h2o(recent=8)@32", "window+value_sum@32",
    "subgen(delta=0.5,t=4,s=64)", "quant(bits=4)", "quant(bits=8)", "exact|top_k(k=16)",
]  # fmt: skip


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_no_method_certifies_more_than_its_message_holds(bob_in_process, text, bits):
    for seed in range(2):
        result = play(text, n=96, d=32, bits=bits, seed=seed)
        assert max(result.certified_bits, result.live_certified_bits) <= 8 * result.message_bytes
        assert result.live_certified_bits <= 8 * result.state_bytes
        assert result.verdict != "cheats", result.why


@pytest.mark.parametrize("kept", [16, 32, 64])
def test_certified_bits_follow_what_is_kept(bob_in_process, kept):
    result = play(f"window(block=1)@{kept}", n=128, d=64)
    assert result.certified_bits == pytest.approx(kept * 64 - math.log2(3) - 20, abs=8)


@pytest.mark.parametrize(("n", "d", "dv"), [(300, 2, 8), (100, 3, 5), (256, 8, 4), (2, 1, 64), (1, 1, 64), (50, 64, 1)])
def test_exact_holds_in_every_dimension(bob_in_process, n, d, dv):
    result = play("exact", n=n, d=d, dv=dv)
    assert (result.verdict, result.bit_error) == ("holds", 0.0)
    assert result.certified_bits >= max(0.0, n * dv - 22)
    json.dumps(result.as_dict(), allow_nan=False)


def test_fine_values_measure_the_precision_kept(bob_in_process):
    exact = play("exact", n=64, d=32, bits=16)
    coarse = play("quant(bits=4)", n=64, d=32, bits=8)
    assert exact.bit_error == 0.0
    assert coarse.verdict == "breaks"
    assert 2.5 * 64 * 32 < coarse.certified_bits < 4.5 * 64 * 32


def test_sampled_rows_certify_less_and_never_more(bob_in_process):
    whole, sampled = play("exact", n=512, d=32), play("exact", n=512, d=32, rows=200)
    assert sampled.rows_asked == 200
    assert sampled.certificate == "sampled rows"
    assert 0.8 * whole.certified_bits < sampled.certified_bits < whole.certified_bits
    assert play("exact", n=64, d=32, rows=64).certificate != "sampled rows"


def test_a_hidden_seed_repeats_the_run_and_by_default_it_is_fresh(bob_in_process):
    def run(**changed):
        return dataclasses.replace(play("random@16", n=64, d=32, **changed), seconds=0.0)

    assert run(hidden_seed=3) == run(hidden_seed=3)
    assert run(hidden_seed=3) != run(hidden_seed=4)
    fresh = run()
    assert fresh.hidden_seed != run().hidden_seed
    assert run(hidden_seed=fresh.hidden_seed) == fresh


def test_the_method_and_bob_are_given_nothing_that_tells_the_hidden_values(monkeypatch):
    seen = {}
    monkeypatch.setattr(game, "_ask_fresh_process", lambda request, *_: (seen.update(request) or None, "stop"))
    seed = 987_654_321
    play("exact", n=32, d=32, seed=seed, hidden_seed=seed)
    assert set(seen) == {"method", "code_path", "instance", "threads", "rows"}
    assert set(seen["instance"]) == {"n", "d", "dv", "bits", "eta", "family", "key_seed", "method_seed"}
    assert str(seed) not in json.dumps(seen)
    assert seen["code_path"] == []
    instance = Instance(**seen["instance"])
    shown = (instance.key_seed, instance.method_seed)
    values = Hidden(seed).levels(instance)
    assert all(not torch.equal(Hidden(known).levels(instance), values) for known in shown)


def test_hidden_values_are_uniform_and_fill_every_level():
    instance = Instance.agree(4096, 64, 16, 3, 0.5, 0, "chirp")
    counts = torch.bincount(Hidden(1).levels(instance).flatten(), minlength=8).double()
    expected = 4096 * 16 / 8
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_squared < 30  # 7 degrees of freedom: 1e-4
    rows = Hidden(1).rows(10, 5000)
    assert torch.bincount(rows, minlength=10).min() > 400


def test_bad_input_is_refused_by_name():
    for changed, message in (
        ({"bits": 0}, "bits must be a whole number of at least 1, got 0"),
        ({"bits": 17}, r"bits must lie in 1\.\.16, got 17"),
        ({"eta": 1.0}, r"eta must lie in \[0, 1\)"),
        ({"n": 0}, "n must be"),
        ({"rows": 0}, "rows must be"),
        ({"seed": -1}, "seed must be"),
        ({"family": "golden"}, "family must be one of chirp, .*, got 'golden'"),
        ({"family": "jl", "d": 16, "n": 1024}, "its theorem needs d >= 9242"),
        ({"d": 1, "n": 5}, "no family has n=5 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            play("exact", **({"n": 16, "d": 8} | changed))
    with pytest.raises(ValueError, match="barrier must be one of spike, got 'wall'"):
        play("exact", barrier="wall")


def test_a_method_that_text_cannot_rebuild_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Local(kvfloor.Exact):
        name = "local"

    with pytest.raises(ValueError, match="cannot be rebuilt from text in a fresh process"):
        play(Local(), n=16, d=16)


def test_rows_are_drawn_once_the_message_is_fixed(bob_in_process, monkeypatch):
    order = []
    to_bytes, rows = kvfloor.State.to_bytes, Hidden.rows
    monkeypatch.setattr(kvfloor.State, "to_bytes", lambda self: order.append("message") or to_bytes(self))
    monkeypatch.setattr(Hidden, "rows", lambda self, *size: order.append("rows") or rows(self, *size))
    play("window@16", n=64, d=32, rows=20)
    assert order == ["message", "rows"]
