"""Run a prompt through the model once, and fill several caches with the queries, keys and values of this run.

Only caches that keep the whole prompt until its end, and compress it then, are filled in this way. An exact cache is
one that never drops a token. Until the prompt's end, the layers of both kinds of cache receive the same queries, keys
and values. A `SharedPrompt` records these in one run of the model with an exact cache, and fills the other caches from
the record. A piece of the record (`_Piece`) is what one layer received in one forward.
Each cache is given as part of a dialogue (`kvfloor.hf.decode.Dialogue`). A dialogue is a batch in the course of
decoding: its model, its cache, its attention mask and its last logits. Filling sets the cache, the mask and the logits.
Prompts of different length are padded to one width. A slot is one column of the padded batch, and lengths in this file
are counted in slots.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from kvfloor.core.bounded import Bounded
from kvfloor.core.exact import Exact
from kvfloor.core.method import Method
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.layer import Law

MOST_BYTES = 2**30


@dataclass
class Room:
    """Count the bytes that the records of several prompts may still take together, in this process.

    A prompt whose record does not fit is run through the model for every cache.
    """

    left: int = MOST_BYTES


def is_exact_in_the_prompt(method: Method) -> bool:
    """Return True if a method keeps the whole prompt until its end, so that its cache can be filled from a record."""
    return isinstance(method, Bounded) and method.answers_prompt_exactly


class SharedPrompt:
    """Feed one prompt to many caches, with one run of the model for all that compress only at the prompt's end."""

    def __init__(
        self,
        model: Any,
        token_ids: Sequence[Sequence[int]],
        chunk: int,
        methods: Sequence[Method],
        room: Room | None = None,
    ) -> None:
        """Prepare to feed one list of token ids per batch item, `chunk` slots per forward.

        model    the model, as `kvfloor.hf.prepare` returned it
        methods  methods of all caches that will be fed. The prompt is recorded only if at least one of them keeps the
                 whole prompt until its end and compresses it then
        room     bytes left for this record and the records of other prompts that were given the same object; by default
                 1 GiB (MOST_BYTES) for this record alone. If the bytes do not suffice, the model runs for every cache
        """
        self._model, self._token_ids, self._chunk, self._room = model, token_ids, chunk, room or Room()
        filled = [method for method in methods if is_exact_in_the_prompt(method)]
        self._waited_for, self._asked = bool(filled), _most_asked(filled)
        self._intake: Intake | None = None
        self._seconds = 0.0  # of the run that was recorded

    def feed(self, dialogue: Dialogue) -> float:
        """Feed the prompt to a dialogue whose cache is empty, by the model or from the record, and return the seconds.

        For a cache that is filled from the record, the seconds are those of the model's recorded run plus those of the
        filling. So they can be compared with the seconds of a cache to which the model fed the prompt.
        """
        cache = dialogue.cache
        method = cache.method if isinstance(cache, CompressedCache) else None
        intake = self._recorded() if method is not None and is_exact_in_the_prompt(method) else None
        begin = time.perf_counter()
        if intake is not None and method is not None and intake.serves(method):
            intake.give(dialogue)
            return self._seconds + time.perf_counter() - begin
        if isinstance(method, Exact) and self._waited_for:
            self._record(dialogue)
        else:
            dialogue.feed(self._token_ids, self._chunk)
        return time.perf_counter() - begin

    def _recorded(self) -> Intake | None:
        """Return the record of the prompt; make it first if that was not tried before.

        Returns None if there was too little room for it, and for a model from which no record can be made.
        """
        if self._waited_for:
            self._record(Dialogue.start(self._model, CompressedCache(self._model, Exact()), len(self._token_ids)))
        return self._intake

    def _record(self, dialogue: Dialogue) -> None:
        begin = time.perf_counter()
        self._intake = record_intake(dialogue, self._token_ids, self._chunk, self._room, self._asked)
        self._seconds, self._waited_for = time.perf_counter() - begin, False


@dataclass(frozen=True)
class _Piece:
    """Hold what one layer received in one forward: q (batch, heads, n, d), k and v (batch, kv heads, n, .).

    law: a pair of the factor on q.k, and the cap on logits or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    law: Law

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.q, self.k, self.v))

    def without_queries(self) -> _Piece:
        """Return a piece that takes less memory, for methods that do not need its queries.

        All queries are replaced by the first one, stored once, so that q keeps its shape.
        """
        return replace(self, q=self.q[:, :, :1].clone().expand_as(self.q))


@dataclass(frozen=True)
class Intake:
    """Hold the queries, keys and values of a prompt, as the layers of an exact cache received them.

    pieces  {index of a layer in the model: one piece per forward, oldest first}
    mask    (batch, slots), 1 in slots of tokens and 0 in pads
    logits  (batch, vocabulary): the model's, after the last slot
    asked   number of newest slots whose queries are held; None: all
    """

    pieces: dict[int, list[_Piece]]
    mask: Tensor
    logits: Tensor
    asked: int | None

    def serves(self, method: Method) -> bool:
        """Return True if a cache of this method can be filled from the record.

        The method must keep the whole prompt until its end, and all queries that it needs must have been recorded.
        """
        if not is_exact_in_the_prompt(method):
            return False
        asked = _most_asked([method])
        return self.asked is None or (asked is not None and asked <= self.asked)

    def give(self, dialogue: Dialogue) -> None:
        """Fill the empty cache of a dialogue with the prompt, without running the model.

        The dialogue's cache, mask and logits are then as if the model had been fed the prompt. Raises ValueError if the
        cache is not empty, is of a model with other layers, or stores keys without their rotation (positions="cache").
        Raises ValueError also if its method may evict tokens before the prompt's end, or needs queries that are not
        held.
        """
        cache = dialogue.cache
        if not (isinstance(cache, CompressedCache) and is_exact_in_the_prompt(cache.method)):
            raise ValueError("a recorded prompt is for a method that keeps all of it until its end, such as snapkv@512")
        if not self.serves(cache.method):
            raise ValueError(f"{cache.method} needs more queries than the newest {self.asked} that were recorded")
        if cache.get_seq_length() or {layer.index for layer in cache.compressed} != set(self.pieces):
            raise ValueError("a recorded prompt is for an empty cache of the same model")
        if any(layer.turn_back is not None for layer in cache.compressed):
            raise ValueError('recorded keys are rotated: a cache with positions="cache" must run the model itself')
        real, unasked = self.mask.bool(), self._unasked(cache.method)
        for number, stop in enumerate(self._stops):
            for layer in cache.compressed:
                piece = self.pieces[layer.index][number]
                keys, values = cache.update(piece.k, piece.v, layer.index)
                if stop <= unasked:
                    layer.append(piece.q, keys, values, real[:, :stop], piece.law)
                else:
                    layer.answer(piece.q, keys, values, real[:, :stop], *piece.law)
        dialogue.mask, dialogue.logits = self.mask, self.logits

    @property
    def _stops(self) -> list[int]:
        """Return, for each recorded forward, the number of slots fed in it and in all forwards before it."""
        return list(accumulate(piece.k.shape[2] for piece in next(iter(self.pieces.values()))))

    def _unasked(self, method: Method) -> int:
        """Return how many of the oldest slots have queries without any influence on the tokens that a method keeps."""
        asked = _most_asked([method])
        return 0 if asked is None else self.mask.shape[1] - asked


def _most_asked(methods: Sequence[Method]) -> int | None:
    """Return the number of newest slots whose queries may influence what these methods keep; None: all slots.

    A method chooses tokens to keep after every block, i.e. a fixed number of new tokens. For this it looks at the
    newest w queries, where w depends on the method. The last complete block may end up to one block before the prompt
    does. So the result is w plus the length of a block, for the method that needs most; 0 if no method looks at
    queries.
    """
    most = 0
    for method in methods:
        assert isinstance(method, Bounded)
        if method.prompt_queries is None:
            return None
        most = max(most, method.prompt_queries + method.block if method.prompt_queries else 0)
    return most


class _IntakeRecorder:
    """Record the queries, keys and values that a cache's compressed layers receive; drop all once no room is left.

    room    bytes that this record and others may still take
    pieces  {index of a layer in the model: one `_Piece` per forward, oldest first}
    asked   number of newest slots whose queries are recorded; None: all
    """

    def __init__(self, cache: CompressedCache, room: Room, asked: int | None) -> None:
        self.pieces: dict[int, list[_Piece]] = {layer.index: [] for layer in cache.compressed}
        self._room, self._taken, self._asked, self.is_over = room, 0, asked, False
        for layer in cache.compressed:
            layer.record = self._into(layer.index)

    def _into(self, index: int) -> Any:
        def keep(q: Tensor, k: Tensor, v: Tensor, *law: Any) -> None:
            if self.is_over:
                return
            pieces = self.pieces[index]
            pieces.append(_Piece(q.clone(), k.clone(), v.clone(), law[:2]))  # answers are dropped, so sinks may be too
            self._take(pieces[-1].nbytes)
            if self._asked is not None:
                self._drop_queries(pieces, self._asked)
            if self._room.left < 0:
                self.drop()

        return keep

    def drop(self) -> None:
        """Drop the record, make its bytes available to other records again, and record nothing more."""
        self.is_over = True
        self.pieces.clear()
        self._take(-self._taken)

    def _take(self, nbytes: int) -> None:
        self._taken += nbytes
        self._room.left -= nbytes

    def _drop_queries(self, pieces: list[_Piece], asked: int) -> None:
        """Drop the queries of each piece that has none of the newest `asked` slots.

        pieces: the pieces of one layer, oldest first.
        """
        after = 0
        for number in range(len(pieces) - 1, -1, -1):
            piece, before = pieces[number], pieces[number].nbytes
            if after >= asked:
                pieces[number] = piece.without_queries()
                self._take(pieces[number].nbytes - before)
            after += piece.k.shape[2]


def record_intake(
    dialogue: Dialogue,
    token_ids: Sequence[Sequence[int]],
    chunk: int,
    room: Room,
    asked: int | None = None,
) -> Intake | None:
    """Feed a prompt to a dialogue over an empty exact cache, and return what the cache's layers received.

    token_ids  one list per batch item
    chunk      slots per forward
    room       bytes that the record may take; those taken are subtracted from it
    asked      number of newest slots whose queries are recorded; None: all. A cache whose method needs the queries of
               more slots must not be filled from the record

    Returns None if there is too little room for the record, and for a model with layers that cannot be filled from one:
    layers with transformers' own storage (sliding windows, linear attention), layers that share their keys, and layers
    whose key and value are one tensor (latent attention).
    """
    cache = dialogue.cache
    assert isinstance(cache, CompressedCache)
    plain = len(cache.compressed) == len(cache.layers) and not any(layer.has_readers for layer in cache.compressed)
    recorder = _IntakeRecorder(cache, room, asked) if plain else None
    try:
        dialogue.feed(token_ids, chunk)
    except BaseException:
        if recorder is not None:
            recorder.drop()
        raise
    finally:
        for layer in cache.compressed:
            layer.record = None
    if recorder is not None and any(layer.state is not None and layer.state.spec.tied for layer in cache.compressed):
        recorder.drop()
    if recorder is None or recorder.is_over:
        return None
    assert dialogue.logits is not None
    return Intake(recorder.pieces, dialogue.mask.clone(), dialogue.logits.clone(), asked)
