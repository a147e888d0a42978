"""Run Bob, the receiver: a fresh process that answers every query from public data and the message alone.

Alice, the sender, has hidden values in the state of a method (the memory of a KV cache); the message is the bytes of
this state. The public data are the method as text and the instance (keys and queries). Bob's stdin holds, one after the
other, the length of the request (8 bytes, little-endian), the request (the public data as JSON), and the message. He
writes the answers as raw float32 on stdout. Output that a method prints goes to stderr.
"""

import json
import os
import sys
import traceback

import torch

from kvfloor.game import INSTANCES
from kvfloor.game.engine.play import NOT_REBUILT
from kvfloor.methods.grammar import parse


def main() -> None:
    """Answer the request on stdin, and end with an exit status.

    Status 0: the answers are on stdout. 3 (`NOT_REBUILT`): the method or the instance cannot be rebuilt from the
    request. 1: the state cannot be restored from the message, or the restored state cannot answer.
    """
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
