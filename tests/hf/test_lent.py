"""What layers lend to later ones within a forward is gone after it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.lent import LentKeys
from survey.tiny import tiny_model


def test_the_last_reader_takes_them_away() -> None:
    lent = LentKeys([0, 2, 1])
    for _ in range(2):  # forwards
        lent[1], lent[2] = "keys of 1", "keys of 2"
        assert [lent[1], lent[2], lent[1]] == ["keys of 1", "keys of 2", "keys of 1"] and not lent
    with pytest.raises(KeyError):
        lent[1]


def test_copies_and_pickles_get_none_and_go_on() -> None:
    lent = LentKeys([1])
    lent[0] = "keys"
    for other in (copy.deepcopy(lent), pickle.loads(pickle.dumps(lent))):
        assert type(other) is LentKeys and not other
        other[0] = "others"
        assert other[0] == "others" and not other
    assert lent[0] == "keys"


def test_a_forward_leaves_no_keys_behind_on_the_cache() -> None:
    model: Any = prepare(tiny_model("gemma3n_text"))
    cache = CompressedCache(model.config, "sinks(2,block=4)@8")
    with torch.no_grad():
        for n in (40, 1):
            model(torch.full((1, n), 7), past_key_values=cache)
            assert not cache.shared_layers
    cache.shared_layers[0] = "of a forward that broke off"
    cache.reset()
    assert not cache.shared_layers
