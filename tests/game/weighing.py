"""Measure the weights of an instance's queries with exact attention over one-hot values."""

import dataclasses

import torch

from kvfloor import parse
from kvfloor.game.engine.secret import Hidden


def exact_state(instance, values, hidden=None):
    """Return a state of exact attention, by the instance's law, after its stream with values (copies, rows, dv)."""
    state = instance.lift(parse("exact")).open(dataclasses.replace(instance.spec(), dv=values.shape[-1]))
    for k, v in instance.stream(values, hidden or Hidden(0)):
        instance.take_in(state, k, v)
    state.seal()
    return state


def weights(instance):
    """Return the softmax weights (rows, rows) of each hidden row's query on each hidden row's value."""
    rows = instance.rows
    one_hot = dataclasses.replace(instance, dv=rows)
    state = exact_state(one_hot, torch.eye(rows).unsqueeze(0))
    return one_hot.answers(state, torch.zeros(rows, dtype=torch.int64), torch.arange(rows))
