"""Ten faults of a cache, planted one at a time: the audit's divergence of `exact` shows each of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvfloor import parse
from kvfloor.audit.reading import Reader
from kvfloor.audit.texts import GENERATED, SHIPPED, Excerpt, excerpts
from kvfloor.core.exact import ExactState
from kvfloor.hf import CompressedCache, prepare
from kvfloor.models import load

CONTEXT, SCORED = 160, 64
SHOWN = 1e-6
"""A divergence of `exact` above this is a fault: rounding stays below it."""

Plant = Callable[[pytest.MonkeyPatch], None]


def in_steps(change: Callable[..., tuple[Any, Any, Any]], every_layer: bool = False) -> Plant:
    """Change the queries, keys and values of every step of the first layer's state, or of all layers'."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        step, first = ExactState.step, []

        def faulty(self: ExactState, q: Any, k: Any, v: Any, *more: Any, **named: Any) -> Any:
            first.append(self)
            return step(
                self, *(change(self, q, k, v) if every_layer or self is first[0] else (q, k, v)), *more, **named
            )

        patch.setattr(ExactState, "step", faulty)

    return plant


def lost(*positions: int) -> Plant:
    """Lose the tokens at these positions of the context in every layer, at the seal."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        seal = CompressedCache.seal

        def faulty(self: CompressedCache) -> None:
            seal(self)
            for layer in self.compressed:
                assert layer.state is not None
                for row in range(layer.state.spec.rows):
                    gone = torch.tensor([p % CONTEXT for p in positions])
                    layer.state.forget(torch.full_like(gone, row), gone)

        patch.setattr(CompressedCache, "seal", faulty)

    return plant


def at_positions(change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """Give the model other positions after the context."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        from kvfloor.hf.decode import Dialogue

        forward = Dialogue._forward

        def faulty(self: Dialogue, token_ids: Any, real: Any, every: bool = False) -> Any:
            model = self.model

            def moved(**inputs: Any) -> Any:
                return model(**inputs | {"position_ids": change(inputs["position_ids"])})

            if isinstance(self.cache, CompressedCache) and self.mask.shape[1] >= CONTEXT:
                moved.device = model.device  # type: ignore[attr-defined]
                self.model = moved  # type: ignore[assignment]
            try:
                return forward(self, token_ids, real, every)
            finally:
                self.model = model

        patch.setattr(Dialogue, "_forward", faulty)

    return plant


def in_context(change: Callable[[list[int]], list[int]]) -> Callable[[Excerpt], Excerpt]:
    return lambda excerpt: replace(excerpt, context=change(excerpt.context))


def rounded(x: Any) -> Any:
    return x.to(torch.bfloat16).to(x.dtype)


FAULTS: dict[str, Plant | Callable[[Excerpt], Excerpt]] = {
    "wrong position": at_positions(lambda position: position + 1),
    "frozen clock": at_positions(lambda position: position.clamp_max(CONTEXT)),
    "dropped sink": lost(0),
    "off-by-one seal": lost(-1),
    "lost last block": lost(*range(-32, 0)),
    "leaked pad": in_context(lambda ids: [0, 0, *ids]),
    "stale cache": in_context(lambda ids: [*ids[40:60], *ids]),
    "swapped heads": in_steps(lambda state, q, k, v: (q, k, v.flip(0))),
    "unscaled query": in_steps(lambda state, q, k, v: (q / state.spec.scale, k, v)),
    "bfloat16 scores": in_steps(lambda state, q, k, v: (rounded(q), rounded(k), v), every_layer=True),
}


def diverged(model: Any, excerpt: Excerpt, fault: str | None) -> float:
    """Return the mean divergence of the exact cache, nats per token, with a fault planted in it."""
    reader, read = Reader(model, 0), excerpt
    reference = reader.reference(excerpt)
    with pytest.MonkeyPatch.context() as patch:
        if fault in ("leaked pad", "stale cache"):
            read = FAULTS[fault](excerpt)  # type: ignore[arg-type, assignment]
        elif fault is not None:
            FAULTS[fault](patch)  # type: ignore[arg-type]
        return statistics.fmean(reader.read(parse("exact"), read, reference).figures.kl)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def builtin() -> tuple[Any, Excerpt]:
    model, tokenizer = load()
    return prepare(model), excerpts(GENERATED[:1], [CONTEXT], SCORED, lambda text: tokenizer(text).input_ids)[0]


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_each_fault_is_shown(builtin: tuple[Any, Excerpt], fault: str | None) -> None:
    assert (diverged(*builtin, fault) > SHOWN) == (fault is not None)


@pytest.mark.slow
def test_each_fault_is_shown_on_a_trained_model() -> None:
    model, tokenizer = load("smollm2")
    model = prepare(model)
    (excerpt,) = excerpts(SHIPPED[:1], [CONTEXT], SCORED, lambda text: tokenizer(text, verbose=False).input_ids)
    found = {fault: diverged(model, excerpt, fault) for fault in (None, *FAULTS)}
    assert found.pop(None) < SHOWN
    assert [fault for fault, far in found.items() if far <= SHOWN] == []
