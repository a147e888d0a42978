"""Contract: what a failure in the middle of a call leaves behind."""

from __future__ import annotations

import torch

from kvfloor.check.faults import Call, broken_at, operations, spread_out
from kvfloor.check.ground import block_of, play, prompt_length, spec_for, stream_for
from kvfloor.check.law import Setting, require
from kvfloor.method import Method
from kvfloor.state import State

_POINTS = 7  # per call: a law is to be quick; the table of characterize/broken.py has them all


def check_broken(method: Method, at: Setting) -> None:
    """After a failure in the middle of a call the state is as it was, or refuses every further call."""
    state, stream, block = method.open(spec_for(method, at)), stream_for(method, at), block_of(method)
    middle = prompt_length(method)
    play(state, stream, stop=middle)  # the prompt is sealed, and 5 tokens of a block are in
    open_ended = method.open(spec_for(method, at))
    play(open_ended, stream, stop=middle - 1)
    q, k, v = (x[..., middle : middle + block + 3, :] for x in (stream.q, stream.k, stream.v))
    calls: dict[str, Call] = {
        "a one-token step": lambda state: state.step(q[:, :, :1], k[:, :1], v[:, :1]),
        "a step past a block's end": lambda state: state.step(q, k, v),
        "an append": lambda state: state.append(k, v),
        "an attend": lambda state: state.attend(q[:, :, :2]),
        "a select_rows": lambda state: state.select_rows(torch.arange(state.spec.rows).flip(0)),
    }
    for what, call in calls.items():
        _require_whole(state, what, call)
    _require_whole(open_ended, "a seal", lambda state: state.seal())


def _require_whole(state: State, what: str, call: Call) -> None:
    copy = state.clone()
    points = spread_out(operations(lambda: call(copy)), _POINTS)
    tally = broken_at(state, call, points)
    require(tally.silent is None, f"{what} failed {(tally.silent or [''])[0]}")
