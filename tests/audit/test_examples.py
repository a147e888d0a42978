"""Example answers, against generate() of the model as it was loaded, and against a model with tokens hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor import parse
from kvfloor.audit.examples import (
    MOST_TOKENS,
    SUMMARISE,
    Prompt,
    Speaker,
    shown_settings,
    task_examples,
    text_examples,
    write_examples,
)
from kvfloor.audit.measure import Bench
from kvfloor.audit.plan import Item, Work
from kvfloor.audit.recommend import recommend
from kvfloor.audit.rows import Cell
from kvfloor.audit.texts import GENERATED, Excerpt, excerpts
from kvfloor.hf import CompressedCache, prepare
from kvfloor.models import load
from kvfloor.tasks import Question
from tests.audit.made_up import text_row

CONTEXT, KEPT = 70, 20
SMALL = f"window(block=1)@{KEPT}"


def silent(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def bench() -> Bench:
    model, tokenizer = load()
    return Bench(prepare(model), tokenizer, seed=0)


@pytest.fixture(scope="module")
def plain() -> Any:
    return load()[0]


@pytest.fixture(scope="module")
def excerpt(bench: Bench) -> Excerpt:
    return excerpts(GENERATED[:1], [CONTEXT], 60, bench.encode)[0]


def generated(plain: Any, ids: list[int], most: int) -> list[int]:
    """Return the new tokens of generate(), without the end of text."""
    found = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=most)[0, len(ids) :].tolist()
    return found[: found.index(plain.config.eos_token_id)] if plain.config.eos_token_id in found else found


def with_hidden_tokens(plain: Any, ids: list[int], most: int) -> list[int]:
    """Decode greedily, each token seeing only the KEPT newest behind it."""
    said = list(ids)
    for _ in range(most):
        place = torch.arange(len(said))
        behind = place.unsqueeze(1) - place
        seen = (behind >= 0) & (behind <= KEPT)
        with torch.inference_mode():
            logits = plain(torch.tensor([said]), attention_mask=seen[None, None]).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == plain.config.eos_token_id:
            return said[len(ids) : -1]
    return said[len(ids) :]


def test_exact_says_what_generate_says_and_a_window_what_a_masked_model_says(
    bench: Bench, plain: Any, excerpt: Excerpt
) -> None:
    (one,) = text_examples(Speaker(bench, {SMALL: parse(SMALL)}), excerpt, silent)
    (small,) = one.others
    assert list(one.exact.tokens) == generated(plain, excerpt.context, MOST_TOKENS)
    assert list(small.tokens) == with_hidden_tokens(plain, excerpt.context, MOST_TOKENS)
    assert not small.is_same and one.exact.is_same and one.exact.same == len(one.exact.tokens) == 4
    assert small.same == 2 and small.tokens[:2] == one.exact.tokens[:2]
    assert small.tokens[small.same : small.same + 1] != one.exact.tokens[small.same : small.same + 1]
    assert one.truth == bench.tokenizer.decode(excerpt.continuation[:MOST_TOKENS])
    assert bench.tokenizer.decode(excerpt.context).endswith(one.prompt_end) and one.prompt_end
    for answer in (one.exact, small):
        assert answer.agrees + answer.differs + answer.rest == bench.tokenizer.decode(answer.tokens)
    assert small.differs == bench.tokenizer.decode(small.tokens[: small.same + 1])[len(small.agrees) :]


def test_the_cache_is_sealed_at_the_end_of_the_prompt(bench: Bench, excerpt: Excerpt) -> None:
    method = parse("snapkv(window=8)@16")
    prompt = Prompt(excerpt.context[:60], excerpt.context[60:66])
    said = Speaker(bench, {}).tokens(prompt, method, 12)
    cache = CompressedCache(bench.model, method, seed=0)
    with torch.inference_mode():
        bench.model(torch.tensor([prompt.context]), past_key_values=cache)
        cache.seal()
        logits = bench.model(torch.tensor([prompt.ask]), past_key_values=cache).logits
        wanted = []
        for _ in said:
            wanted.append(int(logits[0, -1].argmax()))
            logits = bench.model(torch.tensor([wanted[-1:]]), past_key_values=cache).logits
    assert said == wanted
    late = Speaker(bench, {}).tokens(Prompt(excerpt.context[:66], []), method, 12)
    assert late != said  # the question was compressed too


def test_an_answer_that_ends_earlier_is_not_the_same(bench: Bench) -> None:
    speaker = Speaker(bench, {})
    short = speaker._answered("h2o@8", [20, 21], [20, 21, 22])
    assert (short.same, short.differs, short.rest, short.is_same) == (2, "", "", False)


def test_a_character_of_several_tokens_is_not_cut() -> None:
    class Bytes:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    class Alone:
        tokenizer = Bytes()

    speaker = Speaker(Alone(), {})  # type: ignore[arg-type]
    found = speaker._answered("h2o@8", list("aé!".encode()), list("aè!".encode()))
    assert (found.same, found.agrees, found.differs, found.rest) == (2, "a", "é", "!")


def test_a_chat_model_is_asked_after_its_cache_was_sealed(
    bench: Bench, plain: Any, excerpt: Excerpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "number {{ messages[0].content }} end {% if add_generation_prompt %}answer{% endif %}"
    monkeypatch.setattr(bench.tokenizer, "chat_template", template, raising=False)
    speaker = Speaker(bench, {SMALL: parse(SMALL)})
    prompt = speaker.chat(excerpt)
    assert prompt is not None

    def encode(text: str) -> list[int]:
        return bench.tokenizer(text, add_special_tokens=False).input_ids

    text = bench.tokenizer.decode(excerpt.context, skip_special_tokens=True)
    assert prompt.context == encode(f"number {text}\n\n") and prompt.ask == encode(f"{SUMMARISE} end answer")
    found = text_examples(speaker, excerpt, silent)
    assert [one.kind for one in found] == ["text", "chat"] and found[1].truth is None
    assert list(found[1].exact.tokens) == generated(plain, prompt.context + prompt.ask, MOST_TOKENS)
    monkeypatch.setattr(bench.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    assert speaker.chat(excerpt) is None
    monkeypatch.setattr(bench.tokenizer, "chat_template", "{{ messages[0].content | upper }}")
    assert speaker.chat(excerpt) is None
    monkeypatch.setattr(bench.tokenizer, "chat_template", None)
    assert speaker.chat(excerpt) is None


def test_of_a_task_the_first_lost_sample_is_shown(bench: Bench, plain: Any, row: Any) -> None:
    items = tuple(Item(f"the key{i} is {i} .", (Question(f"key{i}", str(i)),)) for i in range(32))
    work = Work(Cell("recall", 512, "after"), items)
    exact = row("exact", right=31, exact_right=31, n=32)
    small = row(SMALL, right=12, exact_right=31, n=32)
    speaker = Speaker(bench, {SMALL: parse(SMALL)})
    other = Work(Cell("never measured", 512, "after"), items)
    (one,) = task_examples(speaker, [other, work], [exact, small], silent)
    assert one.question == "key12" and one.truth == "12" and one.kind == "task"
    ids = bench.encode("the key12 is 12 .") + bench.tokenizer(" key12", add_special_tokens=False).input_ids
    assert list(one.exact.tokens) == generated(plain, ids, len(one.exact.tokens) + 1)[: len(one.exact.tokens)]
    (first,) = task_examples(speaker, [work], [exact], silent)
    assert first.question == "key0"


def test_the_recommended_setting_and_the_next_smaller_are_shown() -> None:
    def texts(nats: float) -> list:
        settings = {"exact": 4000, "h2o@64": 1000, "h2o@32": 500, "tova@16": 250}
        return [
            text_row(one, text, nats=nats if one == "h2o@64" else 0.5, state_bytes=size, peak_state_bytes=size)
            for one, size in settings.items()
            for text in ("sea", "sky")
        ]

    safe = recommend([], texts=texts(0.001))
    assert safe.method == "h2o@64" and shown_settings(safe) == ["h2o@64", "h2o@32"]
    unsafe = recommend([], texts=texts(0.1))
    assert unsafe.method is None and shown_settings(unsafe) == ["h2o@64"]


def test_examples_are_written_one_per_line(bench: Bench, tmp_path: Path) -> None:
    speaker = Speaker(bench, {})
    one = speaker.example("text", "sea", Prompt(list(range(8, 20)), []), None, "", 3)
    write_examples(tmp_path / "examples.jsonl", [one, one])
    lines = (tmp_path / "examples.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["exact"]["tokens"] == list(one.exact.tokens)
