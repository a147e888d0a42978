"""The suite as a user meets it: outcomes, reasons, errors, and the yardsticks behind the laws."""

import ast
import json
from pathlib import Path

import pytest
import torch
from mutants.tokens import OneTooMany

import kvfloor.check
from kvfloor import Spec, check_method, parse
from kvfloor.check import CHECKS, Broken, Setting, run_checks
from kvfloor.check.plain_attention import attention
from kvfloor.check.storage import storages
from kvfloor.check.streams import play, probes, small_pieces, spec_for, stream_for, tokens_of
from kvfloor.check.tolerance import AGREE, apart, require_accuracy
from kvfloor.check.turning import check_turns


def test_the_outcome_lists_every_law_once_and_is_json() -> None:
    plain = json.loads(json.dumps(run_checks(parse("quant"), dtypes=(torch.float32,), groups=(1,)).as_dict()))
    assert list(plain) == ["method", "passed", "failed", "skipped"]
    assert plain["method"] == "quant" and plain["failed"] == []
    assert sorted(plain["passed"] + [skip["check"] for skip in plain["skipped"]]) == sorted(CHECKS)
    reasons = {skip["check"]: skip["why"] for skip in plain["skipped"]}
    assert reasons["hull"] == "it does not claim normalised"


def test_check_method_raises_with_the_broken_law() -> None:
    with pytest.raises(Broken, match=r"breaks 1 of its laws\n- capacity: after 24 tokens row 0 holds 15"):
        check_method(OneTooMany(), dtypes=(torch.float32,), groups=(1,))


def test_check_method_returns_nothing_where_all_laws_hold() -> None:
    assert check_method(parse("window(block=4)@16"), dtypes=(torch.float32,), groups=(1,)) is None


def test_a_method_that_cannot_be_opened_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match="has no budget"):
        run_checks(parse("window"))


def test_every_law_is_one_sentence() -> None:
    for check in CHECKS.values():
        assert check.law.endswith(".") and len(check.law) < 120, check.name


def test_no_verdict_rests_on_an_assert_statement_which_python_o_would_drop() -> None:
    for file in Path(kvfloor.check.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        assert not any(isinstance(node, ast.Assert) for node in nodes), file.name


def test_apart_counts_nan_as_infinitely_far_and_equal_infinities_as_equal() -> None:
    minus = torch.tensor([-torch.inf, 1.0])
    assert apart(minus, minus) == 0.0
    assert apart(minus, torch.tensor([-torch.inf, 1.5])) == 0.5
    assert apart(minus, torch.tensor([0.0, 1.0])) == float("inf")
    assert apart(torch.tensor([torch.nan]), torch.tensor([1.0])) == float("inf")


def test_accuracy_is_measured_against_plain_attention_in_the_same_dtype() -> None:
    truth, plain = torch.zeros(1, dtype=torch.float64), torch.tensor([0.01])
    require_accuracy(torch.tensor([0.0149]), truth, plain, torch.float32, "an answer")
    with pytest.raises(Broken, match="the error is"):
        require_accuracy(torch.tensor([0.0151]), truth, plain, torch.float32, "an answer")


@pytest.mark.parametrize(("dtype", "size", "allowed"), [
    (torch.float16, 5.0, 5 * 2.0**-11), (torch.bfloat16, 5.0, 5 * 2.0**-8), (torch.float16, 0.5, 2.0**-11),
    (torch.float32, 5.0, 1e-6),
])  # fmt: skip
def test_where_plain_attention_is_exact_a_rounding_is_allowed(dtype: torch.dtype, size: float, allowed: float) -> None:
    truth = torch.tensor([size], dtype=torch.float64)
    require_accuracy(truth + 0.99 * allowed, truth, truth, dtype, "a log-mass")
    with pytest.raises(Broken, match="the error is"):
        require_accuracy(truth + 1.01 * allowed, truth, truth, dtype, "a log-mass")


def test_a_log_mass_is_not_held_to_plain_attention_that_is_exact_by_chance() -> None:
    check_turns(parse("h2o(block=1,recent=4)@16"), Setting(torch.float16, 4, seed=1))


def test_the_oracle_gives_tokens_of_logit_zero_their_weight() -> None:
    spec = Spec(rows=1, d=2, dv=1)
    q, k, v = torch.zeros(1, 2), torch.randn(3, 2), torch.ones(3, 1)
    mean, log_mass = attention(q, k, v, spec, zero_logits=torch.full((1, 1), 5.0))
    assert torch.allclose(mean, torch.tensor([[2.0]]))
    assert torch.allclose(log_mass.exp(), torch.tensor([4.0]))


def test_storages_counts_a_shared_storage_once_and_finds_what_containers_hold() -> None:
    state = parse("window(block=4)@16").open(spec_for(parse("window@16"), Setting()))
    before, _ = storages(state)
    kept = torch.zeros(100)
    state.__dict__["notes"] = {"deep": [kept, kept[:10], (kept[5:],)]}
    after, others = storages(state)
    assert sum(after.values()) - sum(before.values()) == 400
    assert others > 0


def test_streams_overflow_the_bound_and_end_inside_a_block() -> None:
    for text in ("window@64", "h2o(prefill=dense)@64", "random(block=1)@32", "exact"):
        method = parse(text)
        stream, bound = stream_for(method, Setting()), method.capacity(1 << 20, prompt=0)
        assert stream.prompt > (bound or 0) and stream.n > stream.prompt
        assert stream.prompt % 32 and stream.n % 32


def test_tokens_of_gives_held_tokens_by_age() -> None:
    method = parse("sinks(count=2,block=4)@8")
    state, stream = method.open(spec_for(method, Setting())), stream_for(method, Setting())
    play(state, stream, cuts=small_pieces(stream.n))
    assert state.slots is not None
    for row, tokens in enumerate(tokens_of(state)):
        position = tokens.position.tolist()
        assert position[:2] == [0, 1] and position == sorted(position) and position[-1] == stream.n - 1
        assert torch.equal(tokens.k, stream.k[row, position])


def test_probes_belong_to_the_seed() -> None:
    one, two = (probes(Spec(rows=1, d=4, dv=4, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one, two)


def test_tolerances_do_not_grow_unnoticed() -> None:
    pinned = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
    assert pinned == AGREE


def test_what_is_drawn_or_truncated_is_not_held_to_exact_answers_and_what_claims_no_error_is() -> None:
    claims = CHECKS["attends_to_held"].not_claimed
    for text in ("window+value_sum@16", "window+value_sum|top_k(k=4)@16", "window@16", "h2o@64"):
        assert claims(parse(text)) is None, text
    for text in ("window+value_sample@16", "window_sample@16", "window+moments@16", "window+taylor(radius=0.1)@16"):
        assert "does not state that they answer without error" in str(claims(parse(text))), text


def test_a_trained_method_is_tried_at_the_width_and_places_it_was_trained_for() -> None:
    spec = spec_for(parse("sinks(4)+less(kernels=builtin)@40"), Setting())
    assert spec.d == 64 and spec.places == ((0, 0), (0, 1), (1, 0))
    assert spec_for(parse("sinks(4)+less@40"), Setting()).places is None
