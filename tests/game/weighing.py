"""What an instance's queries really weigh, measured with exact attention over one-hot values."""

import dataclasses

import torch

from kvfloor import parse
from kvfloor.game.engine.secret import Hidden


def exact_state(instance, values, hidden=None):
    """Exact attention of the instance's law over its stream with these values (copies, rows, dv)."""
    state = instance.lift(parse("exact")).open(dataclasses.replace(instance.spec(), dv=values.shape[-1]))
    for k, v in instance.stream(values, hidden or Hidden(0)):
        instance.take_in(state, k, v)
    state.seal()
    return state


def weights(instance):
    """(rows, rows): the softmax weight that the query of each hidden row puts on the value of each hidden row."""
    rows = instance.rows
    one_hot = dataclasses.replace(instance, dv=rows)
    state = exact_state(one_hot, torch.eye(rows).unsqueeze(0))
    return one_hot.answers(state, torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
