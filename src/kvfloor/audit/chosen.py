"""Add to an audit's methods those that are chosen by layer: `layers(...)` for each `auto(...)`, and for `--mixed`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvfloor.audit.proposals import proposals
from kvfloor.audit.request import AuditRequest
from kvfloor.hf import choose_layers, prepare
from kvfloor.models import load

Announce = Callable[[str], None]
Track = Callable[[int, str], None]


def with_chosen(question: AuditRequest, track: Track, announce: Announce) -> tuple[AuditRequest, tuple[str, ...]]:
    """Check the arguments of an audit; return them with `layers(...)` in place of what is chosen for the model.

    `layers(...)` takes the place of every `auto(...)@BYTES`, and joins the methods for each entry of `mixed`. The bytes
    are those of one request's cache in the loaded model's dtype, after the longest of the audit's contexts. With the
    arguments come sentences for the report, one for each setting that `mixed` added. The model is loaded only if there
    is something to choose.

    question  the arguments of the audit
    track     called with the number of all steps (0 while the model is loaded) and a line of text, before each step
    announce  called with lines of text that name the chosen methods, and tell how long their choice takes
    Raises ValueError for arguments out of range, and if no methods can be chosen (see `kvfloor.hf.choose_layers`).
    """
    question.check()
    autos = question.autos
    if not autos and not question.mixed:
        return question, ()
    device_map = question.device_map
    model, tokenizer = load(question.model, question.accept_terms, lambda text: track(0, text), device_map=device_map)
    prepare(model)
    length, methods = max(question.context_lengths), []
    for text in question.methods:
        if text in autos:
            found = str(choose_layers(model, autos[text], length))
            announce(f"{text} after {length:,} tokens is {found}")
            text = found
        methods.append(text)
    added = proposals(question, model, tokenizer, track, announce) if question.mixed else []
    methods += [text for text, _ in added]
    return replace(question, methods=tuple(methods), mixed=()), tuple(sentence for _, sentence in added)
