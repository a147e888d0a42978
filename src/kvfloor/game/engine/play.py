"""Play the INDEX game in two processes: Alice fills a state, its bytes go to a fresh process, and Bob answers there.

A state is the memory that a KV-cache method keeps of a stream of tokens. Alice hides values in the tokens that she
appends to the state. Bob reads the values back by queries; a hidden row is the dv values that one query reads. The
message is the bytes of Alice's state.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfloor.core import message as wire
from kvfloor.core.budget import resolve
from kvfloor.core.method import Method, call_text
from kvfloor.game.engine.instance import Instance
from kvfloor.game.engine.secret import Hidden
from kvfloor.methods.grammar import parse

OPTIMUM = "optimum"  # in place of a method: the method against which the instance's floor is tight
ALL_ROWS_UP_TO = 16_384  # rows of a spike; of more, a sample is asked unless the caller says otherwise
ROWS_SAMPLED = 2_048
NOT_REBUILT = 3  # Bob's exit status when the public half fails: an error of the set-up, not of the state
_INTERPRETER_NEEDS = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")  # to find its own libraries
_ARITHMETIC = (  # chooses the instructions that torch computes with, and so how answers round
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE"),
)
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from kvfloor.game.bob import main; main()"


@dataclasses.dataclass(frozen=True)
class Played:
    """Record one game: the hidden levels, the answers of Alice's and Bob's states, and the sizes in bytes.

    A hidden level is a whole number x in [0, 2^bits). A row is the dv hidden levels that one query reads.
    method         the method as text
    rows, sampled  (m,) the rows queried, numbered across streams; sampled is True if they are a random sample
    hidden         (m, dv) the hidden levels of these rows
    live           (m, dv) answers of the state that Alice filled: attention outputs, in which level x is about
                   x / (2^bits - 1)
    restored       (m, dv) the same of the state that Bob restored from the message (the bytes of Alice's state); None
                   if Bob could not answer from the message, and `why` then gives the reason
    message_bytes  size of the message; payload_bytes of it are not header or digest
    state_bytes    size of Alice's state, with what it keeps outside of its memory
    scores_read    scores q.k that are read to answer one query token, over all streams
    hidden_seed    seed that repeats the hidden values
    seconds        duration of the game
    """

    method: str
    rows: Tensor  # (m,) queried rows, numbered across streams
    sampled: bool
    hidden: Tensor  # (m, dv) their hidden levels
    live: Tensor  # (m, dv) float32, from Alice's own state
    restored: Tensor | None  # (m, dv) float32, from the message alone
    message_bytes: int
    payload_bytes: int
    state_bytes: int
    scores_read: int = 0  # scores q.k read to answer one query token, over all streams
    hidden_seed: str = ""
    seconds: float = 0.0
    why: str = ""

    @property
    def agree(self) -> bool:
        """Return True if Alice's live state and the state restored from the message gave bit-identical answers."""
        return self.restored is not None and self.live.numpy().tobytes() == self.restored.numpy().tobytes()


def method_text(method: Method, given: str | None = None) -> str:
    """Return a text from which a fresh process rebuilds the method.

    Three texts are tried in this order: `given` (the text from which the caller made the method, if any), `str(method)`
    and `module:Class(...)`. The first that parses to an equal method is returned. Raises ValueError if none does.
    """
    own = type(method)
    for text in (given, str(method), call_text(f"{own.__module__}:{own.__qualname__}", method)):
        try:
            if text is not None and parse(text) == method:
                return text
        except ValueError:
            continue
    raise ValueError(
        f"{method} cannot be rebuilt from text in a fresh process: define {own.__qualname__} at the top level of an "
        "importable module, as a frozen dataclass whose arguments are numbers or words"
    )


def play_index(
    method: Method | str, instance: Instance, hidden: Hidden, sampled: int | None = None, *, isolated: bool = True
) -> Played:
    """Play one game: hide values in a state, send its bytes, and query both the state and its restored copy.

    method    a method or its text; "optimum" stands for the method of least memory known for the instance
    instance  what Alice and Bob both know of the game: keys, stream and queries. All that Bob's process receives
              besides the message and the rows to query (method, instance, settings of this process) is fixed before the
              first value is streamed
    hidden    draws the hidden values, and the rows to query if `sampled` is given
    sampled   number of hidden rows (the dv values that one query reads) to query, drawn with replacement after the
              message (the bytes of the state) is fixed; None: every row once
    isolated  True: a fresh process restores the message; False: this process does
    Returns the answers and sizes (`Played`). Raises ValueError for a method that cannot be opened or rebuilt.
    """
    started = time.perf_counter()
    if method == OPTIMUM:
        method = instance.optimum()
    given = method if isinstance(method, str) else None
    lifted = instance.lift(parse(method) if isinstance(method, str) else method)
    method = resolve(lifted, instance.spec(), length=instance.length)
    request = _request(method_text(method, given), instance)
    levels = instance.draw(hidden)
    state = method.open(instance.spec())
    instance.feed(state, levels, hidden)
    payload_bytes = 0
    try:
        state_bytes, message, why = state.nbytes + state.cold_nbytes, state.to_bytes(), ""
        payload_bytes = wire.payload_bytes(message)
    except TypeError as cause:  # the core's refusal of a state that holds what it can neither size nor send
        state_bytes, message, why = 0, b"", f"the state has no message: {cause}"

    rows = None if sampled is None else hidden.rows(len(levels), sampled)
    live = instance.ask(state, rows)
    scores_read = state.scores_read if message else 0
    restored = None
    if not why:
        request["rows"] = None if rows is None else rows.tolist()
        if isolated:
            restored, why = _ask_fresh_process(request, message, live.shape)
        else:
            restored, why = _ask_here(method, instance, message, rows)
    return Played(
        method=str(method), rows=torch.arange(len(levels)) if rows is None else rows, sampled=rows is not None,
        hidden=levels if rows is None else levels[rows], live=live, restored=restored, message_bytes=len(message),
        payload_bytes=payload_bytes, state_bytes=state_bytes, scores_read=scores_read, hidden_seed=hidden.seed,
        seconds=time.perf_counter() - started, why=why,
    )  # fmt: skip


def _ask_here(method: Method, instance: Instance, message: bytes, rows: Tensor | None) -> tuple[Tensor | None, str]:
    try:
        return instance.ask(method.from_bytes(message), rows), ""
    except Exception as cause:
        return None, f"nothing could answer from the message: {cause}"


def _request(text: str, instance: Instance) -> dict[str, Any]:
    """Return all public data that Bob's process receives, as JSON types: method, instance and process settings.

    The search path for modules (`sys.path`) of this process is sent only for a method defined outside this package, so
    that its module is found. The environment variables that are sent tell Bob's process where its libraries are and
    which CPU instructions to use. They are read here, before the first value is streamed, so that no method can hide
    values in them.
    """
    third_party = ":" in text.split("@")[0]
    return {
        "method": text,
        "code_path": [os.path.abspath(entry) for entry in sys.path] if third_party else [],
        "kind": type(instance).__name__,
        "instance": dataclasses.asdict(instance),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in (*_INTERPRETER_NEEDS, *_ARITHMETIC) if name in os.environ},
    }


def _ask_fresh_process(request: dict[str, Any], message: bytes, shape: torch.Size) -> tuple[Tensor | None, str]:
    """Return Bob's answers, of shape `shape`, from a new interpreter: (answers, ""), or (None, reason) if it fails.

    The interpreter runs isolated (`python -I`), in an empty directory, with the environment variables of the request.
    It receives the request (the public data) and the message (the bytes of Alice's state) on stdin, and nothing else.
    Raises ValueError where the interpreter cannot rebuild the method or the instance.
    """
    package = importlib.util.find_spec("kvfloor")
    assert package is not None and package.origin is not None
    header = json.dumps(request).encode()
    with tempfile.TemporaryDirectory(prefix="kvfloor-bob-") as empty:
        bob = subprocess.run(
            [sys.executable, "-I", "-c", _BOOT, str(Path(package.origin).parents[1])],
            input=len(header).to_bytes(8, "little") + header + message,
            capture_output=True,
            cwd=empty,
            env=request["environment"],
            check=False,
        )
    last_words = (bob.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    if bob.returncode == NOT_REBUILT:
        raise ValueError(f"the fresh process could not rebuild {request['method']}: {last_words}")
    if bob.returncode != 0:
        return None, f"the fresh process could not answer from the message: {last_words}"
    if len(bob.stdout) != 4 * shape.numel():
        return None, f"the fresh process answered with {len(bob.stdout)} bytes, {4 * shape.numel()} were asked for"
    return torch.frombuffer(bytearray(bob.stdout), dtype=torch.float32).view(shape), ""
