"""The game itself: what each side is given, and when; what is certified against what is known."""

import dataclasses
import json
import math
import secrets

import pytest
import torch

import kvfloor
from kvfloor import floors
from kvfloor.game import BARRIERS, INSTANCES, Instance, play, play_all
from kvfloor.game.engine import play as game
from kvfloor.game.engine import secret as hidden
from kvfloor.game.engine.instance import agreed, derived_seed
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import spike

METHODS = [
    "exact", "window@32", "sinks(4)@32", "random@32", "h2o(recent=8)@32", "window+value_sum@32",
    "subgen_sketch(delta=0.5,t=4,s=64)", "quant(bits=4)", "quant(bits=8)", "exact|top_k(k=16)",
]  # fmt: skip
SMALL = {"n": 64, "d": 32, "isolated": False}


def seen_by_bob(monkeypatch, **arguments):
    """The request that a fresh process would get, and the instance and hidden half that it belongs to."""
    seen = {}

    def stop(request, message, shape):
        seen.update(json.loads(json.dumps(request)))
        return None, "stop"

    monkeypatch.setattr(game, "_ask_fresh_process", stop)
    play("exact", **arguments)
    return seen


# ---- the literal game: a fresh process ------------------------------------------------------------------------------


def test_exact_certifies_all_hidden_bits():
    result = play("exact", n=1024, d=64)
    assert result.hidden_bits == 65_536
    assert 0.99 * 65_536 < result.certified_bits <= 8 * result.message_bytes
    assert result.certified_bits == pytest.approx(65_536 - math.log2(4) - 20)
    assert (result.verdict, result.bit_error, result.row_success) == ("holds", 0.0, 1.0)
    assert result.floor_bits == floors.space(1024, 64, values="binary").bits
    json.dumps(result.as_dict(), allow_nan=False)


LITERAL = {
    "tensor": ("sinks(4)@32", {}),
}
MORE_LITERAL = {
    "spike": ("h2o(recent=8)@32", {"heads": 2, "rows": 40, "bits": 8}),
    "codebook": ("window@32", {"codebook": 128, "barrier": "spike"}),
    "packing": ("random@32", {"d": 4}),
    "sparse": ("h2o(recent=8)@32", {"dtype": "bfloat16"}),
    "window": ("window(block=1)@16", {"append": True}),
    "probing": ("subgen_sketch(delta=0.5,t=4,s=64)", {}),
    "visual": ("quant(bits=4)", {"sides": (2, 3)}),
    "two caches": ("window@32", {"barrier": "tensor", "caches": 2}),
    "optimum": ("optimum", {"barrier": "spike", "bits": 3, "n": 63}),
}


def require_equal_games(text, arguments, barrier):
    arguments = {"n": 64, "d": 32, "barrier": barrier, "hidden_seed": 5} | arguments
    fresh, here = (
        dataclasses.replace(play(text, **arguments, isolated=isolated), seconds=0.0) for isolated in (True, False)
    )
    assert fresh == here
    assert fresh.verdict != "cheats", fresh.why


@pytest.mark.parametrize("barrier", LITERAL)
def test_a_fresh_process_answers_as_this_one_does(barrier):
    require_equal_games(*LITERAL[barrier], barrier)


@pytest.mark.slow
@pytest.mark.parametrize("barrier", MORE_LITERAL)
def test_a_fresh_process_answers_as_this_one_does_in_every_game(barrier):
    require_equal_games(*MORE_LITERAL[barrier], barrier)


# ---- what each side is given ----------------------------------------------------------------------------------------

COMMON = {"d", "dv", "bits", "eta", "key_seed", "method_seed", "dtype", "copies"}
GIVEN = {
    "spike": ({}, {"n", "public"}),
    "codebook": ({"barrier": "spike", "codebook": 64}, {"n", "public", "codebook"}),
    "packing": ({"d": 8}, {"m", "repeats", "radius", "public"}),
    "sparse": ({}, {"n", "public"}),
    "window": ({}, {"n", "window", "append", "public"}),
    "probing": ({}, {"n"}),
    "tensor": ({}, {"n"}),
    "two caches": ({"barrier": "tensor", "caches": 2}, {"n"}),
    "visual": ({}, {"sides", "public"}),
}


@pytest.mark.parametrize("barrier", GIVEN)
def test_the_method_and_bob_are_given_nothing_that_tells_the_hidden_values(monkeypatch, barrier):
    seed, (arguments, own) = 987_654_321, GIVEN[barrier]
    seen = seen_by_bob(
        monkeypatch, **({"n": 32, "d": 32, "barrier": barrier, "seed": seed, "hidden_seed": seed} | arguments)
    )
    assert set(seen) == {"method", "code_path", "kind", "instance", "threads", "environment", "rows"}
    assert set(seen["instance"]) == COMMON | own
    assert str(seed) not in json.dumps(seen)
    assert (seen["code_path"], seen["rows"]) == ([], None)

    assert not tells(seen, seed)


def tells(seen, hidden_seed):
    """Whether a number of the request, or a seed derived from one, repeats the hidden values or places."""
    instance = INSTANCES[seen["kind"]](**seen["instance"])
    rows, truth = instance.copies * instance.rows, Hidden(hidden_seed)
    fields = [*seen["instance"].values(), *seen["instance"].get("public", {}).values()]
    public = [value for value in fields if isinstance(value, int | float | str)]
    derived = [derived_seed(purpose, known) for known in public for purpose in ("keys", "method", "values", "hidden")]
    return any(
        torch.equal(Hidden(known).levels(rows, 16, 1), truth.levels(rows, 16, 1))
        or torch.equal(Hidden(known).places(2**40, 4), truth.places(2**40, 4))
        for known in [*public, *derived]
    )


def test_the_public_seeds_do_not_tell_the_runs_seed_and_differ_from_each_other():
    shared = [agreed(d=4, dv=None, bits=1, eta=0.5, seed=seed) for seed in range(50)]
    seeds = [entry[name] for entry in shared for name in ("key_seed", "method_seed")]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sum(seed < 2**32 for seed in seeds) == 0


@pytest.mark.parametrize("barrier", GIVEN)
def test_bob_rebuilds_the_same_instance_from_plain_json(monkeypatch, barrier):
    kept = []
    feed = Instance.feed
    monkeypatch.setattr(Instance, "feed", lambda self, *given: kept.append(self) or feed(self, *given))
    seen = seen_by_bob(monkeypatch, **({"n": 32, "d": 32, "barrier": barrier} | GIVEN[barrier][0]))
    assert INSTANCES[seen["kind"]](**seen["instance"]) == kept[0]


def test_hidden_values_that_follow_from_a_public_seed_would_be_noticed(monkeypatch):
    shared = agreed(d=1, dv=1, bits=1, eta=0.5, seed=0)
    for leak in (shared["method_seed"], shared["key_seed"], derived_seed("values", shared["key_seed"])):
        assert tells(seen_by_bob(monkeypatch, n=32, d=32, hidden_seed=leak), leak)


def test_rows_are_drawn_once_the_message_is_fixed(monkeypatch):
    order = []
    to_bytes, rows = kvfloor.State.to_bytes, Hidden.rows
    monkeypatch.setattr(kvfloor.State, "to_bytes", lambda self: order.append("message") or to_bytes(self))
    monkeypatch.setattr(Hidden, "rows", lambda self, *size: order.append("rows") or rows(self, *size))
    play("window@16", rows=20, bits=1, **SMALL)
    assert order == ["message", "rows"]


def test_bobs_request_is_fixed_before_the_first_value_is_streamed(monkeypatch):
    order = []
    request, levels = game._request, Hidden.levels
    monkeypatch.setattr(game, "_request", lambda *given: order.append("request") or request(*given))
    monkeypatch.setattr(Hidden, "levels", lambda self, *size: order.append("values") or levels(self, *size))
    play("window@16", bits=1, **SMALL)
    assert order == ["request", "values"]


# ---- what is certified ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_no_method_certifies_more_than_its_message_holds(text, bits):
    for seed in range(2):
        result = play(text, n=96, d=32, bits=bits, seed=seed, isolated=False)
        assert max(result.certified_bits, result.live_certified_bits) <= 8 * result.message_bytes
        assert result.live_certified_bits <= 8 * result.state_bytes
        assert result.verdict != "cheats", result.why


def test_a_mutant_that_measures_the_message_without_its_payload_is_rejected(monkeypatch):
    play_index = spike.play_index

    def headers_only(*given, **named):
        played = play_index(*given, **named)
        return dataclasses.replace(played, message_bytes=played.message_bytes - played.payload_bytes)

    assert play("exact", bits=8, **SMALL).verdict == "holds"
    monkeypatch.setattr(spike, "play_index", headers_only)
    result = play("exact", bits=8, **SMALL)
    assert result.verdict == "cheats"
    assert "the message holds" in result.why


def test_payload_and_header_make_up_the_message():
    """What crossed besides tensors: magic, lengths, a JSON header and a digest, a few hundred bytes."""
    result = play("exact", **SMALL)
    assert result.payload_bytes == 64 * (32 + 32) * 4 + 64 * 8 + 8 + 8 + 8  # k, v, positions; seen, held, capacity
    assert 100 < result.message_bytes - result.payload_bytes < 1000


def test_sampled_rows_certify_less_and_never_more():
    whole, sampled = (play("exact", n=512, d=32, rows=rows, isolated=False) for rows in (None, 200))
    assert sampled.rows_asked == 200
    assert sampled.certificate == "sampled rows"
    assert 0.8 * whole.certified_bits < sampled.certified_bits < whole.certified_bits
    assert play("exact", rows=64, **SMALL).certificate != "sampled rows"


def test_a_hidden_seed_repeats_the_run_and_by_default_it_is_fresh(monkeypatch):
    monkeypatch.setattr(hidden, "secrets", secrets)

    def run(**changed):
        return dataclasses.replace(play("random@16", **SMALL, **changed), seconds=0.0)

    assert run(hidden_seed=3) == run(hidden_seed=3)
    assert run(hidden_seed=3) != run(hidden_seed=4)
    fresh = run()
    assert fresh.hidden_seed != run().hidden_seed
    assert run(hidden_seed=fresh.hidden_seed) == fresh


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", sorted(set(BARRIERS) - {"spike"}))
def test_only_the_spike_has_a_known_optimum(barrier):
    with pytest.raises(ValueError, match=f"barrier '{barrier}' has no known optimum to play; give a method"):
        play("optimum", barrier=barrier, n=32, d=32, isolated=False)


def test_a_method_that_text_cannot_rebuild_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Local(kvfloor.Exact):
        name = "local"

    with pytest.raises(ValueError, match="cannot be rebuilt from text in a fresh process"):
        play(Local(), n=16, d=16)


def test_all_barriers_are_played_with_the_arguments_that_each_takes():
    results = play_all("window@16", n=64, d=32, radius=20.0, window=32, dtype="float16", isolated=False)
    assert [result.barrier for result in results] == list(BARRIERS)
    by_name = {result.barrier: result for result in results}
    assert by_name["packing"].details["radius"] == 20.0
    assert by_name["window"].details["window"] == 32
    for result in results:
        json.dumps(result.as_dict(), allow_nan=False)
        assert result.verdict != "cheats", result.why
    with pytest.raises(ValueError, match=r"no barrier takes budget; they take .*window"):
        play_all("exact", budget=3)


def test_playing_all_barriers_caps_n_where_a_barrier_cannot_be_large(monkeypatch):
    sizes = {}
    for name, barrier in BARRIERS.items():

        def noted(method, *, n=1024, name=name):
            sizes[name] = n

        monkeypatch.setitem(BARRIERS, name, dataclasses.replace(barrier, play=noted))
    play_all("exact", n=10**6)
    assert sizes == {name: min(10**6, barrier.most) for name, barrier in BARRIERS.items()}
    assert sizes["tensor"] == 1024
