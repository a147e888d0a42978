"""Provide the texts that an audit reads: shipped public-domain ones, generated ones for the built-in model, or files.

A passage is a run of consecutive tokens of a text, usually its beginning. An excerpt is what is read of a passage: a
context, and the continuation, whose tokens are predicted (scored). Several contexts of different lengths make several
excerpts of one passage. A race, i.e. an audit with a time limit, may read further passages of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvfloor.audit.nats import BLOCK_TOKENS, TextCell
from kvfloor.files import read_regular
from kvfloor.statistics import MIN_BLOCKS
from kvfloor.tasks.lexicon import FULL
from kvfloor.tasks.mixture import mix, mixable
from kvfloor.tasks.task import builtin_count

SHIPPED = ("speech", "novel", "facts")
"""Texts in the package, each at least 10,000 tokens of SmolLM2 long (`tasks/texts/README.md`)."""

GENERATED = ("mixture-0", "mixture-1", "mixture-2")
"""Texts in the built-in model's own vocabulary: facts of several tasks among filler, unlike those of its training."""

UNREAD = "mixture-3"
"""A generated text that no audit reads unless it is named, to choose settings on."""

MOST_PASSAGES = 8
"""Passages of one text that a race may read, the first included."""

MOST_TEXT_BYTES = 2**27
_GENERATED = (*GENERATED, UNREAD)
_GENERATED_FROM = 1_000_000  # index of the first generated text: far from the indices of any sample


@dataclass(frozen=True)
class Excerpt:
    """Hold one excerpt of a text, as token ids.

    cell          the text's name, with the numbers of tokens of context and continuation
    context       token ids of the context
    continuation  token ids of the continuation
    passage       number of the passage in its text, from 1
    """

    cell: TextCell
    context: list[int]
    continuation: list[int]
    passage: int = 1


def check_texts(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is neither a text of the package nor a file, and for two texts of one name.

    The report names a file without its folder and ending, so `a/x.txt` and `b/x.md` have one name.
    """
    for name in names:
        if name not in (*SHIPPED, *_GENERATED) and not Path(name).exists():
            raise ValueError(f"no text {name!r}: give a file, or one of {', '.join((*SHIPPED, *_GENERATED))}")
    stems = [Path(name).stem for name in names]
    if len(set(stems)) != len(stems):
        raise ValueError(f"two of the texts are named {max(stems, key=stems.count)!r}: rename one")


def text_of(name: str, tokens: int) -> str:
    """Return the text of this name: a shipped one, a generated one, or the content of a file.

    A generated text is made so long that it has at least `tokens` tokens of the built-in model's tokenizer; other texts
    are returned whole. Raises ValueError for a name that is neither a text nor a readable UTF-8 file of at most 128
    MiB.
    """
    if name in SHIPPED:
        return files("kvfloor.tasks").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")
    if name in _GENERATED:
        pieces, count, index = [], builtin_count(), _GENERATED_FROM * (1 + _GENERATED.index(name))
        while sum(map(count, pieces)) < tokens:
            pieces.append(mix(mixable(), 0, index + len(pieces), max(256, tokens), 0, count, FULL)[0])
        return " ".join(pieces)
    check_texts([name])
    path = Path(name)
    try:
        return read_regular(path, MOST_TEXT_BYTES, "text").decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as cause:
        raise ValueError(f"cannot read the text {name!r} as UTF-8: {cause}; convert it first") from None


def check_scored(texts: int, continuation: int, limited: bool) -> None:
    """Raise ValueError if the scored tokens are too few for a confidence interval.

    texts         number of texts
    continuation  number of scored tokens of each text
    limited       True if texts may be left out for lack of time; then the first text alone must have enough
    """
    count = 1 if limited else texts
    if texts and count * (continuation // BLOCK_TOKENS) < MIN_BLOCKS:
        least = BLOCK_TOKENS * -(-MIN_BLOCKS // count)
        told = "with --minutes, one text must do alone" if limited else f"on {texts} texts"
        raise ValueError(
            f"--continuation {continuation}: too few scored tokens for an interval ({told}); give at least {least}"
        )


def further_excerpts(
    names: Sequence[str], contexts: Sequence[int], continuation: int, encode: Callable[[str], list[int]]
) -> list[Excerpt]:
    """Return the excerpts of the further passages: the second passage of each text, then the third of each, and so on.

    names, contexts, continuation  names of texts, context lengths, and number of scored tokens
    encode                         function that returns the token ids of a text
    A passage is as long as the longest context and the continuation together. It starts with the special tokens that
    `encode` puts before every text. It gives one excerpt per context length. A text has at most MOST_PASSAGES
    passages, the first included, and no more than its tokens allow. Generated texts have no further passages.
    """
    found, head, length = [], encode(""), max(contexts) + continuation
    bodies = {name: encode(text_of(name, length))[len(head) :] for name in names if name not in _GENERATED}
    for number in range(2, MOST_PASSAGES + 1):
        for name, body in bodies.items():
            begin = (number - 1) * length
            ids = head + body[begin : begin + length - len(head)]
            if len(ids) == length:
                for context in dict.fromkeys(contexts):
                    cell = TextCell(f"{Path(name).stem} ({number})", context, continuation)
                    found.append(Excerpt(cell, ids[:context], ids[context : context + continuation], number))
    return found


def excerpts(
    names: Sequence[str], contexts: Sequence[int], continuation: int, encode: Callable[[str], list[int]]
) -> list[Excerpt]:
    """Return the excerpts at the beginning of each text, one per context length.

    names, contexts, continuation  names of texts, context lengths, and number of scored tokens
    encode                         function that returns the token ids of a text
    Raises ValueError for a text shorter than the longest context and the continuation together, and for names that
    `check_texts` refuses.
    """
    check_texts(names)
    found = []
    for name in names:
        need = max(contexts) + continuation
        ids = encode(text_of(name, need))
        if len(ids) < need:
            raise ValueError(
                f"the text {name!r} has {len(ids):,} tokens; a context of {max(contexts):,} and a continuation of "
                f"{continuation:,} need {need:,}: give a longer text or smaller numbers"
            )
        for context in dict.fromkeys(contexts):
            cell = TextCell(Path(name).stem, context, continuation)
            found.append(Excerpt(cell, ids[:context], ids[context : context + continuation]))
    return found


def unread_excerpt(
    names: Sequence[str], read: int, context: int, continuation: int, encode: Callable[[str], list[int]]
) -> Excerpt:
    """Return an excerpt that has no token in common with the first passages of the texts `names`.

    names                  names of texts, of which an audit reads the first passages
    read                   tokens of such a passage
    context, continuation  tokens of the excerpt's context and continuation
    encode                 function that returns the token ids of a text
    It lies behind the first passage of the first text that is long enough, or begins a shipped text that is not among
    `names`; if all of `names` are generated texts, it is of another generated one. Its text is called "NAME (unread)".
    Raises ValueError if no text is long enough.
    """
    if names and set(names) <= set(GENERATED):
        (found,) = excerpts([UNREAD], [context], continuation, encode)
        return found
    head, length = encode(""), context + continuation
    written = [name for name in names if name not in _GENERATED]
    for name in (*written, *(name for name in SHIPPED if name not in names)):
        begin = read if name in names else 0
        body = encode(text_of(name, read + length))[len(head) :]
        ids = head + body[begin : begin + length - len(head)]
        if len(ids) == length:
            cell = TextCell(f"{Path(name).stem} (unread)", context, continuation)
            return Excerpt(cell, ids[:context], ids[context:])
    raise ValueError(
        f"none of the texts has {length:,} tokens that are not read already: give a longer text or a smaller context"
    )
