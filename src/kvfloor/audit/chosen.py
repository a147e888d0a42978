"""Replace `auto` among an audit's methods by the methods that it chooses for each layer of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvfloor.audit.request import AuditRequest
from kvfloor.hf import choose_layers, prepare
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.auto import Auto
from kvfloor.models import load

Announce = Callable[[str], None]


def with_chosen(question: AuditRequest, track: Announce, announce: Announce) -> AuditRequest:
    """Check the arguments of an audit, and return them with `layers(...)` in place of every `auto(...)@BYTES`.

    The bytes are those of one request's cache in the loaded model's dtype, after the longest of the audit's contexts.
    The model is loaded only if there is an `auto`.

    question  the arguments of the audit
    track     called with a line of text before the model is loaded
    announce  called with a line of text that names the chosen methods
    Raises ValueError for arguments out of range, and if no methods can be chosen (see `kvfloor.hf.choose_layers`).
    """
    question.check()
    if not any(isinstance(parse(text), Auto) for text in question.methods):
        return question
    model, _ = load(question.model, question.accept_terms, track, device_map=question.device_map)
    prepare(model)
    length, methods = max(question.context_lengths), []
    for text in question.methods:
        if isinstance(parse(text), Auto):
            found = str(choose_layers(model, text, length))
            announce(f"{text} after {length:,} tokens is {found}")
            text = found
        methods.append(text)
    return replace(question, methods=tuple(methods))
