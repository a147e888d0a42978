"""Both ways of asking, against one copy and one query at a time."""

import pytest
import torch

from kvfloor import Spec, parse
from kvfloor.game.engine import asking
from kvfloor.game.engine.asking import by_appending, by_reading


@pytest.fixture
def filled(request):
    spec = Spec(rows=3, d=8, dv=5, seed=1)
    state = parse(getattr(request, "param", "exact")).open(spec)
    noise = torch.Generator().manual_seed(0)
    state.append(torch.randn(3, 50, 8, generator=noise), torch.randn(3, 50, 5, generator=noise))
    state.seal()
    return state


def asked(m=23):
    noise = torch.Generator().manual_seed(1)
    return torch.randint(3, (m,), generator=noise), torch.randn(m, 8, generator=noise)


def naive(state, copy, queries, k=None, v=None):
    answers = []
    for i in range(len(queries)):
        fork = state.clone()
        if k is not None:
            fork.append(k[i].expand(3, 1, -1), v[i].expand(3, 1, -1))
        answers.append(fork.read(queries[i].expand(3, 1, -1)).mean[copy[i], 0])
    return torch.stack(answers)


@pytest.mark.parametrize("at_once", [4, 256])
def test_reading_answers_query_by_query_whatever_the_order_of_streams(filled, monkeypatch, at_once):
    monkeypatch.setattr(asking, "_QUERIES_AT_ONCE", at_once)
    copy, queries = asked()
    before = filled.to_bytes()
    assert torch.allclose(by_reading(filled, copy, queries), naive(filled, copy, queries), atol=1e-6)
    assert filled.to_bytes() == before


def test_streams_that_are_not_asked_are_left_alone(filled):
    queries = asked(4)[1]
    copy = torch.tensor([2, 2, 0, 2])
    assert torch.allclose(by_reading(filled, copy, queries), naive(filled, copy, queries), atol=1e-6)


@pytest.mark.parametrize("filled", ["exact", "window(block=1)@16", "h2o(recent=4)@24", "quant(bits=8)"], indirect=True)
@pytest.mark.parametrize("fork_bytes", [1, 2**28])
def test_appending_gives_every_query_a_copy_of_its_own(filled, monkeypatch, fork_bytes):
    monkeypatch.setattr(asking, "_FORK_BYTES", fork_bytes)
    copy, queries = asked()
    noise = torch.Generator().manual_seed(2)
    k, v = torch.randn(23, 8, generator=noise), torch.randn(23, 5, generator=noise)
    before = filled.to_bytes()
    assert torch.allclose(by_appending(filled, copy, queries, k, v), naive(filled, copy, queries, k, v), atol=1e-5)
    assert filled.to_bytes() == before


def test_the_appended_token_is_zero_unless_given(filled):
    copy, queries = asked()
    zeros = torch.zeros(23, 8), torch.zeros(23, 5)
    assert torch.equal(by_appending(filled, copy, queries), by_appending(filled, copy, queries, *zeros))
    assert not torch.allclose(by_appending(filled, copy, queries), by_reading(filled, copy, queries), atol=1e-3)
