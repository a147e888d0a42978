"""Check that answers do not depend on padding, later tokens, other queries, or how a stream is split into calls.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. A method evicts
tokens at block ends, which are the multiples of `Method.block` tokens of a row; a row is the stream of one kv head of
one sequence.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from kvfloor.check.law import Setting, require
from kvfloor.check.streams import (
    long_stream_length,
    of_rows,
    play,
    probes,
    require_same_memory,
    some_absent,
    spec_for,
    stream_for,
)
from kvfloor.check.tolerance import require_agreement, require_same_bits
from kvfloor.core.method import Method


def check_chunking(method: Method, at: Setting) -> None:
    """Require that the held tokens and the answers are the same, however a stream is split into calls.

    The stream has at least 20 block ends and is tested with and without padding. It is cut at random places; without
    padding it is also cut token by token at its start and after the prompt. The pieces lie at other memory addresses
    than the stream, so that a dependence on memory alignment would show. For a method whose memory never grows and that
    stores each held token separately, the bytes of the saved states must be equal too.
    """
    spec, n = spec_for(method, at), long_stream_length(method)
    stream = stream_for(method, at, n=n)
    moved = stream.rows(range(spec.rows))
    rng = random.Random(at.seed)
    few = rng.sample(range(1, n), n // 24)
    slow = (*range(1, 6), *range(stream.prompt + 1, min(n, stream.prompt + method.block + 4)))
    for present in (None, some_absent(stream, at.seed)):
        whole = method.open(spec)
        outputs = play(whole, stream, present=present)
        split = method.open(spec)
        cuts = [*few, *slow] if present is None else few
        pieces = play(split, moved, cuts=cuts, present=present)
        what = "a stream in one call and in pieces" + ("" if present is None else ", with pads")
        require_agreement(pieces, outputs, at.dtype, f"the outputs of {what}")
        require_same_memory(split, whole, at, what)


def check_causality(method: Method, at: Setting) -> None:
    """Require that later tokens do not change an earlier answer.

    The first tokens of a stream are given alone, with the rest of the stream, and with other tokens after them; their
    answers must agree. A method that claims `block_causal` may let a query see later tokens of its own block: if the
    first tokens end inside a block, answers in this block are not compared.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    outputs = play(method.open(spec), stream)
    future = stream_for(method, at, salt=1)
    future = replace(future, v=-8.0 * future.v)
    for cut in (stream.prompt // 2, stream.n - 3):
        settled = cut - cut % method.block if method.traits.block_causal else cut
        early = outputs[:, :, :settled]
        prefix = play(method.open(spec), stream, stop=cut)[:, :, :settled]
        require_agreement(
            prefix, early, at.dtype, f"the answers of the first {settled} tokens, alone and in a longer call"
        )
        changed = play(method.open(spec), stream.with_tail(future, cut))[:, :, :settled]
        require_agreement(changed, early, at.dtype, f"the answers of the first {settled} tokens, under two futures")


def check_queries_independent(method: Method, at: Setting) -> None:
    """Require that the answer to a query does not depend on the other queries of the same `read`.

    The call `read` of a state returns the answers to queries without storing tokens.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state = method.open(spec)
    play(state, stream)
    together = probes(spec, 6)
    part = state.read(together)
    for i in (0, 3, 5):
        alone = state.read(together[:, i : i + 1])
        require_agreement(alone.mean[:, 0], part.mean[:, i], at.dtype, f"answer {i}, alone and among others")
        require_agreement(
            alone.log_mass[:, 0], part.log_mass[:, i], at.dtype, f"log-mass {i}, alone and among others", 4.0
        )
    crowd = torch.cat([together[:, :1], -5.0 * together[:, 1:]], 1)
    require_agreement(state.read(crowd).mean[:, 0], part.mean[:, 0], at.dtype, "an answer among two sets of others")


def check_pads(method: Method, at: Setting) -> None:
    """Require that padding has no effect, whatever numbers it holds: a padded row behaves as its real tokens alone."""
    spec, stream = spec_for(method, at), stream_for(method, at)
    present = some_absent(stream, at.seed)
    absent = ~present
    kept, answers = [], []
    for garbage in (torch.nan, 100.0):
        k = stream.k.masked_fill(absent.unsqueeze(-1), garbage)
        v = stream.v.masked_fill(absent.unsqueeze(-1), garbage)
        q = stream.q.masked_fill(absent[:, None, :, None], garbage)
        state = method.open(spec)
        answers.append(play(state, replace(stream, q=q, k=k, v=v), present=present))
        kept.append(state)
    at_pads = answers[0].transpose(1, 2)[absent]
    require(bool((at_pads == 0).all()), f"outputs at absent positions are not 0: {at_pads.flatten()[:3].tolist()}")
    require_same_bits(answers[0], answers[1], "outputs with two kinds of garbage at absent positions")
    require(kept[0].to_bytes() == kept[1].to_bytes(), "garbage at absent positions changed the state")
    require(
        torch.equal(kept[0].seen, present.sum(1)),
        f"{present.sum(1).tolist()} real tokens, seen {kept[0].seen.tolist()}",
    )
    for row in range(spec.rows):
        alone = of_rows(method, [row]).open(spec.select(torch.tensor([row])))
        outputs = play(alone, stream.rows([row]).packed(present[row]))
        padded = kept[0].clone()
        padded.select_rows(torch.tensor([row]))
        what = f"row {row} with pads and without"
        require_agreement(answers[0][row][:, present[row]], outputs[0], at.dtype, f"the outputs of {what}")
        require_same_memory(padded, alone, at, what)
