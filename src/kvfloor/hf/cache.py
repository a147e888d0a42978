"""Define CompressedCache, the bounded-memory cache that is passed to `generate(past_key_values=...)`.

A method is a way to compress a KV cache, such as an eviction policy with a budget. A compressed layer is a cache layer
whose keys and values are stored by a method; its state is all that the method stores of them. A prepared model is one
that went through `kvfloor.hf.prepare`, so that its attention can use such layers. A slot is one column of the padded
batch. If a forward breaks off (by an error or an interrupt), some layers have stored its tokens and others have not.
The cache is then unusable.

On a model sharded by tensor parallelism, each process (rank) makes a cache with the same arguments, which holds the kv
heads that the rank computes. Budgets, seeds, and reported bytes and tokens are those of the whole cache, of all ranks
together. In a forward, the caches of different ranks exchange nothing. `nbytes`, `bytes`, `peak_nbytes`, `bytes_read`,
`report`, `save` and `load` gather data from all ranks. They are collective: every rank must call them, in the same
order.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvfloor.core.bounded import Bounded
from kvfloor.core.method import Method, standard_law
from kvfloor.core.rotation import Rotation
from kvfloor.hf import other_layers as stock
from kvfloor.hf.allocate import Shares, pyramid
from kvfloor.hf.bases import CodingBasis
from kvfloor.hf.calibrate import floor_shares
from kvfloor.hf.families import key_readers
from kvfloor.hf.layer import CompressedLayer, Eviction, Meter
from kvfloor.hf.layers import cache_layers, layers_served
from kvfloor.hf.lent import LentKeys
from kvfloor.hf.mixed import choose_layers
from kvfloor.hf.opener import Opening
from kvfloor.hf.passage import Passage, outside_inference
from kvfloor.hf.positions import Memo, TurnBack, rotations
from kvfloor.hf.prepare import is_prepared
from kvfloor.hf.presence import Presence
from kvfloor.hf.promise import OnViolation, Promise, certified_entry
from kvfloor.hf.ranks import ranks_of
from kvfloor.hf.replaced import SwitchingRotation
from kvfloor.hf.saved import MOST_BYTES, load, save
from kvfloor.hf.whole import row_budgets, whole_entry
from kvfloor.hf.wrappers import refuse_own_cache, unwrapped
from kvfloor.methods.compaction.compact import Compact, CompactState, Span
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.auto import Auto
from kvfloor.methods.mixed.layered import Layered


class CompressedCache(Cache):
    """Compress the keys and values of full-attention layers by a kvfloor method, within a budget.

    Sliding-window, convolution and linear layers keep transformers' own storage.

    config     the model's configuration, or the model. Give the prepared model for a method that predicts later queries
               (such as the policy `expected`): it then works on keys without their rotary embedding, as in its paper
    method     a Method or its text, e.g. "h2o(recent=64)@512": the policy H2O, with a budget of 512 tokens per kv head
               after the '@'. A budget in bytes, such as "@64MiB", is for the whole cache. "layers(2*exact:k5v4,exact)"
               has one method per compressed layer; "auto(rows='rows.json')@64MiB" chooses them, for the model and
               `context`, from costs that `kvfloor measure-layers` wrote. `self.method` then has the chosen methods
    context    length in tokens; a budget such as "@25%" is a share of this length
    seed       seeds the method's own randomness
    requests   one id per batch item, which seeds that item's randomness together with `seed`; 0, 1, 2, ... unless given
    budgets    tokens per compressed layer and kv head, [[512, 128], [64, 64], ...], instead of the method's '@' budget;
               one number in a layer is for all its heads
    allocate   how to divide the method's one budget: "uniform"; "pyramid" (less for deeper layers); "floor" (more for
               heads whose attention outputs reveal the values of more tokens); or a table like `budgets` of multiples
               of the budget. "floor" needs the model, and `calibration`: the token ids of a typical prompt, on which
               the heads are measured
    pinned     spans [from, to) of token positions that are never evicted, e.g. [(0, 40)] for a system prompt; positions
               count a batch item's real tokens, pads excluded
    on_evict   called with an `Eviction` (layer, batch items, kv heads and positions) whenever a layer evicts tokens; on
               a sharded model each rank is told of its own kv heads, by their numbers in the whole model
    positions  "stream": a token's rotary position is its place in the stream, evicted tokens counted. "cache": it is
               the token's rank among the tokens that its kv head still holds (StreamingLLM). So no distance is longer
               than the budget, and a stream can go on past the positions that the model was trained for. "cache" needs
               the prepared model, rotary positions, and a method that holds whole tokens
    max_error  promise that each layer bounds the error of each attention output by this share of the largest norm of a
               value that the query sees; for methods that certify their answers, such as tiered. None: no promise. A
               bound per layer is no bound on logits (docs/certificates.md)
    on_violation  what happens to an answer whose bound is larger than `max_error`. "fallback": exact tokens are fetched
               until it is not, i.e. the method's epsilon is lowered to `max_error`. "flag": the answer is given, and
               `report()` counts it. "raise": PromiseBroken, after which the cache refuses use until `reset()`
    One cache serves one request (or one batch) at a time, on a prepared model.
    Raises TypeError and ValueError naming the argument. Errors that need the model's keys to detect (a budget smaller
    than the tokens that must be kept, a table with a wrong number of heads) are raised in the first forward.
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        method: Method | str,
        *,
        context: int | None = None,
        seed: int = 0,
        requests: Sequence[int] | None = None,
        budgets: Sequence[int | Sequence[int]] | None = None,
        allocate: Literal["uniform", "pyramid", "floor"] | Sequence[float | Sequence[float]] | None = None,
        calibration: Sequence[int] | Tensor | None = None,
        pinned: Sequence[tuple[int, int]] = (),
        on_evict: Callable[[Eviction], None] | None = None,
        positions: Literal["stream", "cache"] = "stream",
        max_error: float | None = None,
        on_violation: OnViolation = "fallback",
    ) -> None:
        refuse_own_cache(config)
        model = None if isinstance(config, PreTrainedConfig) else unwrapped(config)
        self.ranks = ranks_of(config if model is None else model)
        config = config if isinstance(config, PreTrainedConfig) else unwrapped(config).config
        self.method = parse(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a kvfloor Method or its text, got {type(method).__name__}")
        standard_law(self.method, "a model's cache")
        if isinstance(self.method, Auto):
            self.method = _chosen(self.method, model, context)
        promise = _promise(max_error, on_violation)
        if promise is not None:
            self.method = promise.kept_by(self.method)
        served = layers_served(config)
        opening = Opening(
            self.method,
            served,
            context,
            seed,
            None if requests is None else tuple(int(request) for request in requests),
            None if budgets is None else _table("budgets", budgets, int),
            _shares(allocate, model, calibration, served),
            tuple((int(start), int(stop)) for start, stop in pinned),
            _rotations(positions, self.method, model),
            _applied(positions, self.method, model),
            self.ranks,
            promise,
        )
        kept = ("context", "seed", "requests", "budgets", "pinned")
        # The arguments with which `load` constructs the cache; JSON-ready.
        self.arguments: dict[str, Any] = {name: getattr(opening, name) for name in kept} | {"allocate": opening.shares}
        if positions == "cache":
            self.arguments["positions"] = positions
        if promise is not None:
            self.arguments |= dataclasses.asdict(promise)
        self._meter, self.presence = Meter(), Presence()
        self._passage = Passage.of(config)
        self._rotation = SwitchingRotation.of(config)
        super().__init__(layers=cache_layers(config, opening, self._meter, self._passage, self.presence))
        readers = key_readers(config)
        if any(readers):
            self.shared_layers = LentKeys(readers)
        self._empty = [None if isinstance(layer, CompressedLayer) else stock.blank(layer) for layer in self.layers]
        memo = Memo()
        for layer, rotation in zip(self.compressed, opening.rotations or (), strict=False):
            layer.turn_back = None if rotation is None else TurnBack(rotation, layer.place, memo)
        if on_evict is not None:
            self.call_on_evict(on_evict)

    def call_on_evict(self, on_evict: Callable[[Eviction], None] | None) -> None:
        """Call `on_evict` with an `Eviction` whenever a layer evicts tokens from now on; None stops the calls.

        Raises ValueError for a method that does not evict whole tokens.
        """
        if not any(isinstance(one, Bounded) for one in self.method.kinds):
            raise ValueError(f"on_evict is told of whole tokens that leave; {self.method} evicts none")
        for layer in self.compressed:
            layer.call_on_evict(on_evict)

    @property
    def compressed(self) -> list[CompressedLayer]:
        """Return the cache layers that a kvfloor method compresses, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of token slots fed to layer `layer_idx` so far, pads and evicted tokens included.

        Some models (Phi-3) change their rotary angles at a certain length. generate() compares the number with this
        length, to replace the cache there. For such a model, the number is an int whose comparison then raises
        ValueError.
        """
        seen = super().get_seq_length(layer_idx)
        return seen if self._rotation is None else self._rotation.seen(seen)

    def __bool__(self) -> bool:
        """Return True if the cache has layers, filled or not.

        Some models (Phi-3) change their rotary angles at a certain length. At that length, generate() of an older
        transformers release would silently replace this cache by a DynamicCache. So ValueError is raised here, unless
        the cache is longer than that already. In newer releases the error comes from `get_seq_length` instead, when
        generate() compares its result with that length.
        """
        if self._rotation is not None:
            self._rotation.refuse_unasked(int(super().get_seq_length()))
        return len(self.layers) > 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return the attention mask's sizes for layer `layer_idx`: (number of slots covered, index of the first slot).

        query_length: the number of new slots; before transformers 5.3, a tensor of their positions.
        Raises ValueError if the forward would pass the length at which the model changes its rotary angles (Phi-3),
        since the keys in the cache do not fit beyond it.
        """
        slots, offset = super().get_mask_sizes(query_length, layer_idx)
        if self._rotation is not None:
            seen = int(super().get_seq_length())
            self._rotation.refuse_crossing(seen, slots + offset - seen)
        return slots, offset

    def seal(self) -> None:
        """Mark the end of the prompt now: methods that compress the prompt as a whole, such as SnapKV, do so here.

        Without this call, the first one-token forward marks the end.
        """
        with self._passage.change("seal()"):
            for layer in self.compressed:
                if layer.state is not None:
                    layer.state.seal()

    def compact(self, span: Span = None, to: float = 0.05) -> None:
        """Shrink a finished span of tokens to a share of it in every layer and kv head; for the method `compact`.

        span  positions (start, stop), or a slice of them, counted in a batch item's real tokens, pads excluded; None:
              all tokens so far. An item with fewer tokens than `stop` compacts those that it has
        to    share of the span's tokens that stays, above 0 and at most 1; 0.05: a twentieth. Of a span that was
              compacted before, this share of its original tokens stays
        Keys of the tokens that stay are their own; log-weights and values are fitted so that attention to them has the
        mass and outputs of the whole span, for a sample of the queries since the last call. Later tokens are kept
        exactly. On a sharded model every rank calls it with the same arguments. Raises ValueError, the cache unchanged,
        for another method, for an empty cache, and for arguments out of their domain. Any other exception makes the
        cache refuse further use.
        """
        states = [layer.state for layer in self.compressed]
        if not isinstance(self.method, Compact):
            raise ValueError(
                f"{self.method} compacts no spans: make the cache with the method that does, "
                f'CompressedCache(model, "compact")'
            )
        if not any(isinstance(state, CompactState) for state in states):
            raise ValueError("this cache has no tokens that could be compacted: feed a prompt first")
        self.check_whole()
        for state in states:
            if isinstance(state, CompactState):
                state.require_compactable(span, to)
        with self._passage.change("compact()"):
            for layer in self.compressed:
                layer.compact(span, to)

    def to(self, device: str | torch.device) -> Self:
        """Move all of the cache's tensors to `device`, for a model that has been moved there. Returns the cache.

        Does nothing if every tensor is on `device` already, so accelerate's hooks may call it during a forward.
        """
        if not self._devices() <= {_place(device)}:
            self._move(device)
        return self

    def _move(self, device: str | torch.device) -> None:
        with self._passage.change("to()"):
            for layer in self.layers:
                if isinstance(layer, CompressedLayer):
                    layer.to(device)
                    stock.move(layer, device, layer.beside)
                else:
                    stock.move(layer, device)

    def _devices(self) -> set[torch.device]:
        states = {_place(layer.state.spec.device) for layer in self.compressed if layer.state is not None}
        beside = [layer.beside if isinstance(layer, CompressedLayer) else None for layer in self.layers]
        return states.union(*(stock.devices(*pair) for pair in zip(self.layers, beside, strict=True)))

    def check_whole(self) -> None:
        """Raise BrokenState if the newest forward has not reached all layers: it is running, or broke off halfway."""
        self._passage.check()

    # ---- transformers' protocol, so that a forward is known to have reached all layers or none --------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass this forward's keys and values to layer `layer_idx`, and return the keys and values to attend to.

        A compressed layer returns the new ones alone. kvfloor's attention function recognises these, has the layer
        append them to its state, and attends to all tokens that the state holds. Raises BrokenState if an earlier
        forward broke off.
        """
        if isinstance(self.layers[layer_idx], CompressedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        _told(self._passage.begin_keys, layer_idx)
        _told(self._passage.changing, layer_idx)
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        _told(self._passage.took_keys, layer_idx)
        return out

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of the convolution of layer `layer_idx`; None before the first forward.

        state_idx: which of the layer's convolutions, if it has several.
        """
        _told(stock.count_changes, self.layers[layer_idx])
        state = super().get_conv_state(layer_idx, state_idx)
        _told(self._passage.hand_out, layer_idx, "conv", state_idx, state)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state of the linear layer `layer_idx`; None before the first forward.

        state_idx: which of the layer's recurrent states, if it has several.
        """
        _told(stock.count_changes, self.layers[layer_idx])
        state = super().get_recurrent_state(layer_idx, state_idx)
        _told(self._passage.hand_out, layer_idx, "recurrent", state_idx, state)
        return state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Store new inputs of layer `layer_idx`'s convolution, and return the latest inputs that the convolution needs.

        conv_states: the new inputs. state_idx: which of the layer's convolutions, if it has several. Both, and further
        arguments, are passed on to transformers' own cache layer.
        """
        call = super().update_conv_state
        _told(self._passage.begin_state, layer_idx, "conv", state_idx)
        _told(stock.count_changes, self.layers[layer_idx])
        out = outside_inference(call, conv_states, layer_idx, **_which(state_idx), **kwargs)
        _told(self._passage.filled_state, layer_idx, "conv", state_idx)
        return out

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Replace the recurrent state of the linear layer `layer_idx` by `recurrent_states`, and return the new one.

        state_idx: which of the layer's recurrent states, if it has several. All arguments are passed on to
        transformers' own cache layer.
        """
        call = super().update_recurrent_state
        _told(self._passage.begin_state, layer_idx, "recurrent", state_idx)
        _told(stock.count_changes, self.layers[layer_idx])
        out = outside_inference(call, recurrent_states, layer_idx, **_which(state_idx), **kwargs)
        _told(self._passage.filled_state, layer_idx, "recurrent", state_idx)
        return out

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the batch items `beam_idx`, in that order, in every layer.

        After a failure halfway, the cache refuses further use.
        """
        with self._passage.change("reorder_cache"):
            super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]: int64 is what it takes
            self.presence.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch item `repeats` times, copies side by side, in every layer."""
        with self._passage.change("batch_repeat_interleave"):
            batch = max((layer.batch for layer in self.compressed), default=0)
            super().batch_repeat_interleave(repeats)
            self.presence.select(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch items `indices`, in that order, in every layer."""
        with self._passage.change("batch_select_indices"):
            super().batch_select_indices(indices)
            self.presence.select(indices)

    def crop(self, *args: Any) -> None:
        """Raise ValueError and change no layer: evicted tokens cannot come back, so the cache cannot be cropped."""
        self.compressed[0].crop(*args)

    def reset(self) -> None:
        """Empty all layers. A cache that became unusable because a forward broke off can then be used again."""
        with self._passage.anew():
            if hasattr(self, "shared_layers"):
                self.shared_layers.clear()
            for layer, empty in zip(self.layers, self._empty, strict=True):
                if empty is None:
                    layer.reset()
                else:
                    stock.refresh(layer, empty)

    # ---- saving and bytes ----------------------------------------------------------------------------------

    def save(self, path: str | Path, *, coded: float | None = None, basis: CodingBasis | None = None) -> None:
        """Write the cache to the file `path`, which only its owner may read (format: `kvfloor.hf.saved`).

        coded   None: the loaded cache continues bit for bit. A number, such as 0.01: keys and values are coded with an
                error, in a fraction of the bytes, and the number is the divergence of later predictions to aim at, in
                nats per token. It is an aim, not a promise (docs/saved-caches.md). Needs `pip install "kvfloor[coded]"`
        basis   what `kvfloor.hf.coding_basis` calibrated for the model; `load` needs the same one. None: the axes of
                the cache's own tokens are saved with the codes, which takes many bytes unless the cache is long
        If writing fails, an existing file stays as it was. If `path` is a symbolic link, the file that it leads to is
        replaced. Collective on a sharded model: rank 0 writes one file with the kv heads of all ranks. Any number of
        ranks can load it later, also a single one. Raises ValueError while the cache is empty or in the middle of a
        forward, where `path` cannot be written, and with `coded` for a cache that cannot be coded, such as one whose kv
        heads hold different tokens. Raises TypeError where `path` is no path, and BrokenState if a forward broke off
        halfway.
        """
        save(self, path, coded, basis)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        *,
        method: Method | None = None,
        most_bytes: int = MOST_BYTES,
        basis: CodingBasis | None = None,
    ) -> Self:
        """Return the cache saved at `path`, to continue on `model`.

        model       a prepared model with the weights that filled the cache
        method      the method that the cache was made with; needed only if a class from outside kvfloor is part of it
        most_bytes  a larger file raises ValueError, and is not read in full; 32 GiB unless given. Loading takes three
                    times the file's size in memory, and as much as the cache itself
        basis       the basis that the cache was coded in, if it was saved with one
        Collective on a sharded model: every rank reads the file, and keeps only its own kv heads.
        Raises CorruptState (damaged file), WrongModel (another model filled the cache), NewerVersion or OlderVersion
        (of the file's format), UnknownMethod (the saved method cannot be built), or WrongBasis (the cache was coded in
        another basis); all are ValueErrors. Raises ValueError for a path that cannot be read, or is a folder, a pipe
        or a device.
        """
        return outside_inference(load, cls, path, model, method, most_bytes, basis)

    def resume(self, peak_bytes: int) -> None:
        """Raise `peak_nbytes` to `peak_bytes`, the peak of the saved cache that this one continues, if it is lower now.

        On a sharded model, each rank does so with its own share of the peak.
        """
        rank, count = self.ranks.rank, self.ranks.count
        share = peak_bytes * (rank + 1) // count - peak_bytes * rank // count  # all ranks' shares sum to the peak
        self._meter.peak_bytes = max(self._meter.peak_bytes, share)

    @property
    def nbytes(self) -> int:
        """Return the bytes that the compressed layers hold: their states, and the keys and values of a running forward.

        The bytes of a state are those of its tensors' storages. A running forward adds the keys and values that its
        attention has not appended to a state yet ("staged" tensors), and nothing else. Collective on a sharded model:
        the sum over all ranks.
        """
        mine = sum((layer.state.nbytes if layer.state else 0) + layer.staged_bytes for layer in self.compressed)
        return sum(self.ranks.gather("cache.nbytes", mine))

    @property
    def bytes(self) -> dict[str, int]:
        """Return the bytes held now, by kind.

        hot     the states of all compressed layers, measured on the storages of their tensors
        cold    what the states keep in the host's memory or on a disk (`tiered(cold=ram)`, `tiered(cold=disk)`)
        staged  keys and values of a running forward that its attention has not appended yet
        stock   tensors that transformers' own classes keep (sliding windows, convolution and linear states)
        masks   the list of pads and masked-out slots, 16 bytes each
        total   the sum of these
        Collective on a sharded model: the sums over all ranks. What every rank has a copy of (masks, convolution and
        linear states) counts once.
        """
        hot = sum(layer.state.nbytes for layer in self.compressed if layer.state)
        cold = sum(layer.state.cold_nbytes for layer in self.compressed if layer.state)
        staged = sum(layer.staged_bytes for layer in self.compressed)
        beside = [(layer, layer.beside if isinstance(layer, CompressedLayer) else None) for layer in self.layers]
        own = sum(stock.nbytes(layer, names) for layer, names in beside)
        heads = sum(
            stock.nbytes(layer, stock.BY_HEAD) for layer, names in beside if names is None and stock.has_heads(layer)
        )
        parts = self.ranks.gather("cache.bytes", (hot, cold, staged, heads))
        hot, cold, staged, all_heads = (sum(part) for part in zip(*parts, strict=True))
        told = {"hot": hot, "cold": cold, "staged": staged, "stock": own - heads + all_heads}
        told["masks"] = self.presence.nbytes
        return told | {"total": sum(told.values())}

    @property
    def peak_nbytes(self) -> int:
        """Return the most bytes that the compressed layers took at one time so far.

        The bytes are those of the states, of the copies made while they grow, and of the keys and values of a running
        forward. Collective on a sharded model: the sum of the ranks' own peaks, which all ranks reach at the same
        layer.
        """
        return sum(self.ranks.gather("cache.peak_nbytes", self._meter.peak_bytes))

    @property
    def bytes_read(self) -> int:
        """Return the bytes that attention for one more query token would read, over all compressed layers.

        Collective on a sharded model: the sum over all ranks.
        """
        mine = sum(layer.state.bytes_read for layer in self.compressed if layer.state)
        return sum(self.ranks.gather("cache.bytes_read", mine))

    def report(self) -> list[dict[str, Any]]:
        """Return one dict of measurements per compressed layer.

        Lists have one entry per row: the stream of one kv head of one batch item. The heads of an item are adjacent.

        layer, method, heads    index of the layer in the model, method with its budget in tokens, kv heads per item
        seen                    slots fed so far, pads included
        tokens, held, evicted   per row: real tokens seen, kept whole, no longer kept whole
        row_bytes               per row: measured bytes; their sum is state_bytes up to rounding
        state_bytes             bytes of the layer's state
        staged_bytes            bytes of keys and values that wait for the attention of a running forward
        guarantee               the method's proved error bound for the tokens seen, as a dict (error epsilon, failure
                                probability delta, norm, assumptions, ...); None if it has no such bound
        certified               None for a method that does not certify each answer; otherwise a dict of what its
                                certified reads have done since the cache was made or loaded:
            hot_bytes, cold_bytes   bytes in the device's memory (= state_bytes), and on the host or a disk
            queries, unfetched      queries answered, with those of a GQA group at a token as one; those of them that
                                    the codes alone certified
            tokens_fetched, bytes_fetched   exact tokens that the others needed, one for each query, and their bytes
            cold_bytes_read         bytes read from the host's memory or the disk: a token that several queries need
                                    at once is read once, one that is needed again later is read again
            largest_bound           the largest bound of an answer, over the largest value norm that its query saw
            max_error, violations   the promise, None without one; answers whose bound was larger
        Collective on a sharded model: every rank gets the whole report, of all kv heads.
        """
        mine = [(_entry(layer), row_budgets(layer.state)) for layer in self.compressed]
        parts = self.ranks.gather("cache.report()", mine)
        if len(parts) == 1:
            return [entry for entry, _ in mine]
        methods = [None if layer.state is None else layer.state.method for layer in self.compressed]
        return [whole_entry(*one) for one in zip(zip(*parts, strict=True), methods, strict=True)]


def _place(device: str | torch.device) -> torch.device:
    """Return `device` with its index: "cuda" becomes the current device, such as "cuda:0"."""
    return torch.empty(0, device=device).device


def _told(report: Callable[..., None], *args: Any) -> None:
    """Call `report(*args)`, excluded from torch.compile's trace: in the trace, it would make every layer compile anew.

    report: a function for bookkeeping, such as one that records which layers have stored a forward's tokens.
    """
    if torch.compiler.is_compiling():
        torch.compiler.disable(report)(*args)  # pyright: ignore[reportCallIssue]
    else:
        report(*args)


def _which(state_idx: int) -> dict[str, int]:
    """Return {"state_idx": state_idx}, or {} for index 0, as keyword arguments of a call to transformers.

    Older transformers releases have one linear state per layer and do not accept the argument.
    """
    return {"state_idx": state_idx} if state_idx else {}


def _entry(layer: CompressedLayer) -> dict[str, Any]:
    state = layer.state
    if state is None:
        empty: dict[str, Any] = {name: [] for name in ("tokens", "held", "evicted", "row_bytes")}
        told = {
            "method": str(layer.opening.method.of_layer(layer.place)),
            "heads": 0,
            **empty,
            "state_bytes": 0,
            "guarantee": None,
        }
    else:
        stated = state.guarantee()
        told = {
            "method": str(state.method),
            "heads": state.spec.rows // layer.batch,
            "tokens": state.seen.tolist(),
            "held": state.held.tolist(),
            "evicted": (state.seen - state.held).tolist(),
            "row_bytes": state.bytes_by_row(state.spec.rows).tolist(),
            "state_bytes": state.nbytes,
            "guarantee": None if stated is None else dataclasses.asdict(stated),
        }
    told["certified"] = certified_entry(state, layer.opening.promise)
    return {"layer": layer.index, "seen": layer.seen, **told, "staged_bytes": layer.staged_bytes}


def _promise(max_error: float | None, on_violation: OnViolation) -> Promise | None:
    if max_error is None:
        if on_violation != "fallback":
            raise ValueError(f"on_violation={on_violation!r} is about a promise: give max_error= too")
        return None
    return Promise(max_error, on_violation)


def _table(name: str, given: Sequence[Any], kind: type) -> tuple[tuple[Any, ...], ...]:
    """Convert a table, with one number or one list of numbers per layer, to one tuple of numbers per layer.

    name, given: the argument's name, for errors, and its value. kind: int or float, the type that the numbers must
    have; float allows ints too. Raises ValueError naming an entry that is not positive or of another type.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ValueError(f"{name} is a list with a number, or a list of numbers, per layer; got {given!r}")
    table = tuple(tuple(line) if isinstance(line, (list, tuple)) else (line,) for line in given)
    for x in (x for line in table for x in line):
        if isinstance(x, bool) or not isinstance(x, (int, float) if kind is float else int) or not 0 < x < float("inf"):
            raise ValueError(
                f"{name} are positive {'numbers' if kind is float else 'whole numbers of tokens'}, got {x!r}"
            )
    return table


def _chosen(method: Auto, model: PreTrainedModel | None, context: int | None) -> Layered:
    if model is None:
        raise ValueError(f"{method} is chosen for a model's weights: give the prepared model, not its configuration")
    if context is None:
        raise ValueError(f"{method} is for one request of a stated length: give context=, its number of tokens")
    return choose_layers(model, method, context)


def _rotations(positions: str, method: Method, model: PreTrainedModel | None) -> tuple[Rotation | None, ...] | None:
    """Return the rotary embedding of each compressed layer for positions="cache"; None for positions="stream".

    With "cache", a key's rotary position is its rank among the held tokens. A layer without a rotary embedding has None
    in the tuple. Raises ValueError for any other value of `positions`, for a method that does not hold keys whole, and
    for a model that is missing or not prepared.
    """
    if positions not in ("stream", "cache"):
        raise ValueError(f'positions count in the "stream" or in the "cache", got {positions!r}')
    if positions == "stream":
        return None
    if not method.traits.turns:
        raise ValueError(
            f'positions="cache" turns every key that is read to its place; {method} does not hold them whole: take an '
            f"eviction policy such as sinks or h2o, without a summary of keys, an index or coded numbers"
        )
    if not is_prepared(model):
        raise ValueError(
            'positions="cache" has to see how the model turns its keys: give the model, prepared, instead of its '
            "configuration"
        )
    assert model is not None
    return tuple(rotations(model))


def _applied(positions: str, method: Method, model: PreTrainedModel | None) -> tuple[Rotation | None, ...] | None:
    """Return the rotary embedding that each layer's stored keys have, if the method needs to know it; else None.

    Methods that predict later queries need it. The tuple has one entry per compressed layer, None for a layer without a
    rotary embedding. The result is None
    - for a method that needs no embedding
    - for positions="cache", where keys are stored without their rotation
    - if the embedding cannot be measured: `model` is not given or not prepared, or its positions are no fixed rotations
    Warns if `model` is not given although the method needs it: the method then uses the rotated queries and keys, and
    chooses worse.
    """
    if positions != "stream" or not any(one.wants_rotation for one in method.kinds):
        return None
    if model is None:
        warnings.warn(
            f"{method} chooses better if it knows the model's rotary embedding, which a configuration does not show: "
            f"give the prepared model, CompressedCache(model, ...), instead of model.config",
            stacklevel=3,
        )
        return None
    if not is_prepared(model):
        return None
    try:
        return tuple(rotations(model))
    except ValueError:
        return None


def _shares(allocate: Any, model: PreTrainedModel | None, calibration: Any, layers: int) -> Shares | None:
    if (allocate == "floor") != (calibration is not None):
        raise ValueError('allocate="floor" and a calibration prompt go together: give both or neither')
    if allocate is None or allocate == "uniform":
        return None
    if allocate == "pyramid":
        return pyramid(layers)
    if allocate == "floor":
        if model is None:
            raise ValueError(
                'allocate="floor" runs the calibration prompt: give the model instead of its configuration'
            )
        return floor_shares(model, calibration)
    if isinstance(allocate, str):
        raise ValueError(f"allocate is uniform, pyramid, floor, or multiples of the budget per layer, got {allocate!r}")
    return _table("allocate", allocate, float)
