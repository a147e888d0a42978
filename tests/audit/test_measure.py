"""Measuring one cell on the built-in model: bytes are the storages', errors are against exact attention."""

from __future__ import annotations

import pytest
import torch

from kvfloor import models, parse, tasks
from kvfloor.audit import measure, traces
from kvfloor.audit.measure import Bench, Measurement, Prepared
from kvfloor.audit.plan import Item, Work, task_work
from kvfloor.audit.rows import Cell
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue

CONTEXT = 160


@pytest.fixture(scope="module")
def bench() -> Bench:
    model, tokenizer = models.load()
    return Bench(prepare(model), tokenizer, seed=0)


@pytest.fixture(scope="module")
def work(bench: Bench) -> Work:
    return task_work(["kv"], [CONTEXT], ["after"], 32, 0, bench.count)[0]


@pytest.fixture(scope="module")
def prepared(bench: Bench, work: Work) -> Prepared:
    return bench.prepare(work)


@pytest.fixture(scope="module")
def exact(bench: Bench, prepared: Prepared) -> Measurement:
    return bench.run(parse("exact"), prepared)


def test_exact_decodes_what_generate_decodes(bench: Bench, work: Work, exact: Measurement) -> None:
    right = []
    for item in work.items:
        ids = bench.tokenizer(f"{item.context} {item.question}", return_tensors="pt").input_ids
        wanted = bench.tokenizer(item.answer, add_special_tokens=False).input_ids
        said = bench.model.generate(ids, do_sample=False, max_new_tokens=len(wanted) + 4)[0, ids.shape[1] :]
        right.append(int(tasks.score(item.answer, bench.tokenizer.decode(said, skip_special_tokens=True))))
    assert list(exact.right) == right


def test_bytes_are_those_of_one_sequences_storages(bench: Bench, prepared: Prepared) -> None:
    method = parse("window@48")
    outcome = bench.run(method, prepared)
    cache = CompressedCache(bench.model.config, method)
    dialogue = Dialogue.start(bench.model, cache, 32)
    dialogue.feed(prepared.contexts)
    storages = {}
    for layer in cache.compressed:
        assert layer.state is not None
        slots = layer.state.slots  # type: ignore[attr-defined]
        for tensor in (slots.k, slots.v, slots.position):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert 0 <= outcome.state_bytes * 32 - sum(storages.values()) < 0.02 * sum(storages.values())
    assert outcome.peak_state_bytes >= outcome.state_bytes
    assert outcome.budget_tokens == 48


def test_nothing_lost_means_no_error_and_a_small_window_means_some(bench: Bench, prepared: Prepared) -> None:
    exact = traces.errors(prepared.traces, parse("exact"))
    wide = traces.errors(prepared.traces, parse("window@512"))
    small = traces.errors(prepared.traces, parse("window@16"))
    layers, heads = bench.model.config.num_hidden_layers, bench.model.config.num_key_value_heads
    assert torch.tensor(small).shape == (layers, heads)
    assert torch.tensor(exact).max() < 1e-5
    assert torch.tensor(wide).max() < 1e-5
    assert torch.tensor(small).max() > 0.05


def test_traces_equal_attention_computed_by_hand(prepared: Prepared) -> None:
    trace = prepared.traces[0]
    row = 0
    real = trace.present[row]
    k, v = trace.k[row, real].double(), trace.v[row, real].double()
    weights = torch.softmax(trace.q[row, 0, -1].double() @ k.T * trace.scale, -1)
    assert (trace.exact[row, 0, -1].double() - weights @ v).abs().max() < 1e-5


def test_visible_and_after_are_the_same_stream_for_exact(bench: Bench, work: Work, exact: Measurement) -> None:
    visible = Work(Cell(work.cell.task, work.cell.context, "visible"), work.items)
    assert bench.run(parse("exact"), bench.prepare(visible)).right == exact.right


def test_a_row_pairs_with_exact(bench: Bench, prepared: Prepared, exact: Measurement) -> None:
    method = parse("window@16")
    row = bench.row(BudgetedMethod(method), prepared, bench.run(method, prepared), exact)
    assert row.n == 32 and row.exact_bytes == exact.state_bytes
    assert row.gained - row.lost == sum(row.outcomes) - sum(exact.right)
    assert row.floor_bytes > 0 and row.token_id_bytes > 0


def test_a_users_answer_may_go_on_a_tasks_may_not(bench: Bench) -> None:
    said = bench.tokenizer(" cake 71", add_special_tokens=False).input_ids

    def share(answer: str, *checks: tasks.AnswerCheck) -> float:
        parts = tuple(tasks.Part("answer", check) for check in checks)
        return bench._shares(Item("x", (tasks.Question("", answer, parts=parts),)), [said])["answer"]

    assert share("cake", tasks.BeginsWith("cake")) == 1
    assert share("cake") == 0 and share("cake 71") == 1
    assert share("71", tasks.BeginsWith("71")) == 0


def test_an_answer_is_right_if_all_its_parts_are_met_in_full(bench: Bench, work: Work, exact: Measurement) -> None:
    def one(item: Item, *wanted: str) -> Item:
        parts = (tasks.Part("all", tasks.Contains(wanted)), tasks.Part("start", tasks.BeginsWith(item.answer)))
        return Item(item.context, (tasks.Question(item.question, item.answer, parts=parts),))

    known = [item for item, ok in zip(work.items, exact.right, strict=True) if ok][:3]
    cell = Cell("mine", CONTEXT, "after")
    half = Work(cell, (one(known[0], known[0].answer), one(known[1], known[1].answer, "zebra"), one(known[2], "zebra")))
    outcome = bench.run(parse("exact"), bench.prepare(half))
    assert outcome.right == (1, 0, 0)
    assert outcome.parts == {"all": 0.5, "start": 1.0}


def test_a_byte_budget_is_of_one_sequence_and_a_share_of_the_context(bench: Bench, prepared: Prepared) -> None:
    outcome = bench.run(parse("window@512KiB"), prepared)
    assert 0.9 * 524288 < outcome.state_bytes <= 524288
    assert bench.run(parse("window@25%"), prepared).budget_tokens == CONTEXT // 4


@pytest.mark.parametrize("method", ["random@48", "snapkv@48", "exact"])
def test_batches_answer_as_one_batch_does(
    bench: Bench, work: Work, prepared: Prepared, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample draws by its own number, so `random` would answer otherwise if every batch counted from 0."""
    together = bench.run(parse(method), prepared)
    monkeypatch.setattr(measure, "BATCH_BYTES", 12 * CONTEXT * 4096)  # 4,096 bytes a token: 4 layers, 2 heads, 128
    cut = bench.prepare(work)
    assert [len(samples) for samples, _ in cut.batches] == [10, 11, 11]
    apart = bench.run(parse(method), cut)
    assert apart.right == together.right and apart.parts == together.parts
    assert abs(apart.state_bytes - together.state_bytes) < 0.02 * together.state_bytes


@pytest.mark.parametrize(("lengths", "most"), [([10] * 40, 7), ([10, 3, 500], 1), ([100], 50), ([1] * 9, 9)])
def test_batches_cover_the_samples_in_order_and_fit(
    lengths: list[int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "BATCH_BYTES", most * max(lengths) * 8)
    cut = measure._batches(lengths, 8)
    assert [i for samples in cut for i in samples] == list(range(len(lengths)))
    assert min(map(len, cut)) >= 1 and max(map(len, cut)) <= most
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_fewer_samples_are_traced_where_one_takes_much(
    bench: Bench, work: Work, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(prepared.traces[0].k) == 4 * 2
    one = traces.token_bytes(bench.model) * CONTEXT
    recorded = sum(x.nbytes for trace in prepared.traces for x in (trace.q, trace.k, trace.v))
    assert 4 * one <= recorded < 4.5 * one  # the question and its answer are recorded too
    for room, samples in ((2 * one, 2), (one // 2, 1)):
        monkeypatch.setattr(measure, "TRACED_BYTES", room)
        assert len(bench.prepare(work).traces[0].k) == samples * 2
