"""The message: every field comes back bit for bit, and no damaged byte gets through."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import CorruptState
from kvfloor.core.message import MAGIC, pack, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
]
SMALL = pack("window@1", {"rows": 1}, {"x": torch.tensor([1.5, -2.0]), "n": 3, "part": {"b": torch.tensor([True])}})


def sealed(header: object, payload: bytes = b"", magic: bytes = MAGIC) -> bytes:
    """A message with a good digest around any header: what a forger would write."""
    import hashlib

    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = magic + struct.pack("<Q", len(text)) + text + payload
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5)])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50).to(dtype)
    _, _, fields = unpack(pack("m", {}, {"x": x}))
    assert fields["x"].dtype == dtype and fields["x"].shape == x.shape and torch.equal(fields["x"], x)


def test_nan_infinity_and_negative_zero_come_back_bit_for_bit() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    _, _, fields = unpack(pack("m", {}, {"x": x}))
    assert torch.equal(fields["x"].view(torch.int32), x.view(torch.int32))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False))
names = st.text("abcdefgh_", min_size=1, max_size=4)


@given(
    st.recursive(st.dictionaries(names, scalars, max_size=4), lambda inner: st.dictionaries(names, inner, max_size=3))
)
def test_nested_numbers_come_back_equal(fields: dict) -> None:
    assert unpack(pack("text", {"rows": 2}, fields)) == ("text", {"rows": 2}, fields)


def test_non_contiguous_and_expanded_tensors_are_sent_by_value() -> None:
    x = torch.arange(12).view(3, 4)
    _, _, fields = unpack(pack("m", {}, {"t": x.T, "e": x[:, :1].expand(3, 4)}))
    assert torch.equal(fields["t"], x.T) and torch.equal(fields["e"], x[:, :1].expand(3, 4))


def test_what_comes_back_can_be_written_to() -> None:
    _, _, fields = unpack(SMALL)
    fields["x"] += 1
    assert fields["x"].tolist() == [2.5, -1.0]


def test_a_dtype_that_could_not_be_read_back_is_refused_when_packing() -> None:
    with pytest.raises(TypeError, match="complex64"):
        pack("m", {}, {"x": torch.zeros(2, dtype=torch.complex64)})


def test_the_same_fields_make_the_same_bytes() -> None:
    fields = {"x": torch.arange(5), "n": 1}
    assert pack("m", {"a": 1}, fields) == pack("m", {"a": 1}, {"x": torch.arange(5), "n": 1})


def test_every_truncation_raises() -> None:
    for size in range(len(SMALL)):
        with pytest.raises(CorruptState):
            unpack(SMALL[:size])


def test_every_flipped_bit_raises() -> None:
    for bit in range(8 * len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptState):
            unpack(bytes(damaged))


@pytest.mark.parametrize("extra", [b"\0", b"trailing", SMALL])
def test_trailing_bytes_raise(extra: bytes) -> None:
    with pytest.raises(CorruptState, match="digest"):
        unpack(SMALL + extra)


def test_swapped_bytes_raise() -> None:
    damaged = bytearray(SMALL)
    damaged[-40], damaged[-41] = damaged[-41], damaged[-40]
    if bytes(damaged) != SMALL:
        with pytest.raises(CorruptState):
            unpack(bytes(damaged))


def test_another_version_is_named() -> None:
    with pytest.raises(CorruptState, match="version 2; this release reads version 1"):
        unpack(sealed({}, magic=MAGIC[:-1] + b"\x02"))


@pytest.mark.parametrize("foreign", [b"PK\x03\x04" + b"\0" * 100, b"\x80\x04" * 60, b"{" * 200])
def test_foreign_bytes_are_named_as_such(foreign: bytes) -> None:
    with pytest.raises(CorruptState, match="do not start"):
        unpack(foreign)


@pytest.mark.parametrize(
    "entries",
    [
        [["x", "float32", [2**62]]],
        [["x", "float32", [-1]]],
        [["x", "float32", [2**63, 0]]],
        [["x", "float32", [2**62, 2**62, 0]]],
        [["x", "float32", [2]], ["y", "float32", [1]]],
        [["x", "float32", "ab"]],
        [["x", "float32", [float("inf")]]],
        [["x", "object", [1]]],
        [["x"]],
        ["x"],
        [["a/x", "value", 1]],
        [["x", "value"]],
        [[["x"], "value", 1]],
        7,
        None,
    ],
)
def test_a_forged_header_raises_corrupt_state_and_allocates_nothing(entries: object) -> None:
    with pytest.raises(CorruptState):
        unpack(sealed({"method": "m", "spec": {}, "entries": entries}, payload=b"\0" * 8))


@pytest.mark.parametrize("header", [b"not json", b"[1]", b"{}", b"[" * 100_000, b"\xff\xfe", b"null"])
def test_a_header_that_is_no_header_raises_corrupt_state(header: bytes) -> None:
    with pytest.raises(CorruptState):
        unpack(sealed(header))


def test_a_header_longer_than_its_limit_is_refused_on_both_sides() -> None:
    with pytest.raises(ValueError, match="header"):
        pack("m" * 2_000_000, {}, {})
    with pytest.raises(CorruptState, match="header"):
        unpack(sealed(b" " * 2_000_000))


def test_a_corrupt_state_is_a_value_error() -> None:
    assert issubclass(CorruptState, ValueError)
