"""The trainer: learns, repeats itself from the seed, and goes on from a checkpoint as if never stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from builtin_model.curriculum import LENGTHS, PASS, WINDOW, Curriculum
from builtin_model.examples import NEAR, PAD_ID, STOP_ID, batch, example, jump, widen
from builtin_model.forward import SHORT, answer_logits
from builtin_model.train import ModelRecipe, Trainer
from kvfloor.models.load import load
from kvfloor.tasks import FULL, TASKS
from kvfloor.tasks.tokenizer import encode

TINY = ModelRecipe(seed=3, steps=60, decay=10, warmup=5, tokens=400, longest=96, layers=2, hidden=64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_thirty_steps_lower_the_loss_and_repeat_bit_for_bit() -> None:
    first, second, other = Trainer(TINY), Trainer(TINY), Trainer(ModelRecipe(**(vars(TINY) | {"seed": 4})))
    losses = [first.step() for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert [second.step() for _ in range(30)] == losses
    assert same(weights(first), weights(second))
    assert [other.step() for _ in range(3)] != losses[:3]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = Trainer(TINY)
    for _ in range(12):
        whole.step()
    part = Trainer(TINY)
    for _ in range(7):
        part.step()
    part.save(tmp_path / "checkpoint.pt")
    rest = Trainer(TINY)
    rest.resume(tmp_path / "checkpoint.pt")
    assert rest.done == 7
    for _ in range(5):
        rest.step()
    assert same(weights(whole), weights(rest))
    assert whole.curriculum.state() == rest.curriculum.state()


def test_export_loads_and_says_how_it_was_made(tmp_path: Path) -> None:
    trainer = Trainer(TINY)
    trainer.step()
    trainer.export(tmp_path)
    model, tokenizer = load(tmp_path)
    ids = torch.tensor([tokenizer("the fox.").input_ids])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, trainer.model(ids).logits)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts["seed"] == 3 and facts["steps"] == 1 and facts["tokens"] > 0
    assert "--seed 3" in facts["command"] and "--hidden 64" in facts["command"]


@pytest.mark.parametrize("t", [SHORT // 2, SHORT + 40])
def test_the_trainers_forward_pass_is_the_models(t: int) -> None:
    model = Trainer(TINY).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 600, (2, t), generator=generator)
    positions = torch.arange(t).repeat(2, 1)
    positions[1, t // 2 :] += 50
    where = torch.randint(0, t, (2, 5), generator=generator)
    with torch.no_grad():
        mine = answer_logits(model, ids, positions, where)
        rows = [model(ids[i : i + 1], position_ids=positions[i : i + 1]).logits[0, where[i]] for i in range(2)]
    torch.testing.assert_close(mine, torch.stack(rows), atol=2e-5, rtol=0)


def test_rate_warms_up_stays_and_decays_to_zero() -> None:
    recipe = ModelRecipe(steps=100, decay=20, warmup=10, lr=1.0)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(50) == 1.0
    assert recipe.rate(90) == pytest.approx(0.5)
    assert recipe.rate(100) == 0.0


def test_a_batch_asks_for_the_answers_only() -> None:
    sample = TASKS["kv"].generate(0, 0, 64, questions=2)
    e = example(sample.context, [("kv", q) for q in sample.questions])
    short = example("fox 47.", [("recall", TASKS["recall"].generate(0, 0, 40).questions[0])])
    data = batch([e, short])
    for i, (task, first, last) in [(0, span) for span in data.spans[0]]:
        wanted = data.targets[i, first:last].tolist()
        assert task == "kv"
        assert wanted[-1] == encode("", bos=True)[0] + 1, "an answer ends with end-of-text"
        assert [e.ids[w + 1] for w in data.where[i, first:last].tolist()] == wanted
    assert data.weights[1, 2:].sum() == 0
    assert data.ids[1, -1] == PAD_ID


def test_stretched_positions_jump_after_sentences_only() -> None:
    ids = encode(TASKS["recall"].generate(0, 0, 200).context)
    for seed in range(20):
        jumps = jump(random.Random(seed), ids, len(ids), 2000)
        steps = jumps.diff()
        assert (steps >= 0).all() and len(ids) + int(jumps[-1]) <= 2000
        assert all(ids[i] == STOP_ID for i in steps.nonzero().flatten().tolist())


def test_words_without_sentences_may_jump_anywhere() -> None:
    ids = encode(TASKS["words"].generate(0, 0, 200).context)
    assert STOP_ID not in ids
    assert len({int(jump(random.Random(seed), ids, len(ids), 2000).diff().argmax()) for seed in range(8)}) > 4


def test_widened_positions_keep_which_fact_is_the_latest_and_how_old_it_is() -> None:
    ids = encode(TASKS["registers"].generate(0, 0, 400).context)
    reached = []
    for seed in range(10):
        added = widen(random.Random(seed), ids, len(ids), 3000)
        reached.append(len(ids) + int(added[-1]))
        assert (added[-1] - added[-NEAR:] == 0).all(), "the newest facts stay as near as they are"
        steps = added.diff()
        assert len(set(steps[steps > 0].tolist())) <= 1, "one gap everywhere"
        age, widened = (
            (len(ids) - 1) - torch.arange(len(ids)),
            (len(ids) - 1 + added[-1]) - (torch.arange(len(ids)) + added),
        )
        old = age > 2 * NEAR
        doubled = widened[old] / age[old]
        assert (doubled.diff() <= 0.02).all(), "the older a fact, the more it is moved away"
    assert max(reached) > 2000 and max(reached) <= 3000


def test_a_task_keeps_its_words_when_it_revisits_short_texts() -> None:
    curriculum = Curriculum(4096)
    few = len(curriculum.lexicon("words").things)
    curriculum.raise_to(2048)
    assert few == 64 < len(curriculum.lexicon("words").things) == len(FULL.things)


def test_every_task_is_lifted_to_the_floor_at_its_step() -> None:
    trainer = Trainer(ModelRecipe(**(vars(TINY) | {"floor": 96, "lift": 2})))
    trainer.step(), trainer.step()
    assert min(LENGTHS[level] for level in trainer.curriculum.level.values()) < 96
    trainer.step()
    assert min(LENGTHS[level] for level in trainer.curriculum.level.values()) == 96


def test_a_task_grows_exactly_when_it_passes_its_bar() -> None:
    curriculum = Curriculum(LENGTHS[2])
    start = curriculum.level["kv"]
    for i in range(WINDOW):
        curriculum.record("kv", LENGTHS[start], i >= (1 - PASS) * WINDOW + 1)
    assert curriculum.level["kv"] == start, "just under the bar"
    for _ in range(WINDOW):
        curriculum.record("kv", LENGTHS[start + 1], True)
    assert curriculum.level["kv"] == start, "other lengths do not count"
    curriculum.record("kv", LENGTHS[start], True)
    curriculum.record("kv", LENGTHS[start], True)
    assert curriculum.level["kv"] == start + 1
    for _ in range(5 * WINDOW):
        curriculum.record("kv", LENGTHS[curriculum.level["kv"]], True)
    assert curriculum.level["kv"] == 2, "never past the longest length"


def test_raising_lifts_the_trained_tasks_only() -> None:
    curriculum = Curriculum(LENGTHS[-1], tasks=("kv", "copy"))
    start = curriculum.level["recall"]
    curriculum.raise_to(LENGTHS[4])
    assert curriculum.level["kv"] == curriculum.level["copy"] == 4
    assert curriculum.level["recall"] == start
    curriculum.raise_to(LENGTHS[2])
    assert curriculum.level["kv"] == 4, "never lowered"


def test_the_note_of_a_resumed_run_names_every_command(tmp_path: Path) -> None:
    first = Trainer(TINY)
    first.step()
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(ModelRecipe(**(vars(TINY) | {"focus": 2.0})))
    second.resume(tmp_path / "checkpoint.pt")
    second.step()
    start, end = second.command().split(" && ")
    assert "--focus 1.5" in start and start.endswith("--stop 1")
    assert "--resume" in end and "--focus 2.0" in end and end.endswith("--stop 2")
