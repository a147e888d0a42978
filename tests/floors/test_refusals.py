"""Arguments out of their domain are refused by name, by every floor and every formula."""

import inspect
import math
import re

import pytest

from kvfloor import floors
from kvfloor.floors import upper

FLOORS = {
    floors.space: {"n": 64, "d": 8},
    floors.metric_space: {"n": 64, "d": 8, "metric": "max", "epsilon": 0.1},
    floors.additive_space: {"n": 64, "d": 8, "epsilon": 0.1},
    floors.tensor_space: {"n": 8, "d": 8},
    floors.visual_space: {"n": 8, "d": 8},
}
NUMBER, SHARE, POSITIVE = "a whole number >= 1", r"in \(0, 1\]", "a positive number"
WRONG = {
    "n": (NUMBER, [0, 2.5, True]),
    "d": (NUMBER, [0]),
    "dv": (NUMBER, [0, -1]),
    "window": (NUMBER, [0]),
    "heads": (NUMBER, [0]),
    "layers": (NUMBER, [0]),
    "p": (SHARE, [0.0, 2.0]),
    "radius": (POSITIVE, [0.0, -1.0]),
    "eta": (r"in \[0, 1\)", [1.0, math.nan, "half"]),
}


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.__name__)
def test_every_floor_names_the_argument(floor):
    shared = WRONG.keys() & inspect.signature(floor).parameters.keys()
    assert len(shared) >= 7
    for name in shared:
        allowed, values = WRONG[name]
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name} must (be|lie) {allowed}, got {re.escape(repr(value))}"):
                floor(**(FLOORS[floor] | {name: value}))


@pytest.mark.parametrize(
    ("floor", "changed", "message"),
    [
        (floors.metric_space, {"metric": "l1"}, "metric must be one of max, frobenius, operator, got 'l1'"),
        (floors.metric_space, {"epsilon": -0.1}, r"epsilon must lie in \[0, inf\), got -0.1"),
        (floors.metric_space, {"epsilon": math.inf}, r"epsilon must lie in \[0, inf\), got inf"),
        (floors.metric_space, {"norm": 20.0}, "norm belongs to metric='operator', got norm=20.0 with metric='max'"),
        (
            floors.metric_space,
            {"norm": 7.0, "metric": "operator"},
            "norm must be at least 8, as that of any 64 x 8 sign matrix is, got 7.0",
        ),
        (floors.tensor_space, {"caches": 3}, r"caches must be 4 .* or 2 .*, got 3"),
        (floors.visual_space, {"ratio": 1.0}, r"ratio must lie in \(1, inf\), got 1.0"),
        (floors.visual_space, {"sides": ()}, r"sides must hold|sides must ascend and end in n = 8, got \(\)"),
        (floors.visual_space, {"sides": (1, 4)}, r"sides must ascend and end in n = 8, got \(1, 4\)"),
        (floors.visual_space, {"sides": (4, 1, 8)}, r"sides must ascend and end in n = 8, got \(4, 1, 8\)"),
        (floors.visual_space, {"sides": (0, 8)}, "side must be a whole number >= 1, got 0"),
    ],
)
def test_arguments_of_one_floor_are_named(floor, changed, message):
    with pytest.raises(ValueError, match=message):
        floor(**(FLOORS[floor] | changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            case
            for count in (floors.covering_balls, floors.clusters, floors.greedy_centres)
            for case in (
                (lambda count=count: count(0.0, 3), r"delta must be a positive number, got 0.0"),
                (lambda count=count: count(0.5, 0), "d must be a whole number >= 1, got 0"),
            )
        ),
        (lambda: floors.wrong_share("max", 0.1, 5, 5, -1), r"leak must lie in \[0, inf\], got -1"),
        (lambda: floors.sign_norm(0, 5), "m must be a whole number >= 1, got 0"),
        (lambda: floors.ball_bits(5, -1), "wrong must be a whole number >= 0, got -1"),
        (lambda: floors.noisy_row_bits(5, 5, 2, 1), r"p must lie in \(0, 1\], got 2"),
        (lambda: floors.separable_keys(4, 1.0, 0.0), r"ratio must lie in \(0, 1\), got 0.0"),
        (lambda: floors.separable_keys(4, 0.0, 0.5), "r must be a positive number, got 0.0"),
        (lambda: floors.separable_keys(0, 1.0, 0.5), "d must be a whole number >= 1, got 0"),
        (lambda: floors.subgen_s(0, 0.5, 0.1), "dv must be a whole number >= 1, got 0"),
        (lambda: floors.subgen_s(8, 1.5, 0.1), r"epsilon must lie in \(0, 1\], got 1.5"),
        (lambda: floors.subgen_s(8, 0.5, 1.0), r"failure must lie in \(0, 1\), got 1.0"),
        (lambda: floors.subgen_s(8, 0.5, 0.1, norm="max"), "norm must be one of operator, frobenius, got 'max'"),
        (lambda: floors.subgen_t(0.0, 1.0, 0.5, 0.1), "delta must be a positive number, got 0.0"),
        (lambda: floors.subgen_t(1.0, 0.0, 0.5, 0.1), "r must be a positive number, got 0.0"),
        (lambda: floors.subgen_t(1.0, 1.0, 0.5, 0.1, centres=0), r"centres must lie in \[1, inf\], got 0"),
        (lambda: floors.subgen_numbers(8, 8, 0, 1, 1), "s must be a whole number >= 1, got 0"),
        (lambda: floors.subgen_numbers(8, 8, 1, 0, 1), "t must be a whole number >= 1, got 0"),
        (lambda: floors.subgen_numbers(8, 8, 1, 1, 0), "centres must be a whole number >= 1, got 0"),
        (lambda: floors.subgen_plan(0, 8, 8, 0.5, 1.0, 0.1), "n must be a whole number >= 1, got 0"),
        (lambda: floors.lazy_gumbel_tokens(0), "n must be a whole number >= 1, got 0"),
        (lambda: floors.taylor_degree(0.0, 0.5), r"r must lie in \(0, 1e\+06\], got 0.0"),
        (lambda: floors.taylor_degree(1.0, 0.0), "error must be a positive number, got 0.0"),
        (lambda: floors.taylor_numbers(3, 3, -1), "g must be a whole number >= 0, got -1"),
        (lambda: floors.taylor_numbers(0, 3, 1), "d must be a whole number >= 1, got 0"),
        (lambda: floors.taylor_numbers(3, 0, 1), "dv must be a whole number >= 1, got 0"),
        (lambda: floors.tensor_C(8, 0.0, 0.1), "g must be a positive number"),
        (lambda: floors.tensor_C(8, 0.5, 0.0), "eps_s must lie in"),
        (lambda: floors.mu_tensor(0, 8), "n must be a whole number"),
        (lambda: floors.time_probes(0), "n must be a whole number >= 1, got 0"),
        (lambda: floors.time_probes(9, 0.0), r"p must lie in \(0, 1\], got 0.0"),
        (lambda: floors.time_probes(9, 0.9, eta=1.0), r"eta must lie in \[0, 1\), got 1.0"),
        (lambda: floors.time_operations(9, 0), "d must be a whole number >= 1, got 0"),
        (lambda: floors.probing_success(-1, 9), r"T must lie in \[0, inf\], got -1"),
        (lambda: floors.probing_success(3, 1), "n must be a whole number >= 2, got 1"),
        (lambda: floors.visual_C(8, 0, 0.5, 0.1), "asking must be a whole number >= 1, got 0"),
        (lambda: floors.visual_rows(()), "sides must hold the side of at least one map, got none"),
        (lambda: upper.exact_bytes(8, 8, 8, "fp64"), "dtype must be one of fp32, fp16, bf16, got 'fp64'"),
        (lambda: upper.exact_bytes(-1, 8, 8), "tokens must be a whole number >= 0, got -1"),
        (lambda: upper.running_sum_numbers(0, 8, 8), "W must be a whole number >= 1, got 0"),
    ],
)
def test_every_formula_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
