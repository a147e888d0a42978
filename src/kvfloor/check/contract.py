"""Check a method's text and docstrings, and the shapes, dtypes and side effects of its state's calls.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. The spec has the
sizes, dtype and constants that a state is opened for. A method's text, such as "h2o(recent=64)@512", names it, and
`parse` reads it. A log-mass is the log-sum-exp of a query's logits. A state's calls: `append` stores keys and values;
`step` stores tokens and returns the answers to their queries; `read` and `attend` return the answers to queries without
storing tokens. The message is the saved state (`to_bytes`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from kvfloor.check.law import Broken, Setting, require
from kvfloor.check.streams import play, probes, prompt_length, spec_for, stream_for
from kvfloor.check.tolerance import require_agreement
from kvfloor.core.method import Guarantee, Method
from kvfloor.methods.grammar import parse


def check_text(method: Method, at: Setting) -> None:
    """Require that a method is a frozen, hashable dataclass, and that its text parses back to it."""
    del at
    text = str(method)
    try:
        again = parse(text)
    except ValueError as cause:
        raise Broken(f"{text!r} does not parse back to the method: {cause}") from None
    require(again == method, f"{text!r} parses to another method, {again!r}")
    require(str(again) == text, f"the text {text!r} becomes {str(again)!r} after parsing")
    require(hash(again) == hash(method), f"equal methods {text!r} have different hashes")
    require(
        type(method).__name__ in repr(method), f"repr gives {method!r}, which does not name {type(method).__name__}"
    )
    require(dataclasses.is_dataclass(method), f"{type(method).__name__} is not a dataclass")
    value: Any = method
    for field in dataclasses.fields(value):
        try:
            setattr(method, field.name, getattr(method, field.name))
        except AttributeError:
            continue
        raise Broken(f"{text} is not frozen: {field.name} can be set")


def check_documented(method: Method, at: Setting) -> None:
    """Require that a method and its parts have docstrings, and that one of them names a source.

    The parts are its eviction policy, its summary of evicted tokens and its selector of the tokens to read. The source
    is a paper, in the class attribute `paper`.
    """
    del at
    parts = [method, *(part for part in method.parts if part is not None)]
    for part in parts:
        text = type(part).__doc__ or ""
        generated = text.startswith(f"{type(part).__name__}(")  # the text of a dataclass without a docstring
        require(bool(text) and not generated, f"{type(part).__name__} has no docstring")
    require(any(part.paper for part in parts), f"{method} names no source: set `paper` on the class")


def check_guarantee(method: Method, at: Setting) -> None:
    """Require that a guarantee has error, probability, norm, quantifier and source, and a reason if it is withdrawn.

    A guarantee is a proved bound on the error of answers; its quantifier says for which queries it holds, e.g. "every
    query". A state withdraws it if the tokens contradict one of its assumptions. The law is tested on the method, and
    on a state after a stream of tokens. A method without guarantee passes.
    """
    state, spec = method.open(spec_for(method, at)), spec_for(method, at)
    play(state, stream_for(method, at))
    for stated, where in ((method.guarantee(spec), "the method"), (state.guarantee(), "the state")):
        if stated is None:
            continue
        require(isinstance(stated, Guarantee), f"{where} states a {type(stated).__name__}, not a Guarantee")
        require(stated.epsilon >= 0 and 0 <= stated.delta < 1, f"{where} states {stated.epsilon=}, {stated.delta=}")
        for name in ("norm", "quantifier", "source"):
            require(bool(getattr(stated, name)), f"{where} states a guarantee without its {name}")
        require(stated.holds or bool(stated.why), f"{where} withdraws its guarantee and does not say why")


def check_empty(method: Method, at: Setting) -> None:
    """Require that `read` gives mean 0 and log-mass -inf before any token, and calls without tokens change nothing.

    Mean and log-mass are the two results of `read`: the weighted mean of the values, and the log-sum-exp of the logits.
    """
    spec = spec_for(method, at)
    state, stream = method.open(spec), stream_for(method, at, n=4)
    fresh = state.to_bytes()
    for moment in ("before the first token", "after calls without a token"):
        part = state.read(probes(spec))
        require(bool((part.mean == 0).all()), f"{moment} the mean is not 0: {part.mean.flatten()[:3].tolist()}")
        require(bool((part.log_mass == -torch.inf).all()), f"{moment} the log-mass is not -inf")
        answers = state.clone().attend(stream.q)  # of a clone: a policy may learn from it
        require(bool((answers == 0).all()), f"{moment} `attend` does not answer 0")
        state.append(stream.k[:, :0], stream.v[:, :0])
        outputs = state.step(stream.q[:, :, :0], stream.k[:, :0], stream.v[:, :0])
        require(outputs.shape == (spec.rows, at.g, 0, spec.dv), f"a step of 0 tokens gives {tuple(outputs.shape)}")
        absent = torch.zeros(spec.rows, stream.n, dtype=torch.bool)
        outputs = state.step(stream.q, stream.k, stream.v, absent)
        require(bool((outputs == 0).all()), "a step of absent tokens only does not answer 0")
    require(state.seen.tolist() == [0] * spec.rows, f"absent tokens were counted as seen: {state.seen.tolist()}")
    require(state.read(probes(spec, 0)).mean.shape == (spec.rows, 0, spec.dv), "a read of 0 queries has another shape")
    require(state.to_bytes() == fresh, "calls without a token changed the message")


def check_shapes(method: Method, at: Setting) -> None:
    """Require that answers have the shapes and dtypes that follow from the spec and the queries.

    They must also be finite and carry no gradient. The same is required of the two token counts per row: `seen` (all
    tokens so far) and `held` (tokens still stored).
    """
    spec = dataclasses.replace(spec_for(method, at), dv=24)
    state, stream = method.open(spec), stream_for(method, at, spec)
    outputs = play(state, stream)
    part, asked = state.read(probes(spec, 7)), state.attend(stream.q[:, :, :3])
    clock = (spec.rows,)
    for name, tensor, shape, dtype in (
        ("step", outputs, (spec.rows, at.g, stream.n, 24), spec.dtype),
        ("attend", asked, (spec.rows, at.g, 3, 24), spec.dtype),
        ("read's mean", part.mean, (spec.rows, 7, 24), spec.compute_dtype),
        ("read's log-mass", part.log_mass, (spec.rows, 7), spec.compute_dtype),
        ("seen", state.seen, clock, torch.int64),
        ("held", state.held, clock, torch.int64),
    ):
        require(tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        require(tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}")
        require(not tensor.requires_grad, f"{name} carries a gradient")
        require(bool(torch.isfinite(tensor).all()), f"{name} has NaN or infinite entries")
    require(state.seen.tolist() == [stream.n] * spec.rows, f"{stream.n} tokens went in, seen is {state.seen.tolist()}")


def check_read_pure(method: Method, at: Setting) -> None:
    """Require that `read` changes nothing, gives the same bits when repeated, and agrees with `attend`.

    Unlike `read`, `attend` may change the state: a method may use its queries to decide which tokens to evict later.
    """
    spec = spec_for(method, at)
    state, stream = method.open(spec), stream_for(method, at)
    play(state, stream, stop=prompt_length(method) + 5)
    before, nbytes, size = state.to_bytes(), state.nbytes, 3
    first, second = state.read(probes(spec)), state.read(probes(spec))
    require(torch.equal(first.mean, second.mean), "asking the same twice gives different bits")
    asked = stream.q[:, :, :size]
    expected = state.read(asked.reshape(spec.rows, at.g * size, spec.d)).mean.view(spec.rows, at.g, size, spec.dv)
    require(state.to_bytes() == before, "`read` changed the state: its message differs before and after")
    require(state.nbytes == nbytes, f"`read` changed nbytes from {nbytes} to {state.nbytes}")
    require_agreement(state.attend(asked), expected.to(at.dtype), at.dtype, "`attend` and `read` on the same queries")
