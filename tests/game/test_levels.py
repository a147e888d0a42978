"""The spike with levels of a number format: the floor that is claimed is the floor that is played and certified."""

import dataclasses
import json

import pytest
import torch

from kvfloor import floors
from kvfloor.game import INSTANCES, play
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.level_answers import LevelTable, judge_levels
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances.levels import LevelSpike

PAYMENT = 22.0  # for chance, and for the best of four certificates


def draw(table: LevelTable, m: int = 200, dv: int = 16, seed: int = 0) -> torch.Tensor:
    return Hidden(seed).choices(m, dv, len(table.numbers))


def spoiled(levels: torch.Tensor, rows: int, count: int) -> torch.Tensor:
    """Return the levels with every value of the first `rows` rows wrong."""
    wrong = levels.clone()
    wrong[:rows] = (wrong[:rows] + 1) % count
    return wrong


# ---- what one decoding proves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("values", ["fp16", "bf16"])
def test_the_worst_answers_decode_and_those_of_neighbours_do_not(values, eta):
    table = LevelTable(values, eta)
    every = torch.arange(len(table.numbers))
    leak = floors.levels_leak(eta, values) * table.numbers[-1]
    rounding = 1e-12
    assert torch.equal(table.decode((1 - eta) * table.numbers), every)
    assert torch.equal(table.decode((1 + eta) * (1 - rounding) * (table.numbers + leak)), every)
    assert bool((table.decode((1 - eta) * table.numbers[1:]) != every[:-1]).all())
    places = table.places(table.numbers)
    assert torch.allclose(places, every.double(), atol=1e-9)
    between = table.places(torch.sqrt(table.numbers[1:-1] * table.numbers[2:]))
    assert torch.allclose(between, every[1:-1].double() + 0.5, atol=1e-9)


def test_answers_that_are_no_numbers_decode_as_nothing_and_are_not_trusted():
    table = LevelTable("fp16", 0.1)
    answers = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [-1.0, 1.0]])
    assert table.decode(answers)[:, 0].tolist() == [0, 0, 0]
    assert not table.trusted(answers).any()


@pytest.mark.parametrize("eta", [0.01, 0.5])
@pytest.mark.parametrize("wrong", [0, 1, 19, 20])
def test_whole_rows_certify_the_floor_at_their_success(eta, wrong):
    """A mutant that counted the chance of a row as that of single bits would certify less than the floor."""
    table = LevelTable("fp16", eta)
    hidden = draw(table)
    answers = table.numbers[spoiled(hidden, wrong, len(table.numbers))]
    judged = judge_levels(answers, hidden, table)
    m, dv = hidden.shape
    floor = floors.row_bits(m, dv, 1.0 - wrong / m, table.told)
    assert floor - PAYMENT - 1e-6 <= judged.certified_bits <= m * dv * table.told
    assert judged.row_success == 1.0 - wrong / m and judged.bit_error == pytest.approx(wrong / m)
    assert floor > 4 * floors.row_bits(m, dv, 1.0 - wrong / m)


def test_guesses_certify_nothing():
    table = LevelTable("fp16", 0.5)
    hidden = draw(table, m=400)
    for seed in range(1, 9):
        assert judge_levels(table.numbers[draw(table, m=400, seed=seed)], hidden, table).certified_bits == 0.0
    assert judge_levels(torch.zeros(400, 16), hidden, table).certified_bits == 0.0


def test_no_certificate_exceeds_what_a_message_of_some_values_holds():
    """Half of the values are sent, the others answered by a guess: never more is certified than was sent."""
    table = LevelTable("fp16", 0.5)
    for seed in range(12):
        hidden = draw(table, seed=seed)
        sent = torch.rand(hidden.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        answers = table.numbers[torch.where(sent, hidden, draw(table, seed=100 + seed))]
        assert judge_levels(answers, hidden, table).certified_bits <= sent.sum() * table.told + sent.numel()
        rows = hidden.clone()
        rows[100:] = draw(table, seed=200 + seed)[100:]
        judged = judge_levels(table.numbers[rows], hidden, table)
        assert 0.0 < judged.certified_bits <= 100 * 16 * table.told


def test_a_sample_of_rows_certifies_below_the_floor_of_all():
    table = LevelTable("fp16", 0.1)
    hidden = draw(table, m=300)
    judged = judge_levels(table.numbers[hidden], hidden, table, sampled_from=10_000)
    assert judged.certificate == "sampled rows"
    assert 0.8 * 10_000 * 16 * table.told < judged.certified_bits < 10_000 * 16 * table.told


# ---- the game -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values"), [("float32", "fp16"), ("float32", "bf16"), ("float16", "fp16"), ("bfloat16", "bf16")]
)
@pytest.mark.parametrize("eta", [0.05, 0.5])
def test_exact_holds_and_certifies_the_floor_of_space(dtype, values, eta):
    played = play("exact", n=96, d=32, dtype=dtype, values=values, eta=eta, isolated=False)
    floor = floors.space(96, 32, eta=eta, values=values)
    assert (played.verdict, played.row_success) == ("holds", 1.0)
    assert played.floor_bits == floor.bits
    assert played.details["levels"] == floor.constants["levels"]
    assert floor.upper_bits - PAYMENT - 1e-3 <= played.certified_bits <= played.hidden_bits
    assert played.hidden_bits == pytest.approx(floor.upper_bits)
    assert floor.bits < 8 * played.message_bytes


def test_an_error_without_bits_plays_its_floor_and_bits_play_theirs():
    fine = play("exact", n=48, d=32, eta=0.01, isolated=False)
    assert fine.details["values"] == "fp16" and fine.floor_bits == floors.space(48, 32, eta=0.01).bits
    halves = play("exact", n=48, d=32, eta=0.01, dtype="bfloat16", isolated=False)
    assert halves.floor_bits == floors.space(48, 32, eta=0.01, values="bf16").bits
    assert play("exact", n=48, d=32, isolated=False).floor_bits == floors.space(48, 32, values="binary").bits
    single = play("exact", n=48, d=32, eta=0.01, bits=1, isolated=False)
    assert single.floor_bits == floors.space(48, 32, values="binary").bits


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_the_smallest_method_holds_a_level_in_whole_bits(eta):
    best = play("optimum", n=96, d=32, eta=eta, isolated=False)
    bits = (best.details["levels"] - 1).bit_length()
    assert (best.verdict, best.row_success) == ("holds", 1.0)
    assert 8 * best.payload_bytes == 96 * 32 * bits
    assert best.floor_bits < best.hidden_bits <= 8 * best.payload_bytes


def test_a_method_too_coarse_for_the_error_does_not_hold_below_its_floor():
    """Four levels in ten bits' place: the message is below the floor, and the answers are not right."""
    from tests.game.rounded import Rounded

    shared = agreed(d=32, dv=None, bits=8, eta=0.1, seed=0)
    keys = keys_for(shared, 96)
    for kept, verdict in ((8, "holds"), (7, "breaks"), (4, "breaks")):
        result = play(Rounded(keys.family, 96, keys.seed, kept, "fp16", 0.1), n=96, d=32, eta=0.1, isolated=False)
        assert result.verdict == verdict
        assert (8 * result.payload_bytes < result.floor_bits) == (kept < 7)
        assert result.certified_bits <= 8 * result.message_bytes


def test_a_fresh_process_answers_the_same():
    played = play("exact", n=32, d=16, eta=0.1)
    assert played.verdict == "holds" and played.certified_bits > played.floor_bits - PAYMENT


def test_the_instance_survives_json():
    shared = agreed(d=16, dv=4, bits=8, eta=0.1, seed=0)
    instance = LevelSpike(**shared, n=8, values="fp16", public=keys_for(shared, 8))
    again = INSTANCES["LevelSpike"](**json.loads(json.dumps(dataclasses.asdict(instance))))
    assert again == instance and torch.equal(again.draw(Hidden(3)), instance.draw(Hidden(3)))


def test_choices_are_uniform():
    drawn = Hidden(0).choices(2000, 26, 26)
    counts = torch.bincount(drawn.flatten(), minlength=26)
    assert drawn.min() == 0 and drawn.max() == 25
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"values": "fp32"}, "values with dtype=float32 must be one of fp16, bf16, got 'fp32'"),
        ({"values": "bf16", "dtype": "float16"}, "values with dtype=float16 must be one of fp16, got 'bf16'"),
        ({"values": "fp16", "bits": 3}, "leave bits and codebook out"),
        ({"values": "fp16", "codebook": 64}, "leave bits and codebook out"),
        ({"eta": 0.1, "dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
    ],
)
def test_refusals(asked, message):
    with pytest.raises(ValueError, match=message):
        play("exact", n=16, d=8, isolated=False, **asked)
