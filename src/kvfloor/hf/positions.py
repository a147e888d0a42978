"""Undo a model's rotary embedding, for positions="cache": find each layer's rotation, and rotate keys back.

A rotary model rotates queries and keys by their position before a cache receives them. A cache with positions="cache"
stores keys without this rotation. When keys are read, each is rotated by its token's rank among the held tokens
instead.
A layer's rotation is measured on the model, not looked up by model family. One token is fed alone at several positions,
one per batch item. A token alone attends only to itself, so nothing but its rotation depends on its position. The
layer's key and query at each position must then equal those at position 0, rotated with the frequencies of one of the
model's own rotary modules.
A `Rotation` is one layer's rotary embedding: the frequencies, and the entries of a key that are rotated in pairs. A
`Circle` is the cosine and the sine of each pair's angle. B is the batch, H and Hkv the numbers of query heads and kv
heads, n the number of tokens, pairs the number of rotated pairs. A compressed layer is one whose keys and values
kvfloor compresses; the place of a layer is its index among the compressed layers. A prepared model is one that
`kvfloor.hf.prepare` has made work with such layers.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvfloor.core.attend import compute_dtype
from kvfloor.core.rotation import Circle, Rotation
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.weights import input_device

FAR = 1_000_003  # a position that no model was trained for, and that float32 angles already round
TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}  # of the largest entry
_TABLE = re.compile(r"(^|\.)(wpe|\w*pos\w*)$")
_LENGTH_DEPENDENT = {
    "dynamic": "dynamic NTK scaling changes all frequencies with the length of the stream",
    "longrope": "LongRoPE changes its frequencies once the stream is longer than the model was first trained for",
}


class Memo:
    """Cache the rotary cosines and sines of one forward's positions, shared by all layers with the same rotation."""

    def __init__(self) -> None:
        self._positions: weakref.ref[Tensor] | None = None
        self._place = -1
        self._circles: dict[tuple[Rotation, torch.dtype], Circle] = {}

    def circle(self, rotation: Rotation, place: int, positions: Tensor, dtype: torch.dtype) -> Circle:
        """Return cosines and sines of a rotation's angles at positions (B or 1, n): each (B or 1, 1, n, pairs).

        place: index of the calling layer among the compressed layers. In a forward, layers call in rising order of
        place. So a place that is not larger than in the last call means a new forward, and the cached cosines and sines
        are dropped. They are dropped too if `positions` is another tensor than last time. dtype: that of the result.
        """
        same = self._positions is not None and self._positions() is positions
        if not same or place <= self._place:  # another forward, whose positions may be the same tensor with new numbers
            self._circles.clear()
            self._positions = weakref.ref(positions)
        self._place = place
        if (rotation, dtype) not in self._circles:
            self._circles[rotation, dtype] = rotation.circle(plain(positions).unsqueeze(1), dtype)
        return self._circles[rotation, dtype]


@dataclass(frozen=True)
class TurnBack:
    """Undo the rotary embedding that a model has applied to one layer's queries and keys.

    rotation   the layer's rotary embedding
    place      index of the layer among the compressed layers
    memo       cosines and sines, shared by all layers of a cache
    """

    rotation: Rotation
    place: int
    memo: Memo

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return query (B, H, n, d) and key (B, Hkv, n, d) without their rotation; value is not used.

        positions: those by which the model rotated query and key: (B or 1, n), or (axes, B or 1, n) if the model gives
        one position per axis, such as time, height and width. Raises ValueError if positions is None.
        """
        del value
        if positions is None:
            raise ValueError('the model passed no position_ids to its attention, which positions="cache" turns back by')
        circle = self.memo.circle(self.rotation, self.place, positions, compute_dtype(key.dtype))
        return tuple(self.rotation.turned(x, circle, back=True) for x in (query, key))  # pyright: ignore[reportReturnType]


def plain(positions: Tensor) -> Tensor:
    """Return a model's positions as (B or 1, n), given in this shape or once per axis: (axes, B or 1, n).

    Axes are, for example, time, height and width; a text token has the same position on each. Raises ValueError if a
    token's positions on the axes differ, as they do for image tokens.
    """
    if positions.ndim < 3:
        return positions
    if not bool((positions == positions[:1]).all()):
        raise ValueError(
            'positions="cache" counts tokens of text; these have several axes that differ, as those of images do: use '
            'positions="stream"'
        )
    return positions[0]


def rotations(model: PreTrainedModel) -> list[Rotation | None]:
    """Return the measured rotary embedding of each compressed layer of a prepared model, in the layers' order.

    The entry is None for a layer that does not rotate. Feeds single tokens at a few positions to the model, in two
    forwards. Raises ValueError, naming the reason, for a model whose positions are not fixed rotations (learned tables,
    frequencies that change with the length), and in training mode.
    """
    name = type(model).__name__
    if model.training:
        raise ValueError(
            f'positions="cache" feeds {name} a token to see how it turns its keys: call model.eval() first'
        )
    room = table_room(model)
    if room is not None:
        raise ValueError(
            f'{name} has a learned table of {room} positions, not a rotation that could be turned: positions="cache" '
            f"is for rotary models; with this one no stream is longer than its table"
        )
    for module in model.modules():
        for kind in _rope_types(module):
            if kind in _LENGTH_DEPENDENT:
                raise ValueError(f'positions="cache" cannot serve {name}: {_LENGTH_DEPENDENT[kind]}')
    if _scales_queries(model.config.get_text_config(decoder=True)):
        raise ValueError(
            f'positions="cache" cannot serve {name}: it does not turn its keys and queries by one rotation alone, but '
            f"scales its queries by their position in the stream (llama_4_scaling_beta)"
        )
    trained = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    near = sorted({0, 1, 2, 3, 7, 64, trained // 2, trained - 1} & set(range(trained)))
    first, second = _probed(model, near), _probed(model, [0, 2 * trained + 1, FAR])
    candidates = _candidates(model)
    found = {index: _found(name, index, [*first[index], *second[index]], candidates) for index in first}
    for index, rotation in found.items():
        if rotation is not None and not all(seen.positions_came for seen in (*first[index], *second[index])):
            raise ValueError(
                f'positions="cache" cannot serve {name}: layer {index} passes no position_ids to its attention, so '
                f"nothing tells by how much its keys were turned"
            )
    return list(found.values())


@dataclass
class _Inputs:
    """Hold the query, key and value (B, heads, d) of one token, fed at a different position in each batch item.

    place           (B,) these positions in the stream
    query, key      as one layer's attention received them, already rotated
    value           None where the value is the key
    positions_came  True if the model gave these positions to its attention function
    """

    place: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    positions_came: bool


@dataclass
class _Recorder:
    """Record the queries, keys and values of the compressed layer whose attribute `turn_back` is set to this object.

    Before attention, the layer calls `turn_back` with its query, key and value, and attends with the query and key that
    the call returns. A recorder returns both unchanged.
    place    (B,) the position in the stream of each batch item's one token; in this class it is no index of a layer
    seen     the inputs of every call so far
    """

    place: Tensor
    seen: list[_Inputs] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        came = positions is not None and torch.equal(plain(positions)[:, 0].to(self.place), self.place)
        other = None if value is key else value[:, :, 0].clone()
        self.seen.append(_Inputs(self.place, query[:, :, 0].clone(), key[:, :, 0].clone(), other, came))
        return query, key


def _probed(model: PreTrainedModel, positions: Sequence[int]) -> dict[int, list[_Inputs]]:
    """Feed one token at each of these positions to the model, and return the attention inputs of each layer.

    The positions form one batch. Returns {layer index: one `_Inputs` per call of the layer's attention}. Raises
    ValueError if the model cannot run on single tokens at chosen positions.
    """
    name, place = type(model).__name__, torch.tensor(positions, device=input_device(model))
    cache, layers = watched_cache(model.config)
    recorders = {layer.index: _Recorder(place) for layer in layers}
    for layer in layers:
        layer.turn_back = recorders[layer.index]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    token = torch.full((len(positions), 1), vocabulary // 3, device=place.device)
    try:
        with torch.inference_mode():
            model(input_ids=token, position_ids=place.unsqueeze(1), past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as cause:
        raise ValueError(
            f'positions="cache" has to know how {name} turns its keys, and it cannot be asked for single tokens at '
            f"chosen positions: {cause}"
        ) from cause
    unasked = [index for index, recorder in recorders.items() if not recorder.seen]
    if unasked:
        raise ValueError(f'positions="cache" cannot serve {name}: layer {unasked[0]} asks no one for its attention')
    return {index: recorder.seen for index, recorder in recorders.items()}


def _candidates(model: PreTrainedModel) -> list[tuple[float, ...]]:
    """List the frequency tuples of the model's rotary modules, and then the same tuples with the opposite sign.

    The opposite sign is for NanoChat, which rotates in the other direction.
    """
    found: dict[tuple[float, ...], None] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1 and not buffer.is_meta:
                found[tuple(buffer.float().tolist())] = None
    return [*found, *(tuple(-x for x in one) for one in found)]


def _found(name: str, index: int, seen: Sequence[_Inputs], candidates: Sequence[tuple[float, ...]]) -> Rotation | None:
    """Return the rotation by which a layer's recorded queries and keys were rotated; None if they are unrotated.

    name: the model's name, for the error. index: the layer's index. seen: the layer's recorded inputs. candidates: the
    frequency tuples to try. Raises ValueError, naming the model, if none of them gives the recorded queries and keys.
    """
    d = seen[0].key.shape[-1]
    for one in seen:
        if one.value is not None and _apart(one.value, one.value[:1]) > TOLERANCE[one.value.dtype]:
            raise ValueError(
                f'positions="cache" cannot serve {name}: positions enter its hidden states, not only its keys and '
                f"queries, so that they cannot be taken back"
            )
    rules: list[Rotation | None] = [None]
    for frequencies in candidates:
        for start in sorted({0, d - 2 * len(frequencies)}):
            rules += [Rotation(frequencies, start, pairs) for pairs in (False, True) if start >= 0]
    for rule in rules:
        if (rule is None or rule.stop <= d) and all(_explains(rule, one) for one in seen):
            return rule
    raise ValueError(
        f'positions="cache" cannot serve {name}: layer {index} does not turn its keys and queries by one rotation with '
        f"the frequencies of the model's rotary modules ({len(candidates) // 2} found), side by side or half apart"
    )


def _explains(rule: Rotation | None, seen: _Inputs) -> bool:
    """Return True if `rule` rotates the recorded query and key at position 0 to those recorded at all other positions.

    rule: the rotation to test; None: no rotation, so queries and keys must be equal at all positions. seen: the inputs
    of one call of a layer's attention, at all positions.
    """
    for x in (seen.query, seen.key):
        wide = x.to(compute_dtype(x.dtype))
        expected = wide[:1].expand_as(wide)
        if rule is not None:
            expected = rule.turned(expected, rule.circle(seen.place.to(x.device).unsqueeze(1), wide.dtype))
        if not _apart(wide, expected) <= TOLERANCE[x.dtype]:
            return False
    return True


def _apart(x: Tensor, y: Tensor) -> float:
    """Return the largest absolute difference of x and y, divided by the largest entry of x; infinite if x is 0."""
    largest = float(x.abs().max())
    return float((x - y).abs().max()) / largest if largest > 0 else float("inf")


def _rope_types(module: nn.Module) -> list[str]:
    kind = getattr(module, "rope_type", None)
    kinds = list(kind.values()) if isinstance(kind, dict) else [kind]
    return [one for one in kinds if isinstance(one, str)]


def _scales_queries(decoder: PreTrainedConfig) -> bool:
    """Return True if the model multiplies its queries by a factor that grows with their position.

    decoder: the configuration of the model's text decoder; such a model has llama_4_scaling_beta in it. Feeding the
    model tokens at chosen positions would not show the factor: before transformers 5.3, the model computes it from a
    position count of its own.
    """
    rope = getattr(decoder, "rope_parameters", None) or {}
    return any(bool(part.get("llama_4_scaling_beta")) for part in (rope, *rope.values()) if isinstance(part, dict))


def table_room(model: nn.Module | None) -> int | None:
    """Return the number of positions in a model's learned position table; None without such a table or a model."""
    if not isinstance(model, PreTrainedModel):
        return None
    declared = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and isinstance(declared, int):
            ahead = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            room = module.num_embeddings - ahead
            if declared - 4 <= room <= declared:  # not a picture's, nor one that counts something else
                return room
    return None
