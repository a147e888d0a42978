"""Save a compressed cache to a file and load it again, to continue bit for bit as the original would have.

The file has a JSON header and tensors. The header holds the method, the arguments of the cache's constructor, a digest
of the model (its fingerprint), and the class of each layer. The tensors are those of each layer, under the layer's
index. A name in the file never causes loading to import a module. A method is a way to compress a KV cache. A
compressed layer is one whose keys and values are stored by a method; its state is all that the method stores of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from transformers import PreTrainedModel

from kvfloor.core import message
from kvfloor.core.broken import BrokenState
from kvfloor.core.fields import MOST, Field
from kvfloor.core.message import CorruptState, NewerVersion, OlderVersion
from kvfloor.core.method import Method, rebuilt
from kvfloor.core.state import State
from kvfloor.files import named, replace_file
from kvfloor.hf import other_layers as stock
from kvfloor.hf.bases import CodingBasis, require_basis
from kvfloor.hf.coded import Decoder, WrongBasis, check, code
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.layer import CompressedLayer
from kvfloor.hf.prepare import is_prepared, owner
from kvfloor.hf.ranks import Ranks, ranks_of
from kvfloor.hf.weights import device_of, input_device
from kvfloor.hf.whole import own_part, own_stock, part_of, whole_layers
from kvfloor.hf.wrappers import unwrapped
from kvfloor.methods.grammar import parse, without_store
from kvfloor.methods.transform.integers import zstandard
from kvfloor.splitting import split_once
from kvfloor.version import __version__

if TYPE_CHECKING:
    from kvfloor.hf.cache import CompressedCache

__all__ = ["MOST_BYTES", "NewerVersion", "OlderVersion", "UnknownMethod", "WrongBasis", "WrongModel", "load", "save"]

Held = TypeVar("Held", bound="CompressedCache")

MOST_BYTES = 1 << 35  # largest file that `load` reads by default
_MODE = 0o600  # a cache reveals its text
_WHAT = "saved cache"
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_STORE = r"(?:full|k[0-9]+v[0-9]+)(?:\([^()]*\))?\s*(?:[@,)]|$)"  # at the end of a method's text, before its budget
_FOREIGN = re.compile(rf"[\w.]+:(?!{_STORE})[A-Za-z_]\w*")  # module:Class; a budget per row has digits after its colon


class WrongModel(ValueError):
    """Report that a saved cache was filled by another model than the one given to load it."""


class UnknownMethod(ValueError):
    """Report that the method named in a saved cache cannot be built: it is unknown here, or a third party's class."""


def save(
    cache: CompressedCache, path: str | Path, coded: float | None = None, basis: CodingBasis | None = None
) -> None:
    """Write `cache` to the file `path`, readable by its owner only (mode 0600).

    coded   None: everything is saved as it is. A number: keys and values are coded (`kvfloor.hf.coded`), and this is
            the divergence of the predictions to aim at, in nats per token
    basis   the axes to code along, calibrated for the model; None: those of the cache's own tokens, which are saved too
    If saving fails, `path` holds what it held before. Where `path` is a symbolic link, the file that it leads to is
    replaced and the link stays. While saving, about twice the saved bytes are needed in memory.
    On a sharded model every rank must call this. Rank 0 gathers the kv heads of all ranks, and writes the same file as
    for the unsharded model. For this it needs three times the saved bytes in memory.
    Raises ValueError for an empty cache, for one in the middle of a forward, for one whose model was deleted, and for a
    path that cannot be written. Raises TypeError where `path` is no path, and BrokenState if a forward broke off after
    only some layers of the cache had stored its tokens. Raises ValueError if the cache cannot be coded, and WrongBasis
    for the basis of another model.
    """
    path = named(path, _WHAT)
    ranks = cache.ranks
    model = ranks.agree("cache.save()", lambda: _checked(cache))
    if coded is not None:
        ranks.agree("cache.save()", lambda: check(cache, coded, basis))
    elif basis is not None:
        raise ValueError("a basis is to code along, and nothing is coded: give coded= too, such as coded=0.01")
    digest, peak_bytes = fingerprint(model), cache.peak_nbytes
    mine = ranks.agree("cache.save()", lambda: [_described(layer) for layer in cache.layers])
    states = [getattr(layer, "state", None) for layer in cache.layers]
    parts: Any = None
    if ranks.count > 1:
        sent = [part_of(*one, state) for one, state in zip(mine, states, strict=True)]
        parts = ranks.gather_first("cache.save()", sent)

    def write() -> None:
        if ranks.rank > 0:
            return
        described = mine
        if parts is not None:
            described = whole_layers(parts, [None if state is None else state.method for state in states])
        told = {}
        if coded is not None:
            entry, described = code(model, described, coded, basis)
            told = {"coded": entry}
        header = {
            "kvfloor": __version__,
            "transformers": transformers.__version__,
            "method": str(cache.method),
            "arguments": cache.arguments,
            "model": digest,
            "peak_bytes": peak_bytes,
            "layers": [plain for plain, _ in described],
            **told,
        }
        fields = {str(i): held for i, (_, held) in enumerate(described)} | {"masks": cache.presence.export()}
        replace_file(path, message.pack(header, fields), _MODE)

    ranks.agree("cache.save()", write)


def _checked(cache: CompressedCache) -> PreTrainedModel:
    """Return the model that filled `cache`. Raises ValueError or BrokenState for a cache that cannot be saved now."""
    cache.check_whole()
    if any(layer.staged_bytes for layer in cache.compressed):
        raise ValueError("a forward is not finished: its tokens are staged but not answered yet; save after it")
    if len({layer.seen for layer in cache.compressed if layer.state is not None}) > 1:
        raise BrokenState("the layers of this cache have seen different tokens: it is of no use, reset() it")
    return _model_of(cache)


def load(
    kind: type[Held],
    path: str | Path,
    model: PreTrainedModel,
    method: Method | None = None,
    most_bytes: int = MOST_BYTES,
    basis: CodingBasis | None = None,
) -> Held:
    """Load the cache saved at `path`, as an object of class `kind`, to continue on `model`.

    method       the method of the cache, needed only if a third party's class is part of it
    most_bytes   a larger file raises ValueError, and is not read in full
    basis        the basis that the cache was coded in, if it was saved with one
    Raises CorruptState for a file that is damaged, truncated or no saved cache; OlderVersion or NewerVersion for a file
    whose format an older or newer release wrote; WrongModel if another model filled the cache; WrongBasis if the cache
    was coded in another basis; UnknownMethod if the method named in the file cannot be built. Raises ValueError for a
    file that cannot be read or has more than `most_bytes`, for a model that is not prepared, and for a coded cache if
    zstandard is not installed. Raises TypeError where path, model, method or basis has another type.
    On a sharded model every rank must call this, on a file that it can read, and its cache keeps only its own kv heads.
    It makes no difference how many ranks the model was sharded over when the file was written.
    """
    path = named(path, _WHAT)
    model = unwrapped(model) if isinstance(model, torch.nn.Module) else model
    _check_arguments(model, method, most_bytes, basis)
    ranks = ranks_of(model)
    header, fields = ranks.agree(
        "CompressedCache.load()", lambda: message.unpack(message.read(path, most_bytes, _WHAT))
    )
    if "coded" in header:
        zstandard()
    here = fingerprint(model)  # outside the try: an unreadable model is no fault of the file
    try:
        _check_model(header["model"], here)
        own = _method(header["method"], method)
        cache = kind(model, own, **header["arguments"])
        devices, decoder = _devices(model), Decoder(header.get("coded"), basis)
        for i, (layer, plain) in enumerate(zip(cache.layers, header["layers"], strict=True)):
            held = decoder.decoded(i, plain, fields[str(i)])
            _restored(layer, plain, held, devices.get(i, input_device(model)), own, model, ranks)
        if len({layer.seen for layer in cache.compressed if layer.state is not None}) > 1:
            raise ValueError("its layers saw different numbers of tokens")
        cache.presence.adopt(fields["masks"], max((layer.seen for layer in cache.compressed), default=0))
        Field(int, least=0, most=2.0**63).require(header["peak_bytes"], "peak_bytes", {})
        cache.resume(header["peak_bytes"])
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as cause:
        if isinstance(cause, (UnknownMethod, WrongBasis, WrongModel)):
            raise
        saved, now = (f"transformers {v}" for v in (header.get("transformers"), transformers.__version__))
        raise CorruptState(f"{str(path)!r} was saved with {saved} and does not fit {now}: {cause}") from cause
    return cache


def _check_arguments(model: Any, method: Any, most_bytes: Any, basis: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be the model to continue with, got {model!r}")
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method must be a kvfloor Method or None, got {method!r}")
    if basis is not None:
        require_basis(basis)
    if not isinstance(most_bytes, int) or isinstance(most_bytes, bool) or most_bytes < 0:
        raise TypeError(f"most_bytes must be a whole number of bytes, got {most_bytes!r}")
    if not is_prepared(model):
        raise ValueError(
            f"{type(model).__name__} does not use kvfloor's attention: call kvfloor.hf.prepare(model) before loading"
        )


# ---- layers ------------------------------------------------------------------------------------------------


def _described(layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two dicts for one layer of a cache: a JSON-ready description, and the tensors to save."""
    plain: dict[str, Any] = {"layer": type(layer).__name__}
    if not isinstance(layer, CompressedLayer):
        return plain, stock.export(layer)
    plain["clocks"] = layer.clocks()
    fields = {"beside": stock.export(layer, layer.beside)}
    if layer.state is not None:
        plain |= {"method": str(layer.state.method), "spec": layer.state.spec.as_dict()}
        fields["state"] = layer.state.export()
    return plain, fields


def _restored(
    layer: Any,
    plain: dict[str, Any],
    fields: dict[str, Any],
    device: torch.device,
    own: Method,
    model: PreTrainedModel,
    ranks: Ranks,
) -> None:
    """Restore an empty cache layer from the description `plain` and the tensors `fields` that `_described` returned.

    device: where the layer's tensors are put; own: the method of the cache; model: the model to continue on, whose kv
    heads are divided among `ranks`. Raises ValueError if the layer's class differs.
    """
    if type(layer).__name__ != plain["layer"]:
        raise ValueError(f"a {plain['layer']} was saved where this cache has a {type(layer).__name__}")
    if not isinstance(layer, CompressedLayer):
        stock.adopt(layer, own_stock(fields, ranks), device)
        return
    state = None
    if "method" in plain:
        place = device if ranks.count == 1 else "cpu"  # whole: a rank's device has room for its own part
        state = rebuilt(_method(plain["method"], own), plain["spec"], fields["state"], place)
    stock.adopt(layer, fields["beside"], device, layer.beside)
    _check_clocks(plain["clocks"], state)
    if state is not None and ranks.count > 1:
        state = own_part(state, plain["clocks"]["batch"], ranks, device)
    layer.resume(state, plain["clocks"], model)


def _check_clocks(clocks: dict[str, Any], state: State | None) -> None:
    """Raise ValueError if a layer's saved counters are malformed or do not fit its state.

    clocks: the counters by name. They are the slots fed (columns of the padded batch), the batch size, and a flag that
    is True if the layer has received tokens. state: the layer's restored state, None if it is empty.
    """
    kinds = {name: type(value) for name, value in clocks.items()}
    if kinds != {"seen": int, "batch": int, "is_initialized": bool}:
        raise ValueError(f"a layer's clocks are {clocks!r}")
    rows, seen = (0, 0) if state is None else (state.spec.rows, int(state.seen.max()))
    batch_fits = clocks["batch"] > 0 and rows % clocks["batch"] == 0 if state is not None else clocks["batch"] >= 0
    if not (batch_fits and seen <= clocks["seen"] <= MOST):
        raise ValueError(f"a layer's clocks are {clocks!r}, its state has {rows} rows and saw {seen} tokens")


def _devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Return {layer index: device on which the layer computes}, of the layers whose device is known."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        index, place = getattr(module, "layer_idx", None), device_of(module)
        if isinstance(index, int) and place is not None:
            devices.setdefault(index, place)
    return devices


# ---- method and model --------------------------------------------------------------------------------------


def _method(text: str, given: Method | None) -> Method:
    """Return the method that `text`, from the saved cache, describes, or raise UnknownMethod.

    given: the method that the user passed, or None. A third party's class (module:Class) is accepted only if `given`
    names it too.
    """
    if given is not None and str(given) == text:
        return given
    foreign = _foreign(text) - (set() if given is None else _foreign(str(given)))
    if foreign:
        raise UnknownMethod(
            f"the cache was made by {text!r}; {', '.join(sorted(foreign))} is not imported because a file says so: "
            f"pass method=, the method itself"
        )
    try:
        return parse(text)
    except ValueError as cause:
        raise UnknownMethod(f"the cache was made by {text!r}, which this release cannot make: {cause}") from cause


def _foreign(text: str) -> set[str]:
    """Return the classes, as module:Class, that the text of a method names; a store such as k4v4 is none."""
    body, _, budget = split_once(text, "@")
    return set(_FOREIGN.findall(_QUOTED.sub("", f"{without_store(body)[0]} {budget}")))


def _model_of(cache: CompressedCache) -> PreTrainedModel:
    """Return the prepared model that filled the cache.

    Raises ValueError if the cache is empty, if several models filled it, or if the model was deleted.
    """
    served = [layer.served_by for layer in cache.compressed if layer.state is not None]
    if not served:
        raise ValueError("nothing was fed to this cache yet: there is nothing to save")
    models = {id(model): model for model in (None if ref is None else owner(ref()) for ref in served)}
    if len(models) > 1:
        raise ValueError("several models filled this cache: it continues none of them")
    (model,) = models.values()
    if model is None:
        raise ValueError(
            "the model that filled this cache is gone or is a copy of a prepared one, or the cache was unpickled and "
            "has served none since: save before the model is deleted and after a forward, and call "
            "kvfloor.hf.prepare(model) on a copy first"
        )
    return model


def _check_model(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise WrongModel unless two fingerprints are equal: `theirs` from the saved cache, `mine` of the given model."""
    if theirs == mine:
        return
    what = "another one" if theirs["model"] == mine["model"] else f"a {theirs['model']}"
    why = "weights, dtype or configuration differ"
    on, here = (", ".join(model["adapters"]) or "none" for model in (theirs, mine))
    if on != here:
        why = f"the adapters that were on are {on}, and here {here}: switch them as they were, or else also {why}"
    raise WrongModel(
        f"the cache was filled by {what}, not by this {mine['model']}: {why} "
        f"(digest {theirs['sha256'][:12]} there, {mine['sha256'][:12]} here)"
    )
