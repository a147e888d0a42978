"""Code the keys and values of a saved cache: principal axes, equal steps, an entropy coder (KVTC, arXiv 2511.01815).

A compressed layer is one whose keys and values are stored by a kvfloor method; its state is all that the method stores
of them. A row of a state is the stream of one (batch item, kv head). In a saved cache with codes, the keys and values
of all kv heads of a token are two vectors of width w = heads * d or heads * dv. Keys are first rotated back, as RoPE
mixes what the axes would separate. A basis has a layer's axes: coordinates along them are uncorrelated, and their
squared errors sum to the divergence of the predictions, in nats per token, as far as it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfloor.core.bounded import Bounded
from kvfloor.core.exact import Exact
from kvfloor.core.rotation import Rotation
from kvfloor.core.selector import Indexed
from kvfloor.core.spec import DTYPES
from kvfloor.hf.bases import FIRST, CodingBasis, LayerAxes, measured_turns, require_basis
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.methods.transform.basis import Basis
from kvfloor.methods.transform.fineness import MOST
from kvfloor.methods.transform.integers import compressed, restored, zstandard
from kvfloor.methods.transform.transform import decode, encode, step_for
from kvfloor.methods.transform.water import water_level
from kvfloor.validation import positive

if TYPE_CHECKING:
    from kvfloor.hf.cache import CompressedCache

NATS = {"k": 0.3, "v": 0.3}
"""Divergence in nats per unit of mean relative squared error of the keys, and of the values, of all layers.

Measured on SmolLM2 (`characterize/coded_saves.py`), and used where no basis was calibrated for the model."""

NEWEST, FINER = 128, 4
"""Fineness of the codes of the newest tokens, and how many these are, where no basis was calibrated for the model."""

AXES = torch.float16  # of a basis that is saved with the codes


class WrongBasis(ValueError):
    """Report that a saved cache was coded in another basis than the one given to load it, or that none was given."""


def check(cache: CompressedCache, aim: Any, basis: Any) -> None:
    """Raise ValueError or TypeError if the cache cannot be saved with codes for this `aim` and `basis`.

    The cache is not empty, and no forward of it is running.
    """
    positive("coded", aim)
    if basis is not None:
        require_basis(basis)
    zstandard()
    if cache.ranks.count > 1:
        raise ValueError("coded= needs all kv heads in one process: save a sharded model's cache without it")
    for layer in cache.compressed:
        state = layer.state
        if state is None:
            continue
        why = None
        store = state.method.parts.store
        if not isinstance(state.method, Exact | Bounded) or (store is not None and not store.plain):
            why = "does not keep keys and values as they are given"
        elif isinstance(state.method.parts.selector, Indexed):
            why = "has an index of the keys, which would not fit the decoded ones"
        elif state.spec.rotation is not None:
            why = 'turns keys to places in the cache (positions="cache")'
        elif state.spec.tied:
            why = "has values that are its keys"
        if why is not None:
            raise ValueError(f"coded= cannot code this cache: {state.method} {why}; save it without coded=")


def code(
    model: Any, layers: list[tuple[dict[str, Any], dict[str, Any]]], aim: float, basis: Any
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Return (entry of the file's header, descriptions and tensors of all layers), keys and values coded.

    layers: (description, tensors) of every layer, as `kvfloor.hf.saved` saves them without codes. aim: the divergence
    to aim at, in nats per token. basis: a `CodingBasis`, or None to use the principal axes of the cache's own tokens,
    which are saved with the codes. Raises ValueError for what `check` cannot see: kv heads that hold different tokens,
    and a basis of another model.
    """
    turns = measured_turns(model)
    vectors: dict[int, dict[str, Tensor]] = {}
    tokens: dict[int, dict[str, Tensor]] = {}
    items: dict[int, list[Tensor]] = {}
    for i, (plain, fields) in enumerate(layers):
        if "method" in plain:
            items[i] = _items(plain, fields)
            tokens[i] = _tokens(plain, fields)
            rest = ~_first(items[i])
            vectors[i] = {name: x[rest] for name, x in _vectors(tokens[i], items[i], turns.get(i)).items()}
    bases = relative(vectors) if basis is None else {i: x.axes for i, x in _of(basis, vectors, model).items()}
    variances = torch.cat([one.variances for kinds in bases.values() for one in kinds.values()])
    step, level = step_for(variances, aim), water_level(variances, aim)
    distinct = list(dict.fromkeys(turn for turn in turns.values() if turn is not None))
    coded = list(layers)
    for i in vectors:
        plain, fields = layers[i]
        first, distance = _first(items[i]), _distance(items[i])
        finer = _newest(distance[~first]) if basis is None else basis.of(i).fineness(vectors[i]["k"], distance[~first])
        parts = [_packed(_gaps(items[i])), _packed(torch.cat([finer["k"], finer["v"]]))]
        axes = {}
        for name, x in vectors[i].items():
            one = bases[i][name]
            if basis is None:
                one = one.kept(level)
                size = float(one.backward.norm(dim=1).max()) if len(one.backward) else 1.0
                axes[name] = {"mean": one.mean, "backward": (one.backward / size).to(AXES), "size": size}
                one = replace(one, backward=axes[name]["backward"].float() * size)
            parts += encode(x, finer[name], one, step)
        slots = {name: x for name, x in fields["state"]["slots"].items() if name not in ("k", "v", "position")}
        turn = turns.get(i)
        told = {"sizes": [len(part) for part in parts], "turn": None if turn is None else distinct.index(turn)}
        more = {
            "codes": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8),
            "axes": axes,
            "first": {name: x[first] for name, x in tokens[i].items()},
        }
        coded[i] = plain | {"coded": told}, fields | {"state": fields["state"] | {"slots": slots}, "coded": more}
    header = {
        "aim": aim,
        "step": step,
        "basis": None if basis is None else basis.digest,
        "rotations": [turn.as_dict() for turn in distinct],
    }
    return header, coded


class Decoder:
    """Restore the keys and values of a saved cache's layers from their codes."""

    def __init__(self, header: Mapping[str, Any] | None, basis: CodingBasis | None) -> None:
        """Read the entry "coded" of a file's header; None: the file has no codes.

        Raises WrongBasis unless `basis` is the one that the cache was coded in.
        """
        self.basis = basis
        if header is None:
            return
        wanted = header["basis"]
        if wanted is not None and (basis is None or basis.digest != wanted):
            given = "none was given" if basis is None else f"this one is {basis.digest[:12]}"
            raise WrongBasis(f"the cache was coded in the basis {wanted[:12]}, and {given}: pass basis=, the same one")
        self.step = positive("step", header["step"])
        self.own = wanted is None
        self.rotations = [Rotation.from_dict(one) for one in header["rotations"]]

    def decoded(self, index: int, plain: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of layer `index` of the model as they are saved without codes.

        Raises ValueError, LookupError, TypeError or RuntimeError if the codes do not fit the layer.
        """
        if "coded" not in plain:
            return fields
        told, more, spec = plain["coded"], fields["coded"], plain["spec"]
        slots = fields["state"]["slots"]
        heads = spec["rows"] // plain["clocks"]["batch"]
        held = slots["held"].view(-1, heads)
        if bool((held != held[:, :1]).any()):
            raise ValueError(f"kv heads hold {slots['held'].tolist()} tokens, and codes are of all heads together")
        sizes = told["sizes"]
        if not all(isinstance(size, int) and size >= 0 for size in sizes) or sum(sizes) != len(more["codes"]):
            raise ValueError(f"codes of {sizes} bytes do not fill {len(more['codes'])}")
        parts = [part.numpy().tobytes() for part in more["codes"].split(sizes)]
        counts = held[:, 0].tolist()
        gaps = _unpacked(parts[0], sum(counts))
        items = [torch.cumsum(part, 0) - 1 for part in gaps.split(counts)]
        first = _first(items)
        finer = _unpacked(parts[1], 2 * int((~first).sum())).view(2, -1)
        if len(parts) != 6 or bool((finer.abs() > MOST).any()):
            raise ValueError("the fineness of codes is out of range, or parts are missing")
        turn = None if told["turn"] is None else self.rotations[told["turn"]]
        found = {"position": torch.cat([item.repeat(heads) for item in items])}
        for at, name in enumerate(("k", "v")):
            mean, backward = self._axes(index, name, more["axes"])
            wide = heads * spec["d" if name == "k" else "dv"]
            if mean.shape != (wide,) or backward.shape[1:] != (wide,):
                raise ValueError(f"the axes of {name} have shape {tuple(backward.shape)}, for a width of {wide}")
            x = torch.empty(len(first), wide)
            x[~first] = decode(parts[2 + 2 * at : 4 + 2 * at], finer[at], mean, backward, self.step)
            x = x.unflatten(1, (heads, -1))
            if name == "k" and turn is not None:
                x = turn.turned(x, _circle(items, turn))
            x = x.to(DTYPES[spec["dtype"]])
            x[first] = more["first"][name]
            split = [part.transpose(0, 1).flatten(0, 1) for part in x.split(counts)]
            found[name] = torch.cat(split)
        return fields | {"state": fields["state"] | {"slots": slots | found}}

    def _axes(self, index: int, name: str, saved: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return mean (w,) and backward (axes, w) of a layer's keys ("k") or values ("v"), float32.

        saved: axes that were saved with the codes.
        """
        if self.own:
            one = saved[name]
            return one["mean"].float(), one["backward"].float() * positive("size", one["size"])
        assert self.basis is not None
        basis = self.basis.of(index).axes[name]
        return basis.mean, basis.backward


def _items(plain: dict[str, Any], fields: dict[str, Any]) -> list[Tensor]:
    """Return the positions of each batch item's tokens. Raises ValueError if its kv heads hold different tokens."""
    slots, batch = fields["state"]["slots"], plain["clocks"]["batch"]
    heads = plain["spec"]["rows"] // batch
    rows = [row.sort().values for row in slots["position"].cpu().split(slots["held"].tolist())]
    for first in range(0, len(rows), heads):
        if not all(torch.equal(rows[first], row) for row in rows[first + 1 : first + heads]):
            raise ValueError(
                f"coded= codes the kv heads of a token together, and under {plain['method']} they hold different "
                f"tokens: save it without coded="
            )
    return rows[::heads]


def _tokens(plain: dict[str, Any], fields: dict[str, Any]) -> dict[str, Tensor]:
    """Return the keys "k" (n, heads, d) and values "v" (n, heads, dv) of all items' tokens, as given, on the CPU.

    Tokens come item by item, by their positions.
    """
    slots = fields["state"]["slots"]
    heads = plain["spec"]["rows"] // plain["clocks"]["batch"]
    held = slots["held"].tolist()
    order = [row.argsort() for row in slots["position"].cpu().split(held)]
    found = {}
    for name in ("k", "v"):
        rows = [x[at] for x, at in zip(slots[name].cpu().split(held), order, strict=True)]
        found[name] = torch.cat([torch.stack(rows[at : at + heads], 1) for at in range(0, len(rows), heads)])
    return found


def _vectors(tokens: dict[str, Tensor], items: list[Tensor], turn: Rotation | None) -> dict[str, Tensor]:
    """Return all heads' keys "k" (n, heads * d) and values "v" (n, heads * dv) as float32 vectors.

    tokens: what `_tokens` returns. Keys are without the rotation `turn`.
    """
    found = {name: x.float() for name, x in tokens.items()}
    if turn is not None:
        found["k"] = turn.turned(found["k"], _circle(items, turn), back=True)
    return {name: x.flatten(1) for name, x in found.items()}


def _first(items: list[Tensor]) -> Tensor:
    """Return a mask (n,) of all items' tokens: those that are saved as they are, the first of each item."""
    return torch.cat([torch.arange(len(item)) < FIRST for item in items])


def _distance(items: list[Tensor]) -> Tensor:
    """Return the distance of each token to the end of its item's stream, 1 for the newest, all items' in one (n,)."""
    return torch.cat([len(item) - torch.arange(len(item)) for item in items])


def _newest(distance: Tensor) -> dict[str, Tensor]:
    """Return the fineness of codes in axes of the cache's own tokens: more for the newest, on which more rests."""
    finer = torch.where(distance <= NEWEST, FINER, 0)
    return {"k": finer, "v": finer}


def _circle(items: list[Tensor], turn: Rotation) -> Any:
    position = torch.cat(items)
    return turn.circle(position.unsqueeze(1), torch.float32)


def _packed(numbers: Tensor) -> bytes:
    """Compress whole numbers (n,), int64."""
    return compressed(numbers.unsqueeze(1), torch.zeros_like(numbers), torch.zeros(1, dtype=torch.int64))


def _unpacked(data: bytes, n: int) -> Tensor:
    """Undo `_packed`: return n whole numbers. Raises DamagedCode for other bytes."""
    none = torch.zeros(n, dtype=torch.int64)
    return restored(data, none, torch.zeros(1, dtype=torch.int64)).squeeze(1)


def _gaps(items: list[Tensor]) -> Tensor:
    """Return the distance of each token's position from that of the item's token before it, all items' in one (n,)."""
    return torch.cat([torch.diff(item, prepend=torch.tensor([-1])) for item in items])


def _of(basis: CodingBasis, vectors: dict[int, dict[str, Tensor]], model: Any) -> dict[int, LayerAxes]:
    """Return the axes of a calibrated basis for these layers. Raises WrongBasis if it is another model's."""
    here = fingerprint(model)
    if basis.model != here:
        raise WrongBasis(
            f"the basis was calibrated for a {basis.model['model']} with other weights or another configuration "
            f"(digest {basis.model['sha256'][:12]}, this model's {here['sha256'][:12]}): calibrate one for this model"
        )
    return {i: basis.of(i) for i in vectors}


def relative(vectors: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Basis]]:
    """Return the principal axes of each layer's own keys and values, scaled so that squared errors count in nats."""
    found: dict[int, dict[str, Basis]] = {}
    for i, kinds in vectors.items():
        found[i] = {}
        for name, x in kinds.items():
            basis = Basis.fitted(x)
            total = max(float(basis.variances.sum()), torch.finfo(torch.float32).tiny)
            found[i][name] = basis.scaled((NATS[name] / len(vectors) / total) ** 0.5)
    return found
