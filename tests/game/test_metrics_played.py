"""The spike under additive and l2 errors: the floor that is claimed is played, and no message certifies too much."""

import dataclasses
import math

import pytest
import torch

from kvfloor import floors
from kvfloor.floors.levels import number_format
from kvfloor.game import INSTANCES, play
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.level_answers import AdditiveTable, judge_levels
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import norms
from kvfloor.game.instances.norms import LEAK, NormSpike, judge_norm

PAYMENT = 24.0  # for chance, the best of four certificates, and the likelier half of matrices
CASES = [("max", 0.5), ("max", 0.05), ("frobenius", 0.2), ("frobenius", 0.05), ("operator", 0.2), ("operator", 0.05)]


def point_game(metric: str = "max", radius: float = 0.3, n: int = 64, dv: int = 16) -> NormSpike:
    shared = agreed(d=32, dv=dv, bits=1, eta=0.1, seed=0)
    return NormSpike(**shared, n=n, public=keys_for(shared, n), metric=metric, values="fp16", width=dv, radius=radius)


def sign_game(wrong: int, n: int = 64, width: int = 16, dv: int = 16, metric: str = "max") -> NormSpike:
    shared = agreed(d=32, dv=dv, bits=1, eta=0.1, seed=0)
    keys = keys_for(shared, n)
    return NormSpike(**shared, n=n, public=keys, metric=metric, values="binary", width=width, wrong=wrong)


# ---- levels of both signs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["fp16", "bf16"])
@pytest.mark.parametrize("error", [0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.9])
def test_the_listed_values_are_those_that_are_counted(values: str, error: float) -> None:
    for leak in (0.0, 2.0**-30):
        found = torch.tensor(floors.additive_values(error, values, leak), dtype=torch.float64)
        assert len(found) == floors.additive_levels(error, values, leak)
        assert torch.equal(found, -found.flip(0))
        top = number_format(values)
        least = 2 * (error * (1 + leak) + leak) * top.top * top.unit
        assert bool((found.diff() > least * (1 - 1e-12)).all()) and bool((found.diff() > 0).all())
        kept = found.to({"fp16": torch.float16, "bf16": torch.bfloat16}[values]).double()
        assert torch.equal(kept, found)


@pytest.mark.parametrize("values", ["fp16", "bf16"])
@pytest.mark.parametrize("error", [1e-3, 0.1, 0.5])
def test_the_worst_answers_decode_and_those_of_neighbours_do_not(values: str, error: float) -> None:
    table = AdditiveTable(values, error)
    every, top = torch.arange(len(table.numbers)), table.numbers[-1]
    within = (error + 2 * table.leak) * top * (1 - 1e-12)
    for sign in (-1, 1):
        assert torch.equal(table.decode(table.numbers + sign * within), every)
    assert bool((table.decode(table.numbers[1:] - within) != every[:-1]).all())
    assert torch.allclose(table.places(table.numbers), every.double(), atol=1e-9)
    assert not table.trusted(7.0 * top * torch.ones(3, 4, dtype=torch.float64)).any()


@pytest.mark.parametrize(("dtype", "values"), [("float32", "fp16"), ("float32", "bf16"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("error", [0.5, 0.01])
def test_exact_holds_and_certifies_the_additive_floor(dtype: str, values: str, error: float) -> None:
    played = play("exact", n=96, d=32, dtype=dtype, values=values, metric="additive", epsilon=error, isolated=False)
    floor = floors.space(96, 32, metric="additive", epsilon=error, values=values)
    assert (played.verdict, played.row_success) == ("holds", 1.0)
    assert played.floor_bits == floor.bits and played.details["levels"] == floor.constants["levels"]
    assert floor.upper_bits - PAYMENT - 1e-3 <= played.certified_bits <= played.hidden_bits
    best = play("optimum", n=96, d=32, dtype=dtype, values=values, metric="additive", epsilon=error, isolated=False)
    assert best.verdict == "holds" and 8 * best.payload_bytes == 96 * 32 * (floor.constants["levels"] - 1).bit_length()


def test_guesses_certify_nothing_of_additive_levels() -> None:
    table = AdditiveTable("fp16", 0.1)
    hidden = Hidden(0).choices(300, 16, len(table.numbers))
    for seed in range(1, 7):
        answers = table.numbers[Hidden(seed).choices(300, 16, len(table.numbers))]
        assert judge_levels(answers, hidden, table).certified_bits == 0.0
    assert judge_levels(torch.zeros(300, 16), hidden, table).certified_bits == 0.0


# ---- points and signs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "epsilon"), CASES)
@pytest.mark.parametrize("values", ["fp16", "bf16", "binary"])
def test_exact_holds_and_certifies_the_floor_of_each_norm(metric: str, epsilon: float, values: str) -> None:
    played = play("exact", n=96, d=32, values=values, metric=metric, epsilon=epsilon, isolated=False)
    floor = floors.space(96, 32, metric=metric, epsilon=epsilon, values=values)
    assert (played.verdict, played.row_success) == ("holds", 1.0)
    assert played.n == floor.constants["rows"]
    assert played.floor_bits == pytest.approx(floor.bits, rel=0.02)
    assert played.floor_bits >= floor.bits * (1 - 1e-4)
    assert played.hidden_bits - PAYMENT <= played.certified_bits <= played.hidden_bits
    assert played.certified_bits >= floor.bits - PAYMENT
    assert played.floor_bits <= 8 * played.message_bytes


@pytest.mark.parametrize(("metric", "epsilon"), CASES)
def test_whoever_keeps_the_guarantee_is_answered(metric: str, epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers at the edge of the guarantee, away from the hidden point; a quarter more, or the leak ignored, is not."""
    made: list[NormSpike] = []

    def kept(played, instance, **more):
        made.append(instance)
        return conclude(played, instance, **more)

    conclude = norms.conclude
    monkeypatch.setattr(norms, "conclude", kept)
    play("exact", n=64, d=32, metric=metric, epsilon=epsilon, isolated=False)
    game = made[0]
    hidden = game.draw(Hidden(3))
    values, keys = game.streamed(hidden), game.keys.double()
    queries = game.queries(torch.arange(game.n))[0].double()
    weights = torch.softmax(queries @ keys.T, -1)
    attention = weights @ values
    size = {
        "max": torch.full((game.n,), values.norm(dim=1).max().item(), dtype=torch.float64),
        "frobenius": weights.norm(dim=1) * values.norm(),
        "operator": weights.norm(dim=1) * torch.linalg.matrix_norm(values, 2),
    }[metric]
    away = attention - hidden
    away = torch.where(away.norm(dim=1, keepdim=True) > 1e-9, away, torch.ones_like(away))
    away = away / away.norm(dim=1, keepdim=True)
    worst = attention + epsilon * size[:, None] * away
    assert judge_norm(worst, hidden, game).row_success == 1.0
    assert judge_norm(attention + 1.25 * game.radius * away, hidden, game).row_success == 0.0
    assert bool((weights.diagonal() >= 1 / (1 + LEAK / 2)).all())


@pytest.mark.parametrize("missed", [0, 1, 6])
def test_whole_rows_certify_the_floor_at_their_success(missed: int) -> None:
    points, signs = point_game(), sign_game(wrong=2)
    for game in (points, signs):
        hidden = game.draw(Hidden(1))
        answers = hidden.clone()
        answers[:missed] = -hidden[:missed]
        judged = judge_norm(answers, hidden, game)
        floor = floors.row_bits(64, 1, 1 - missed / 64, game.row_told)
        assert floor - 20.01 <= judged.certified_bits <= floor
        assert judged.row_success == 1 - missed / 64


@pytest.mark.parametrize("game", [point_game(), point_game(radius=0.9), sign_game(wrong=2), sign_game(wrong=5)])
def test_guesses_and_averages_certify_nothing(game: NormSpike) -> None:
    hidden = game.draw(Hidden(0))
    for seed in range(1, 9):
        assert judge_norm(game.draw(Hidden(seed)), hidden, game).certified_bits == 0.0
    assert judge_norm(torch.zeros(64, 16), hidden, game).certified_bits == 0.0
    assert judge_norm(torch.full((64, 16), math.nan), hidden, game).row_success == 0.0


def test_a_code_of_few_bits_certifies_no_more_than_it_holds() -> None:
    """Each coordinate of a point in b bits, with and without half of the rows: the bits are never exceeded."""
    for bits in (1, 2, 3, 4):
        for radius in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8):
            game = point_game(radius=radius, n=128)
            hidden = game.draw(Hidden(bits))
            step = 2.0 / 2**bits
            coded = ((hidden + 1) / step).floor().clamp(0, 2**bits - 1) * step + step / 2 - 1
            assert judge_norm(coded, hidden, game).certified_bits <= 128 * 16 * bits
            coded[64:] = 0.0
            assert judge_norm(coded, hidden, game).certified_bits <= 64 * 16 * bits


def test_a_radius_too_small_by_a_half_would_certify_more_than_a_message_holds() -> None:
    """The mutant of the radius: answers within r count at the bits of r/2, and a covering code is then forbidden."""
    game = point_game(radius=0.75, n=256, dv=2)
    hidden = game.draw(Hidden(2))
    ring = 2 * math.pi / 6 * torch.arange(6, dtype=torch.float64)
    centres = 0.6 * torch.stack([ring.cos(), ring.sin()], 1)  # six of them, 2.6 bits a point
    coded = centres[torch.cdist(hidden, centres).argmin(1)]
    judged = judge_norm(coded, hidden, game)
    assert judged.row_success == 1.0
    assert 100 < judged.certified_bits <= 256 * math.log2(6)
    mutant = dataclasses.replace(game, radius=0.25)
    forged = judge_norm(hidden, hidden, mutant)  # what it would certify if these answers were within its radius
    assert forged.certified_bits > 256 * math.log2(6)
    assert judge_norm(coded, hidden, mutant).certified_bits < judged.certified_bits


def test_points_are_uniform_in_the_ball_and_signs_fair() -> None:
    points = Hidden(5).points(40_000, 3)
    radius = points.norm(dim=1)
    assert radius.max() <= 1.0
    for share in (0.1, 0.5, 0.9):
        near = (radius <= share ** (1 / 3)).double().mean().item()
        assert abs(near - share) < 5 * math.sqrt(share * (1 - share) / 40_000)
        anywhere = ((points - torch.tensor([0.5, 0.2, -0.3])).norm(dim=1) <= share).double().mean().item()
        assert anywhere <= share**3 + 0.01
    assert points.mean(0).abs().max() < 5 / math.sqrt(5 * 40_000)
    assert not torch.equal(Hidden(5).points(8, 3, 1), points[:8])
    signs = Hidden(5).signs(1000, 8)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0} and abs(signs.mean().item()) < 0.06


def test_operator_games_hide_only_matrices_within_their_norm() -> None:
    game, free = point_game("operator"), point_game("max")
    norms_of = [torch.linalg.matrix_norm(game.draw(Hidden(seed)), 2).item() for seed in range(40)]
    assert max(norms_of) <= floors.ball_norm(64, 16)
    assert game.floor_bits == free.floor_bits - 1.0
    hidden = game.draw(Hidden(0))
    assert judge_norm(hidden, hidden, game).certified_bits == judge_norm(hidden, hidden, free).certified_bits - 1.0


def test_a_sample_of_rows_certifies_below_the_floor_of_all() -> None:
    played = play("exact", n=96, d=32, metric="max", epsilon=0.1, rows=90, isolated=False)
    assert played.certificate == "sampled rows" and played.rows_asked == 90
    assert 0.7 * played.hidden_bits < played.certified_bits < played.hidden_bits


# ---- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "coarse", "fine"), [("additive", 0.5, 0.01), ("max", 0.5, 0.02), ("operator", 0.3, 0.005)]
)
def test_a_lossy_store_holds_where_errors_may_be_large_and_breaks_where_not(
    metric: str, coarse: float, fine: float
) -> None:
    wide = play("exact:k4v4", n=96, d=64, metric=metric, epsilon=coarse, isolated=False)
    narrow = play("exact:k4v4", n=96, d=64, metric=metric, epsilon=fine, isolated=False)
    assert (wide.verdict, narrow.verdict) == ("holds", "breaks")
    assert wide.floor_bits <= 8 * wide.message_bytes
    assert max(wide.certified_bits, narrow.certified_bits) <= 8 * narrow.message_bytes
    assert play("window@8", n=96, d=64, metric=metric, epsilon=fine, isolated=False).verdict == "breaks"


@pytest.mark.parametrize("metric", ["additive", "max", "frobenius", "operator"])
def test_memory_elsewhere_is_caught(metric: str) -> None:
    found = play("tests.game.planted_cheats:HidesInList()", n=64, d=32, metric=metric, epsilon=0.05, isolated=False)
    assert found.verdict == "cheats"


def test_bob_rebuilds_these_games_from_json() -> None:
    game = sign_game(wrong=2, width=8, dv=16, metric="operator")
    again = INSTANCES["NormSpike"](**dataclasses.asdict(game))
    assert again == game and game.draw(Hidden(1))[:, 8:].abs().max() == 0
    assert play("exact", n=32, d=16, metric="max", epsilon=0.1).verdict == "holds"  # in a fresh process


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"metric": "max"}, "give both or none"),
        ({"epsilon": 0.1}, "give both or none"),
        ({"metric": "l3", "epsilon": 0.1}, "metric must be one of entrywise, max"),
        ({"metric": "max", "epsilon": 1.0}, r"epsilon must lie in \[0, 1\)"),
        ({"metric": "max", "epsilon": 0.1, "bits": 2}, "leave bits and codebook out"),
        ({"metric": "max", "epsilon": 0.1, "eta": 0.5}, "give one of them"),
        ({"metric": "max", "epsilon": 0.1, "heads": 2}, "leave heads and layers out"),
        ({"metric": "max", "epsilon": 0.1, "values": "fp32"}, "values with dtype=float32 must be one of"),
    ],
)
def test_what_cannot_be_played_is_refused(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        play("exact", **{"n": 16, "d": 8, "isolated": False} | wrong)
