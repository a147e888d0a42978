"""The method that the floor is tight against: the hidden levels, packed, and nothing else."""

import math

import pytest
import torch

from kvfloor import Spec, parse
from kvfloor.game import play
from kvfloor.game.engine.public_bits import PublicBits
from kvfloor.game.keys.families import FAMILIES

PAID = math.log2(4) + 20


@pytest.mark.parametrize(
    ("n", "d", "dv", "bits"),
    [(64, 32, 32, 1), (7, 8, 3, 1), (63, 32, 5, 3), (101, 16, 7, 1), (33, 8, 9, 11), (20, 8, 3, 24), (1, 1, 1, 1)],
)
def test_the_payload_is_the_hidden_bits_in_whole_bytes_and_certifies_them_all(n, d, dv, bits):
    result = play("optimum", n=n, d=d, dv=dv, bits=bits, isolated=False)
    assert result.payload_bytes == math.ceil(n * dv * bits / 8)
    assert (result.verdict, result.row_success, result.bit_error) == ("holds", 1.0, 0.0)
    assert result.certified_bits == pytest.approx(max(0.0, n * dv * bits - PAID))
    assert result.certified_bits <= 8 * result.payload_bytes
    assert result.floor_bits <= 8 * result.payload_bytes


def test_every_head_is_rounded_up_to_bytes():
    result = play("optimum", n=9, d=8, dv=3, heads=5, isolated=False)
    assert result.payload_bytes == 5 * math.ceil(27 / 8)
    assert (result.verdict, result.hidden_bits) == ("holds", 5 * 27)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_holds_in_half_precision(dtype):
    assert play("optimum", n=50, d=32, dtype=dtype, isolated=False).verdict == "holds"


def test_it_beats_every_cache_by_the_width_of_a_float():
    exact, best = (play(text, n=128, d=32, isolated=False) for text in ("exact", "optimum"))
    assert best.certified_bits == exact.certified_bits
    assert exact.payload_bytes > 60 * best.payload_bytes


def opened(n=10, d=8, dv=4, bits=2, rows=2):
    method = PublicBits("sphere", n, 7, bits)
    keys = FAMILIES["sphere"](n, d, 7).float().expand(rows, -1, -1)
    levels = torch.randint(2**bits, (rows, n, dv), generator=torch.Generator().manual_seed(0))
    return method.open(Spec(rows=rows, d=d, dv=dv)), keys, levels / (2**bits - 1)


def test_it_answers_as_exact_attention_does_at_every_moment():
    state, keys, values = opened()
    exact = parse("exact").open(state.spec)
    queries = 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert (state.read(queries).log_mass == -torch.inf).all()
    for start, stop in ((0, 1), (1, 4), (4, 10)):
        for each in (state, exact):
            each.append(keys[:, start:stop], values[:, start:stop])
        told, truth = state.read(queries), exact.read(queries)
        assert torch.allclose(told.mean, truth.mean, atol=1e-5)
        assert torch.allclose(told.log_mass, truth.log_mass, atol=1e-5)
        twin = state.method.from_bytes(state.to_bytes())
        assert torch.equal(twin.read(queries).mean, told.mean)
        assert twin.to_bytes() == state.to_bytes()


def test_no_bit_of_the_payload_is_free():
    state, keys, values = opened(n=8, bits=1)
    state.append(keys, values)
    whole = state.read(keys * 50).mean
    for byte in range(state.packed.shape[1]):
        for bit in range(8):
            twin = state.clone()
            twin.packed[0, byte] ^= 1 << bit
            assert not torch.equal(twin.read(keys * 50).mean, whole)


def test_other_keys_are_refused_and_leave_the_state_as_it_was():
    state, keys, values = opened()
    state.append(keys[:, :4], values[:, :4])
    before = state.to_bytes()
    for bad, message in (
        (keys[:, :2], "the public keys only, in their order; these keys differ"),
        (-keys[:, 4:6], "these keys differ"),
        (torch.stack([keys[0, 4:6], keys[1, 5:7]]), "these keys differ"),
    ):
        with pytest.raises(ValueError, match=message):
            state.append(bad, values[:, :2])
        assert state.to_bytes() == before
    with pytest.raises(ValueError, match="public_bits takes 10 tokens in every row alike"):
        state.append(torch.cat([keys[:, 4:], keys[:, :1]], 1), torch.cat([values[:, 4:], values[:, :1]], 1))
    with pytest.raises(ValueError, match="in every row alike"):
        state.append(keys[:, 4:6], values[:, 4:6], torch.tensor([[True, True], [True, False]]))
    assert state.to_bytes() == before


def test_the_text_round_trip_and_what_it_refuses():
    method = PublicBits("chirp", 12, 3, bits=5)
    assert str(method) == "public_bits(family=chirp,n=12,key_seed=3,bits=5)"
    assert parse(str(method)) == method == parse(str(PublicBits("chirp", 12, 3, 5)))
    for text, message in (
        ("public_bits(family=golden,n=4,key_seed=1)", "family must be one of"),
        ("public_bits(family=chirp,n=0,key_seed=1)", "n must be"),
        ("public_bits(family=chirp,n=4,key_seed=1,bits=0)", "bits must be"),
        ("public_bits(family=chirp,n=4)", "key_seed"),
        ("public_bits(family=chirp,n=4,key_seed=1)@16", "cannot bound it"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)


def test_it_takes_no_budget_and_keeps_no_whole_token():
    method = PublicBits("chirp", 12, 3)
    assert method.capacity(100) == 0
    assert method.with_budget(8) is None
    state, keys, values = opened(n=8, dv=3)
    sizes = [state.nbytes]
    for piece in ((keys[:, :4], values[:, :4]), (keys[:, 4:], values[:, 4:])):
        state.append(*piece)
        sizes.append(state.nbytes)
    assert sizes == [2 * (8 * 3 * 2 // 8) + 2 * 8 + 8] * 3  # levels, clocks, sealed
    assert state.held.tolist() == [0, 0]
