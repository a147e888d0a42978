"""Samples in a chat template: the pieces that an audit feeds are the template's own text, split in the right places."""

from __future__ import annotations

from typing import Any

import pytest

from kvfloor import models, parse
from kvfloor.audit.chat import PLAIN, Chat, Template, chosen_chat
from kvfloor.audit.measure import Bench
from kvfloor.audit.plan import Item, Work, prompt_work, task_work
from kvfloor.audit.rows import Cell
from kvfloor.hf import prepare
from kvfloor.tasks import Question
from tests.cli.running import kvfloor

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] | trim }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CONTEXT = "the code of the pale fox is 4821. the code of the old hen is 7."
FIRST = Question("what is the code of the pale fox?", "4821", opening="it is", most=3)
NEXT = Question("and of the old hen?", "7", opening="it is", most=3)
ITEM = Item(CONTEXT, (FIRST, NEXT))


def templated(text: str) -> Any:
    model, tokenizer = models.load()
    tokenizer.chat_template = text
    return prepare(model), tokenizer


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(*templated(TEMPLATE), seed=0)


def conversation(tokenizer: Any, *turns: tuple[str, str]) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("protocol", ["after", "visible"])
def test_the_pieces_are_the_whole_prompts_tokens(bench: Bench, protocol: str) -> None:
    """The split: context in the user's turn, question to the end of that turn, then the opening of the answer."""
    prepared = bench.prepare(Work(Cell("mine", 64, protocol), (ITEM,) * 2, chat=True))
    whole = conversation(bench.tokenizer, ("user", f"{CONTEXT} {FIRST.ask}")) + "it is"
    ids = bench.tokenizer(whole, add_special_tokens=False).input_ids
    assert prepared.contexts[0] + prepared.turns[0].asks[0] == ids
    if protocol == "visible":
        assert len(prepared.turns[0].asks[0]) == 1
    else:
        assert bench.tokenizer.decode(prepared.contexts[0]).endswith("the code of the old hen is 7.")
        assert bench.tokenizer.decode(prepared.turns[0].asks[0]).startswith("what is the code")


def test_a_later_turn_closes_the_answer_and_asks_anew(bench: Bench) -> None:
    assert bench.template is not None
    before = conversation(bench.tokenizer, ("user", CONTEXT), ("assistant", "4821"), ("user", NEXT.ask))
    assert before.endswith("4821" + bench.template.later(NEXT).removesuffix("it is"))
    assert bench.template.later(NEXT).split()[0] == bench.tokenizer.eos_token


def test_a_templates_end_of_turn_ends_an_answer(bench: Bench) -> None:
    assert bench._stops(chat=True) == bench._stops(chat=False) == {bench.tokenizer.eos_token_id}
    other = Bench(*templated(TEMPLATE.replace("eos_token", "pad_token")), seed=0)
    assert other._stops(chat=True) == {other.tokenizer.eos_token_id, other.tokenizer.pad_token_id}
    words = Bench(*templated(TEMPLATE.replace("{{ eos_token }}", "end")), seed=0)
    assert words._stops(chat=True) == {words.tokenizer.eos_token_id}


def test_the_templates_tokens_count_in_the_length(bench: Bench) -> None:
    assert bench.template is not None
    asked = conversation(bench.tokenizer, ("user", CONTEXT))
    assert bench.template.count(CONTEXT) == len(bench.tokenizer(asked, add_special_tokens=False).input_ids)
    for task in ("niah_multikey_1", "turns"):
        (work,) = task_work([task], [2048], ["after"], 2, 0, bench.count, chosen_chat("auto", bench.template, "m"))
        prepared = bench.prepare(work)
        for i, context in enumerate(prepared.contexts):
            total = len(context) + sum(len(turn.asks[i]) + turn.most for turn in prepared.turns)
            assert work.chat and 0.95 * 2048 < total <= 2048


def test_a_template_that_changes_or_refuses_the_text_is_one_line() -> None:
    for template, told in (
        (TEMPLATE.replace("trim", "replace('fox', 'dog')"), "changes the text of a user's turn: use --chat off"),
        (TEMPLATE.replace("trim", "truncate(20)"), "changes the text of a user's turn: use --chat off"),
        ("{{ raise_exception('no users here') }}", "cannot be used: no users here; use --chat off"),
        ("{% for %}", "cannot be used: .*; use --chat off"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            Template(templated(template)[1]).first(CONTEXT, FIRST)
        assert "\n" not in str(caught.value)


def test_auto_asks_in_the_template_what_is_put_to_an_assistant() -> None:
    def count(text: str) -> int:
        return 5 + len(text.split())

    def chats(chat: Chat) -> list[bool]:
        work = task_work(["recall", "niah_single_1"], [1024], ["after"], 2, 0, lambda text: len(text.split()), chat)
        mine = prompt_work("mine", (Item("a b", (FIRST,)),), ["after"], lambda text: len(text.split()), chat)
        return [one.chat for one in (*work, *mine)]

    assert chats(Chat("auto", count)) == [False, True, True]
    assert chats(Chat("on", count)) == [True, True, True]
    assert chats(Chat("off", count)) == chats(Chat("auto", None)) == chats(PLAIN) == [False, False, False]


def test_on_without_a_template_is_refused(tmp_path: Any) -> None:
    out = tmp_path / "out"
    for chat, told in (("on", "the tokenizer of 'builtin' has no chat template"), ("yes", "choose from auto, on, off")):
        run = kvfloor("audit", "--chat", chat, "--texts", "none", "--out", str(out))
        assert run.returncode == 2 and told in run.stderr and len(run.stderr.strip().splitlines()) == 1
        assert not (out / "rows.jsonl").exists()


def test_later_turns_continue_the_conversation_that_a_plain_loop_holds(bench: Bench) -> None:
    """Two turns in a batch of unlike lengths: the same answers as one sample at a time, by transformers' generate."""
    import torch

    other = Item("the code of the old hen is 7. it was today in the river.", (FIRST, NEXT))
    work = Work(Cell("mine", 64, "after"), (ITEM, other, Item(f"it was today. {CONTEXT}", (NEXT, FIRST))), chat=True)
    prepared = bench.prepare(work)
    told: list[list[list[int]]] = []
    kept = bench._shares
    bench._shares = lambda item, said: told.append([list(one) for one in said]) or kept(item, said)  # type: ignore
    try:
        bench.run(parse("exact"), prepared)
    finally:
        del bench._shares
    stop = bench.tokenizer.eos_token_id
    for i in range(3):
        ids, said = list(prepared.contexts[i]), []
        for turn in prepared.turns:
            ids += turn.asks[i]
            out = bench.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=turn.most)[0, len(ids) :]
            new = out.tolist()
            said.append(new[: new.index(stop)] if stop in new else new)
            ids += said[-1]
        assert told[i] == said


@pytest.mark.slow
def test_smollm2s_pieces_are_the_whole_prompts_tokens() -> None:
    tokenizer = models.load("smollm2")[1]
    template = Template.of(tokenizer)
    assert template is not None

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for task in ("niah_single_2", "ruler_vt", "ruler_qa", "tool_call", "turns", "ledger"):
        (work,) = task_work([task], [1200], ["after"], 2, 0, template.count, Chat("on", template.count))
        for item in work.items:
            first = item.turns[0]
            before, after = template.first(item.context, first)
            content = item.context + first.ask
            whole = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
            )
            assert tokens(before) + tokens(after) == whole + tokens(first.opening)
            assert before.endswith(item.context)
