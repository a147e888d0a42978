"""Put samples into a model's chat template: decide for which tasks, and cut the rendered text for an audit.

A sample is a context with questions about it. An audit feeds the context and each question to the model separately, so
the rendered conversation is cut where the context ends and where an answer is to be generated. A `Question` has the
text to ask (`ask`), and in `opening` the first words of the answer, if the model is given these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kvfloor.tasks import Question
from kvfloor.tasks.sample import apart

Wish = Literal["auto", "on", "off"]
WISHES = get_args(Wish)
_MARK = "kvfloor8437mark"  # marks a place in a text while a template is rendered


@dataclass(frozen=True)
class Chat:
    """Decide which tasks' samples are put into the model's chat template.

    wish   the user's choice. "on": all tasks. "off": none. "auto": the tasks whose questions ask an assistant for an
           answer; a question of another task is an unfinished text, which the answer continues
    count  function that returns the number of tokens of a text as a user's turn, the template's own tokens included;
           None if the tokenizer has no template: then no task's samples are put into one
    """

    wish: Wish = "auto"
    count: Callable[[str], int] | None = None

    def takes(self, fits: bool) -> bool:
        """Return True if the samples of a task are put into the template.

        fits: True if the task's questions ask an assistant for an answer, False if the answer continues their text.
        """
        return self.count is not None and (self.wish == "on" or (self.wish == "auto" and fits))


PLAIN = Chat()


def check_wish(wish: str) -> None:
    """Raise ValueError unless `wish` is "auto", "on" or "off"."""
    if wish not in WISHES:
        raise ValueError(f"--chat {wish!r}: choose from {', '.join(WISHES)}")


def chosen_chat(wish: Wish, template: Template | None, model: str) -> Chat:
    """Return the rule that decides which samples are put into the chat template.

    wish      the user's choice: "auto", "on" or "off"
    template  the tokenizer's chat template; None if it has none
    model     the model's name, for the error
    Raises ValueError for "on" without a template.
    """
    if wish == "on" and template is None:
        raise ValueError(f"--chat on: the tokenizer of {model!r} has no chat template; use --chat off or another model")
    return Chat(wish, None if template is None else template.count)


@dataclass(frozen=True)
class Template:
    """Render conversations by the chat template of `tokenizer`, and cut them into the texts to feed to the model."""

    tokenizer: Any

    @classmethod
    def of(cls, tokenizer: Any) -> Template | None:
        """Return a `Template` for this tokenizer, or None if it has no chat template."""
        return cls(tokenizer) if getattr(tokenizer, "chat_template", None) else None

    def first(self, context: str, question: Question) -> tuple[str, str]:
        """Render a context with its first question, and return (text up to the context's end, text after it).

        Context and question form one turn of the user. The second text ends where the model is to generate its answer:
        it has the question, the start of the assistant's turn, and the answer's first words, `question.opening`. Raises
        ValueError if the template changes the text of a user's turn.
        """
        ask = apart(question.ask)
        before, _, after = self._render([("user", f"{context}{_MARK}{ask}")]).partition(_MARK)
        kept = before.endswith(context.lstrip()) and after.startswith(ask.rstrip())
        if not kept or before + after != self._render([("user", context + ask)]):
            raise ValueError("the model's chat template changes the text of a user's turn: use --chat off")
        return before, after + question.opening.strip()

    def later(self, question: Question) -> str:
        """Return the text to feed between a generated answer and the answer to the next question.

        `question` is the next question. The text ends the assistant's turn, asks the question in a turn of the user,
        and begins the next turn of the assistant with the answer's first words, `question.opening`.
        """
        text = self._render([("user", "x"), ("assistant", _MARK), ("user", question.ask.strip())])
        return text[text.rindex(_MARK) + len(_MARK) :] + question.opening.strip()

    def count(self, text: str) -> int:
        """Count the tokens of a text as a user's turn, with the tokens that the template puts around it."""
        around = len(self._tokens(self._render([("user", "x")]))) - len(self._tokens("x"))
        return len(self._tokens(text)) + around

    def ends(self) -> list[int]:
        """Return a list with the id of the special token that ends an assistant's turn; an empty list without one."""
        after = self._tokens(self.later(Question("x", "")).lstrip())[:1]
        return [token for token in after if token in self.tokenizer.added_tokens_decoder]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _render(self, turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as cause:  # a template is a program: it may raise anything
            told = str(cause).strip().splitlines()[:1] or [type(cause).__name__]
            raise ValueError(f"the model's chat template cannot be used: {told[0]}; use --chat off") from None
