"""The message: every field comes back bit for bit, and no damaged byte gets through."""

import hashlib
import json
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import CorruptState, Spec, parse
from kvfloor.core.fields import require_room
from kvfloor.core.message import (
    FORMAT,
    HEADER_LIMIT_BYTES,
    NewerVersion,
    OlderVersion,
    pack,
    payload_bytes,
    read,
    unpack,
)
from tests.corruption import (
    require_edits_are_noticed,
    require_every_flip_is_noticed,
    require_every_truncation_is_noticed,
)

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
SMALL = pack(
    {"method": "window@1", "spec": {"rows": 1}},
    {"x": torch.tensor([1.5, -2.0]), "n": 3, "part": {"b": torch.tensor([True]), "none": {}}},
)
STATE = parse("window(block=1)@40").open(Spec(rows=1, d=1, dv=1)).to_bytes()
START = b'{"__metadata__":{"kvfloor":"'


def sealed(header: bytes, payload: bytes = b"") -> bytes:
    """A file with a good digest around any header, in which 64 zeros hold its place: what a forger would write."""
    data = struct.pack("<Q", len(header)) + header + payload
    at = 8 + len(START)
    digest = hashlib.sha256(data[:at] + data[at + 64 :]).hexdigest().encode()
    return data[:at] + digest + data[at + 64 :]


def forged(text: object, tensors: dict[str, object] | None = None, payload: bytes = b"") -> bytes:
    """A sealed file with this JSON text, and entries of tensors as the header of a safetensors file has them."""
    text = text if isinstance(text, str) else json.dumps(text)
    header = json.dumps({"__metadata__": {"kvfloor": "0" * 64 + text}} | (tensors or {}), separators=(",", ":"))
    return sealed(header.encode(), payload)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [*((dtype, (2, 3, 5)) for dtype in DTYPES), *((torch.bfloat16, shape) for shape in ((), (0,), (3, 0, 2), (1,)))],
)
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50).to(dtype)
    _, fields = unpack(pack({}, {"x": x}))
    assert fields["x"].dtype == dtype and fields["x"].shape == x.shape and torch.equal(fields["x"], x)


def test_nan_infinity_and_negative_zero_come_back_bit_for_bit() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    _, fields = unpack(pack({}, {"x": x}))
    assert torch.equal(fields["x"].view(torch.int32), x.view(torch.int32))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False))
leaves = st.one_of(scalars, st.integers(0, 3).map(torch.arange))
names = st.text("abcdefgh_", min_size=1, max_size=4)
nested = st.recursive(
    st.dictionaries(names, leaves, max_size=4), lambda inner: st.dictionaries(names, inner, max_size=3)
)


def alike(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


@given(nested)
def test_nested_fields_come_back_equal(fields: dict) -> None:
    header, found = unpack(pack({"method": "text", "spec": {"rows": 2}}, fields))
    assert header == {"method": "text", "spec": {"rows": 2}} and alike(found, fields)


def test_non_contiguous_expanded_and_shared_tensors_are_sent_by_value() -> None:
    x = torch.arange(12).view(3, 4)
    fields = {"t": x.T, "e": x[:, :1].expand(3, 4), "x": x, "again": x, "part": x[1]}
    _, found = unpack(pack({}, fields))
    assert alike(found, fields)


def test_what_comes_back_can_be_written_to() -> None:
    _, fields = unpack(SMALL)
    fields["x"] += 1
    assert fields["x"].tolist() == [2.5, -1.0]


def test_a_dtype_that_could_not_be_read_back_is_refused_when_packing() -> None:
    with pytest.raises(TypeError, match=r"part/x is a torch\.complex64"):
        pack({}, {"part": {"x": torch.zeros(2, dtype=torch.complex64)}})


def test_the_same_fields_make_the_same_bytes_in_any_order() -> None:
    fields = {"x": torch.arange(5), "n": 1, "y": torch.zeros(2), "z": torch.ones(3)}
    assert len({pack({"a": 1}, {name: fields[name] for name in ("n", *order)}) for order in ("xyz", "zyx", "yxz")}) == 1


def test_a_message_is_a_safetensors_file() -> None:
    tensors = safetensors.torch.load(SMALL)
    assert set(tensors) == {"x", "part/b"} and tensors["x"].tolist() == [1.5, -2.0]
    assert payload_bytes(SMALL) == 2 * 4 + 1 and SMALL.startswith(START, 8)


def test_the_header_is_small() -> None:
    """It counts in the game, where certified bits are compared with what was sent."""
    assert len(STATE) - payload_bytes(STATE) < 1100


# ---- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [SMALL, STATE])
def test_every_truncation_raises(message: bytes) -> None:
    require_every_truncation_is_noticed(message, unpack)


@pytest.mark.parametrize("message", [SMALL, STATE])
def test_every_flipped_bit_raises(message: bytes) -> None:
    require_every_flip_is_noticed(message, unpack)


@given(st.randoms(use_true_random=False))
def test_any_edit_raises(draw: random.Random) -> None:
    require_edits_are_noticed(SMALL, unpack, draw)


def test_nothing_is_parsed_before_the_digest_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*arguments: object) -> None:
        raise AssertionError("parsed")

    damaged = bytearray(SMALL)
    damaged[-1] ^= 1
    monkeypatch.setattr(json, "loads", parsed)
    monkeypatch.setattr(safetensors.torch, "load", parsed)
    with pytest.raises(CorruptState, match="digest"):
        unpack(bytes(damaged))


# ---- what somebody wrote a good digest for ---------------------------------------------------------------------


def test_another_format_is_named() -> None:
    with pytest.raises(NewerVersion, match=rf"format {FORMAT + 1}, written by kvfloor 9\.0.*upgrade"):
        unpack(forged({"format": FORMAT + 1, "kvfloor": "9.0", "anything": []}))
    old = '{"header_sha256":"' + "0" * 64 + '","format":1}'
    header = json.dumps({"__metadata__": {"kvfloor": old}}, separators=(",", ":")).encode()
    for data in (b"KVFLOOR\x01" + bytes(200), struct.pack("<Q", len(header)) + header):
        with pytest.raises(OlderVersion, match="format 1, of an earlier kvfloor"):
            unpack(data)


@pytest.mark.parametrize("foreign", [b"PK\x03\x04" + b"\0" * 100, b"\x80\x04" * 60, b"{" * 200, b"\xff" * 200])
def test_foreign_bytes_are_named_as_such(foreign: bytes) -> None:
    with pytest.raises(CorruptState, match="do not start"):
        unpack(foreign)


def test_weights_are_no_message() -> None:
    for metadata in (None, {"format": "pt"}, {"kvfloor": "mine"}):
        with pytest.raises(CorruptState):
            unpack(safetensors.torch.save({"x": torch.zeros(30)}, metadata))


def entry(shape: object, size: object = 8, dtype: object = "F32") -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


@pytest.mark.parametrize(
    "tensors",
    [
        entry([2**60], 2**62),
        entry([2**62]),
        entry([-1]),
        entry([2**63, 0], 0),
        entry([2**62, 2**62, 0], 0),
        entry([1]),
        entry([3], 12),
        entry("ab"),
        entry([1.5]),
        entry([2], 8, "object"),
        entry([1], 8, "C64"),
        entry([8], 8, "F8_E4M3"),
        entry([2], -8),
        {"x": 7},
        entry([2]) | {"y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"n": entry([2])["x"]},
        {"n/y": entry([2])["x"]},
        {"method/": entry([2], 8, "X")["x"]},
    ],
)
def test_a_forged_tensor_raises_corrupt_state(tensors: dict[str, object]) -> None:
    with pytest.raises(CorruptState):
        unpack(forged({"format": FORMAT, "fields": {"n": 3}}, tensors, b"\0" * 8))


def test_a_truth_value_is_0_or_1() -> None:
    for payload in (b"\0\1", b"\1\2"):
        data = forged({"format": FORMAT, "fields": {}}, entry([2], 2, "BOOL"), payload)
        if max(payload) > 1:
            with pytest.raises(CorruptState, match="truth values"):
                unpack(data)
        else:
            assert unpack(data)[1]["x"].tolist() == [False, True]


@pytest.mark.parametrize(
    "text", ["", "not json", "[1]", "{}", "[" * 100_000, "null", "7", '{"format":2}', '{"format":null,"fields":{}}']
)
def test_a_header_that_is_no_header_raises_corrupt_state(text: str) -> None:
    with pytest.raises(CorruptState):
        unpack(forged(text))


@pytest.mark.parametrize("header", [START + b"0" * 64, START + b"0" * 64 + b"\xff\xfe", START + b"0" * 64 + b'"}'])
def test_a_header_that_is_no_json_raises_corrupt_state(header: bytes) -> None:
    with pytest.raises(CorruptState):
        unpack(sealed(header, b"\0" * 8))


def test_a_header_longer_than_its_limit_is_refused_on_both_sides() -> None:
    with pytest.raises(ValueError, match="header"):
        pack({"method": "m" * (HEADER_LIMIT_BYTES + 1)}, {})
    with pytest.raises(CorruptState, match="header"):
        unpack(forged({"format": FORMAT, "fields": {}, "m": "m" * HEADER_LIMIT_BYTES}))


@pytest.mark.parametrize("size", [2**24 + 1, 2**60, 2**63 - 1, 2**64 - 1])
def test_a_length_beyond_the_message_is_refused(size: int) -> None:
    with pytest.raises(CorruptState, match="header claims"):
        unpack(struct.pack("<Q", size) + SMALL[8:])


@pytest.mark.parametrize("given", [None, "text", 7, [1, 2], torch.zeros(3)])
def test_what_is_not_bytes_is_a_type_error(given: object) -> None:
    with pytest.raises(TypeError, match="a message is bytes, got"):
        unpack(given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a message is bytes, got"):
        parse("window@40").from_bytes(given)  # type: ignore[arg-type]


def test_all_kinds_of_bytes_will_do() -> None:
    for kind in (bytes, bytearray, memoryview):
        assert unpack(kind(SMALL))[0]["method"] == "window@1"


# ---- files -----------------------------------------------------------------------------------------------------


def test_a_file_is_read_no_further_than_it_looks_like_a_message(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(SMALL)
    assert read(path, len(SMALL), "message") == SMALL
    with pytest.raises(ValueError, match=r"cannot read the message .* more than the \d+ allowed"):
        read(path, len(SMALL) - 1, "message")
    for start in (b"", struct.pack("<Q", 2**60), struct.pack("<Q", 2**60) + START, SMALL[:8]):
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(40 << 30)  # sparse: takes no room
        with pytest.raises(CorruptState):
            read(path, 1 << 60, "message")
    with open(path, "wb") as file:
        file.write(SMALL)
        file.truncate(40 << 30)
    with pytest.raises(ValueError, match="more than"):
        read(path, 1 << 30, "message")


def test_these_errors_are_value_errors() -> None:
    for kind in (CorruptState, NewerVersion, OlderVersion):
        assert issubclass(kind, ValueError)


@pytest.mark.parametrize("pages", [0, -1, None, 1000])
def test_room_is_required_only_where_the_machine_tells_its_memory(
    pages: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 pages of 4 bytes hold 1,000 numbers of 4 bytes and no more; 0, -1 and an error tell nothing."""

    def told(name: str) -> int:
        if pages is None:
            raise ValueError(name)
        return {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4}[name]

    monkeypatch.setattr("os.sysconf", told)
    require_room(1000, 4, "the slots")
    if pages == 1000:
        with pytest.raises(ValueError, match="the slots would take"):
            require_room(1001, 4, "the slots")
    else:
        require_room(1001, 4, "the slots")
