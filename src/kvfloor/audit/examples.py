"""Decode example answers of the exact cache and of the recommended setting, to be read side by side.

A setting is a method with its budget. Each answer is decoded greedily after the same prompt: the model reads the
context under the setting, the cache is told that the prompt ends (`seal`), the question is fed if there is one, and the
model answers. The exact cache keeps every token; here it is transformers' own cache. An excerpt is the context and the
continuation that an audit reads of a text. A cell is a task at a context length under a protocol (question asked before
or after the compression). A setting is safe if the audit shows that it loses little quality; the safe setting of fewest
bytes is recommended. The setting nearest to safe is the one whose possible loss (upper confidence limit) is the
smallest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers.cache_utils import DynamicCache

from kvfloor.audit.explain import closest_setting, next_smaller
from kvfloor.audit.measure import CHUNK_SLOTS, Bench
from kvfloor.audit.plan import Work
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.records import read_records
from kvfloor.audit.rows import Row
from kvfloor.audit.texts import Excerpt
from kvfloor.core.method import Method
from kvfloor.files import replace_file
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue

MOST_TOKENS = 48
"""Tokens of an answer that are decoded at most."""

MOST_TASKS = 4
"""Tasks of which an example is shown."""

SUMMARISE = "Summarise the text above in one sentence."
_MOST_BYTES = 2**24  # of an examples.jsonl
_CHAT_SETTINGS = 1  # beside exact: a whole context more is taken in for each
_END_CHARACTERS = 400  # of a prompt's end that an example keeps

Kind = Literal["text", "chat", "task"]


@dataclass(frozen=True)
class Answered:
    """Hold one greedy answer, compared with the exact cache's answer to the same prompt.

    setting                the setting as text, e.g. `h2o@256`; "exact" for the exact cache
    tokens                 token ids of the answer
    same                   number of tokens from the start of the answer that equal the exact cache's
    agrees, differs, rest  the answer as text, in three pieces: these `same` tokens, the one token after them, and all
                           later tokens
    is_same                True if the answer has exactly the exact cache's tokens; False also if it only ends earlier
    """

    setting: str
    tokens: tuple[int, ...]
    same: int
    agrees: str
    differs: str
    rest: str
    is_same: bool


@dataclass(frozen=True)
class SideBySide:
    """Hold one prompt, its right answer if there is one, and the answers of the exact cache and of a few settings.

    kind        "text": a text is continued; "chat": a question about the text is put to a chat model; "task": a sample
                of a task
    name        the text, or the cell (task, context length, protocol), in words
    context     number of tokens of the context
    prompt_end  the last characters of the context
    question    the question after the context; "" without one
    truth       the text's own continuation or the task's right answer; None where any answer may be right
    exact       the exact cache's answer
    others      the answers of the recommended setting and of the one with the next fewer bytes; if none is recommended,
                the answer of the setting nearest to safe, i.e. of the one whose possible loss is the smallest
    """

    kind: Kind
    name: str
    context: int
    prompt_end: str
    question: str
    truth: str | None
    exact: Answered
    others: tuple[Answered, ...]


@dataclass(frozen=True)
class Prompt:
    """Hold one example's token ids.

    context  the context; the cache is compressed at its end
    ask      the question that follows it; empty if the model is to continue the context
    """

    context: list[int]
    ask: list[int]


class Speaker:
    """Answer prompts greedily under a few settings, and put the answers beside the exact cache's.

    bench    the model with its tokenizer
    methods  the method of each setting, by the setting's text
    """

    def __init__(self, bench: Bench, methods: Mapping[str, Method]) -> None:
        self.bench, self.methods = bench, methods

    def example(self, kind: Kind, name: str, prompt: Prompt, truth: str | None, question: str, most: int) -> SideBySide:
        """Decode the exact cache's answer to a prompt and those of the settings, and return them side by side.

        kind      "text": a text is continued; "chat": a question about the text is put to a chat model, and of the
                  settings only the first answers; "task": a sample of a task
        name      the text, or the cell, in words
        prompt    token ids of the context and of the question
        truth     the text's own continuation or the task's right answer; None where any answer may be right
        question  the question as text; "" without one
        most      largest number of tokens of an answer
        """
        exact = self.tokens(prompt, None, most)
        shown = list(self.methods)[: _CHAT_SETTINGS if kind == "chat" else None]
        others = {text: self.tokens(prompt, self.methods[text], most) for text in shown}
        return SideBySide(
            kind=kind,
            name=name,
            context=len(prompt.context),
            prompt_end=_end(self._text(prompt.context)),
            question=question,
            truth=truth,
            exact=self._answered("exact", exact, exact),
            others=tuple(self._answered(text, tokens, exact) for text, tokens in others.items()),
        )

    def tokens(self, prompt: Prompt, method: Method | None, most: int) -> list[int]:
        """Return the token ids of a greedy answer of at most `most` tokens to a prompt.

        method: the method that compresses the cache; None: the exact cache.
        """
        bench = self.bench
        if method is None:
            cache = DynamicCache(config=bench.model.config)
        else:
            cache = CompressedCache(bench.model, method, seed=bench.seed, context=len(prompt.context))
        dialogue = Dialogue.start(bench.model, cache, 1)
        dialogue.feed([prompt.context], CHUNK_SLOTS)
        if isinstance(cache, CompressedCache):
            cache.seal()
        if prompt.ask:
            dialogue.feed([prompt.ask])
        return dialogue.answer(most, bench.tokenizer.eos_token_id)[0][0]

    def _answered(self, setting: str, tokens: Sequence[int], exact: Sequence[int]) -> Answered:
        pairs = zip(tokens, exact, strict=False)
        same = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(exact)))
        whole = self._text(tokens)
        start = self._length_of_text(whole, tokens, same)
        stop = self._length_of_text(whole, tokens, same + 1)
        is_same = list(tokens) == list(exact)
        return Answered(setting, tuple(tokens), same, whole[:start], whole[start:stop], whole[stop:], is_same)

    def _length_of_text(self, whole: str, tokens: Sequence[int], count: int) -> int:
        """Return the number of characters of `whole`, the text of all `tokens`, that the first `count` tokens make.

        If these tokens end in the middle of a character's bytes, that character is not counted.
        """
        text = self._text(tokens[:count])
        return next(size for size in range(len(text), -1, -1) if whole.startswith(text[:size]))

    def _text(self, tokens: Sequence[int]) -> str:
        return self.bench.tokenizer.decode(tokens, skip_special_tokens=True)

    def chat(self, excerpt: Excerpt) -> Prompt | None:
        """Return the prompt that asks a chat model to summarise the context of an excerpt.

        The result is None if the tokenizer has no chat template, if the template refuses or changes the context, or if
        prompt and answer together have more tokens than the model has positions.
        """
        tokenizer = self.bench.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        text = self._text(excerpt.context)
        messages = [{"role": "user", "content": f"{text}\n\n{SUMMARISE}"}]
        try:
            whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template is a program of the model's author, and may refuse such messages
            return None
        before, found, after = whole.rpartition(SUMMARISE)
        if not found or text.strip() not in before:
            return None
        encode = [
            tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in (before, found + after)
        ]
        prompt = Prompt(*encode)
        most = getattr(self.bench.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        fits = not isinstance(most, int) or len(prompt.context) + len(prompt.ask) + MOST_TOKENS <= most
        return prompt if fits else None


def _end(text: str) -> str:
    """Return the end of a text, at most _END_CHARACTERS characters, cut at the beginning of a word if possible."""
    if len(text) <= _END_CHARACTERS:
        return text
    end = text[-_END_CHARACTERS:]
    return end.partition(" ")[2] or end


def shown_settings(answer: Recommendation) -> list[str]:
    """Return the settings, as text, whose answers are shown beside the exact cache's, given the recommendation.

    These are the recommended setting and the one with the next fewer bytes; if none is recommended, the one that is
    nearest to safe. The list is empty if no setting was judged. `answer` is the recommendation.
    """
    chosen = answer.chosen
    found = [closest_setting(answer)] if chosen is None else [chosen, next_smaller(answer, chosen)]
    return [one.setting for one in found if one is not None]


def text_examples(speaker: Speaker, excerpt: Excerpt, progress: Callable[[str], None]) -> list[SideBySide]:
    """Continue an excerpt's context, and ask a chat model to summarise it; return one or two examples.

    speaker   answers each prompt with the exact cache and under a few settings, of which only the first answers the
              chat model's prompt
    excerpt   context and continuation as token ids; the continuation is the first example's right answer
    progress  function that is called with a line of text before each example
    The second example is left out if the model has no usable chat template.
    """
    progress(f"{excerpt.cell.text}: an example answer")
    most = min(MOST_TOKENS, len(excerpt.continuation))
    truth = speaker.bench.tokenizer.decode(excerpt.continuation[:most], skip_special_tokens=True)
    name = excerpt.cell.text
    found = [speaker.example("text", name, Prompt(excerpt.context, []), truth, "", most)]
    if (prompt := speaker.chat(excerpt)) is not None:
        progress(f"{excerpt.cell.text}: an example question")
        found.append(speaker.example("chat", name, prompt, None, SUMMARISE, MOST_TOKENS))
    return found


def task_examples(
    speaker: Speaker, work: Sequence[Work], rows: Sequence[Row], progress: Callable[[str], None]
) -> list[SideBySide]:
    """Answer one sample of each of the first tasks that were measured, at most 4 (MOST_TASKS): one example per task.

    The sample is the first in the task's first measured cell that exact answers right and the first setting of
    `speaker.methods` answers wrong; if there is none, the cell's first sample.

    speaker   answers each prompt with the exact cache and under the settings `speaker.methods`
    work      the cells with their samples; a cell without a row in `rows` is skipped
    rows      the measured results: one per setting and cell
    progress  function that is called with a line of text before each example
    """
    measured = {row.cell for row in rows}
    cells: dict[str, Work] = {}
    for one in work:
        if one.cell in measured:
            cells.setdefault(one.cell.task, one)
    found = []
    for one in list(cells.values())[:MOST_TASKS]:
        progress(f"{one.cell.task}: an example answer")
        item = one.items[_lost_sample(one, rows, next(iter(speaker.methods), ""))]
        prepared = speaker.bench.prepare(replace(one, items=(item,)))
        turn = prepared.turns[0]
        prompt = Prompt(prepared.contexts[0], turn.asks[0])
        found.append(speaker.example("task", str(one.cell), prompt, item.answer, item.question, turn.most))
    return found


def _lost_sample(work: Work, rows: Sequence[Row], setting: str) -> int:
    """Return the index of a cell's first sample that exact answers right and the setting wrong; 0 if there is none.

    `work` is the cell with its samples. `rows` are the results of all settings; they say which answers are right.
    """
    outcomes = {row.method: row.outcomes for row in rows if row.cell == work.cell}
    pairs = zip(outcomes.get("exact", ())[: len(work.items)], outcomes.get(setting, ()), strict=False)
    return next((index for index, (exact, other) in enumerate(pairs) if exact and not other), 0)


def write_examples(path: Path, examples: Iterable[SideBySide]) -> None:
    """Write the examples to an `examples.jsonl` at `path`, one per line; a failed write leaves the file as it was."""
    replace_file(path, "".join(json.dumps(asdict(one)) + "\n" for one in examples))


def read_examples(path: Path) -> list[SideBySide]:
    """Read the examples that `write_examples` wrote. Raises ValueError naming the file if a line is no example.

    A file of more than _MOST_BYTES raises ValueError too.
    """
    read = read_records(path, SideBySide, _MOST_BYTES, "examples.jsonl", "an example")
    try:
        return [replace(one, exact=_read(one.exact), others=tuple(map(_read, one.others))) for one in read]
    except TypeError as error:
        raise ValueError(f"{str(path)!r} has an answer that is none: {error}") from error


def _read(plain: Any) -> Answered:
    return Answered(**plain | {"tokens": tuple(plain["tokens"])})
