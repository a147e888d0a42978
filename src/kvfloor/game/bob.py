"""Run Bob, the receiver: a fresh process that answers every query from the public data and the message alone.

Bob reads 8 bytes of header length (little-endian), the JSON request and the message on stdin, and writes the answers as
raw float32 on stdout. Output that a method prints goes to stderr.
"""

import json
import os
import sys
import traceback

import torch

from kvfloor.game import INSTANCES
from kvfloor.game.engine.play import NOT_REBUILT
from kvfloor.methods.registry import parse


def main() -> None:
    """Answer one request; exit with 0, `NOT_REBUILT` if the method or instance fails, or 1 if the message does."""
    answer_stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = sys.stdin.buffer
    request = json.loads(source.read(int.from_bytes(source.read(8), "little")))
    message = source.read()
    try:
        torch.set_num_threads(request["threads"])
        sys.path += [entry for entry in request["code_path"] if entry not in sys.path]
        method = parse(request["method"])
        instance = INSTANCES[request["kind"]](**request["instance"])
        rows = None if request["rows"] is None else torch.tensor(request["rows"])
    except Exception:
        traceback.print_exc()
        sys.exit(NOT_REBUILT)
    answers = instance.ask(method.from_bytes(message), rows)
    with answer_stream:
        answer_stream.write(answers.numpy().tobytes())
