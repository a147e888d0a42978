"""Run the conformance suite on a method, the configuration of a KV-cache compressor: one check per law.

A law is a property that every method must have (padding changes no answer), or one that a method may claim
(its memory never grows). A check is a function that tests one law on a method, and raises Broken if the law fails. A
setting is the dtype, the size of the GQA group and the seed with which a law is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvfloor.check import breaking, contract, index_floor, inputs, rows, storage, streaming, turning
from kvfloor.check import randomness as chance
from kvfloor.check import reference as truth
from kvfloor.check import tokens as holding
from kvfloor.check.law import Broken, Check, Setting
from kvfloor.check.streams import spec_for
from kvfloor.check.tensor_adapter import beside_ones
from kvfloor.core.method import Method
from kvfloor.core.state import State


def _always(method: Method) -> str | None:
    del method
    return None


def _opened(method: Method) -> State:
    return method.open(spec_for(method, Setting()))


def _keeps_tokens(method: Method) -> str | None:
    return None if _opened(method).slots is not None else "it keeps no store of whole tokens"


def _pins(method: Method) -> str | None:
    return None if method.traits.pins else "it does not claim pins"


def _absorbs(method: Method) -> str | None:
    absorbs = method.parts.summary is not None or method.traits.reference == "unmasked"
    return None if absorbs else "it has no summary and does not claim the unmasked law"


def _selects(method: Method) -> str | None:
    return None if method.parts.selector is not None else "it has no selector"


def _single_queries(method: Method) -> str | None:
    return "it claims block_causal: a query may be answered with its block" if method.traits.block_causal else None


def _exact_at_first(method: Method) -> str | None:
    if not method.traits.lossy_values or truth.waits_whole(method):
        return None
    return "it claims lossy_values, from the first token on"


def _attends_to_held(method: Method) -> str | None:
    store = method.parts.store
    if method.traits.lossy_values and (store is None or store.plain or method.traits.reference == "unmasked"):
        return "it claims lossy_values: more than whole tokens answers"
    summary, spec = method.parts.summary, spec_for(method, Setting())
    if method.traits.reference == "unmasked" or (summary is not None and summary.open(spec) is not None):
        stated = (method if summary is None else summary).guarantee(spec)
        if method.traits.reference != "unmasked" or stated is None or stated.epsilon > 0:
            return "it approximates the tokens that left: it does not state that they answer without error"
    return _keeps_tokens(method)


def _turns(method: Method) -> str | None:
    return _claims("turns")(method) or _attends_to_held(method)


def _claims(trait: str) -> Callable[[Method], str | None]:
    return lambda method: None if getattr(method.traits, trait) else f"it does not claim {trait}"


CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check(contract.check_text, _always, over=()),
        Check(contract.check_documented, _always, over=()),
        Check(contract.check_guarantee, _always, over=()),
        Check(contract.check_empty, _always, over=()),
        Check(contract.check_shapes, _always, over=("dtype", "g")),
        Check(contract.check_read_pure, _always, over=("dtype",)),
        Check(inputs.check_wrong_input, _always, over=()),
        Check(inputs.check_non_finite, _always, over=()),
        Check(inputs.check_inputs_untouched, _always, over=()),
        Check(inputs.check_input_forms, _always, over=("dtype",)),
        Check(breaking.check_broken, _always, over=()),
        Check(streaming.check_chunking, _always, over=("dtype", "g")),
        Check(streaming.check_causality, _always, over=("dtype", "g")),
        Check(streaming.check_queries_independent, _single_queries, over=("dtype", "g")),
        Check(streaming.check_pads, _always, over=("dtype", "g")),
        Check(holding.check_capacity, _always, over=()),
        Check(holding.check_held_tokens, _keeps_tokens, over=("dtype",)),
        Check(holding.check_pinned, _pins, over=()),
        Check(holding.check_absorbed_once, _absorbs, over=("dtype",)),
        Check(holding.check_selector_subset, _selects, over=()),
        Check(rows.check_row_order, _always, over=("dtype", "g")),
        Check(rows.check_row_isolation, _always, over=("dtype", "g")),
        Check(rows.check_row_alone, _always, over=("dtype", "g")),
        Check(rows.check_select_rows, _always, over=()),
        Check(truth.check_reference, _exact_at_first, over=("dtype", "g")),
        Check(truth.check_attends_to_held, _attends_to_held, over=("dtype", "g")),
        Check(turning.check_turns, _turns, over=("dtype",)),
        Check(truth.check_hull, _claims("normalised"), over=("dtype", "g")),
        Check(truth.check_value_linear, _claims("value_linear"), over=("dtype", "g")),
        Check(truth.check_constant_memory, _claims("constant_memory"), over=("dtype",)),
        Check(chance.check_seeded, _always, over=()),
        Check(chance.check_shared, _always, over=()),
        Check(chance.check_clone, _always, over=()),
        Check(storage.check_nbytes, _always, over=("dtype",)),
        Check(storage.check_message_round_trip, _always, over=("dtype",)),
        Check(storage.check_corrupt_message, _always, over=()),
        Check(index_floor.check_index_floor, _always, over=()),
    )
}


_OF_THE_METHOD = {"text", "documented"}  # checks of the method itself, without a stream


@dataclass
class Outcome:
    """Record the checks that a method passed or failed, and those skipped because it does not claim their law.

    method           the method as text
    passed           names of checks
    failed, skipped  one dict per check: its name ("check") and the reason ("why")
    """

    method: str
    passed: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {"method": self.method, "passed": self.passed, "failed": self.failed, "skipped": self.skipped}


def run_checks(
    method: Method,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    groups: Sequence[int] = (1, 4),
    seed: int = 0,
) -> Outcome:
    """Test a method on every law that applies to it, and return which laws passed, failed or were skipped.

    dtypes  dtypes of the cache; a law whose outcome cannot depend on the dtype is tested for the first one only
    groups  sizes of the GQA group; a law whose outcome cannot depend on the group is tested for the last one only
    seed    seeds the random token streams that the method is given, and the method's own random draws
    A law fails at the first exception: Broken, or any other. The exception's message is recorded as the reason. A law
    that the method does not claim is skipped.
    Tensor attention (softmax over pairs of tokens, with two keys and two values per token) is tested as standard
    attention: one key and one value of each token are given by the stream, the others are filled with 1 (class `Ones`).
    Raises ValueError if no cache can be made from the configuration at all (for want of a budget, say).
    """
    method.open(spec_for(method, Setting()))  # an impossible configuration is the caller's error, not a broken law
    outcome, sides = Outcome(str(method)), beside_ones(method)
    for name, check in CHECKS.items():
        tried = [
            Setting(dtype, g, seed)
            for dtype in (dtypes if "dtype" in check.over else dtypes[:1])
            for g in (groups if "g" in check.over else groups[-1:])
        ]
        subjects = [method] if name in _OF_THE_METHOD else sides
        turns = max(len(tried), len(subjects))
        trials = [(subjects[i % len(subjects)], tried[i % len(tried)]) for i in range(turns)]
        unclaimed, why = _try(check, trials)
        if unclaimed is not None:
            outcome.skipped.append({"check": name, "why": unclaimed})
        elif why is not None:
            outcome.failed.append({"check": name, "why": why})
        else:
            outcome.passed.append(name)
    return outcome


def _try(check: Check, trials: Sequence[tuple[Method, Setting]]) -> tuple[str | None, str | None]:
    """Run a check on each (method, setting) of `trials`; return (reason to skip the law, reason why it failed).

    At most one of the two is not None; both are None if the law holds.
    """
    where = ""
    try:
        unclaimed = check.not_claimed(trials[0][0])
        if unclaimed is not None:
            return unclaimed, None
        for method, at in trials:
            where = f" [{at}]"
            check.run(method, at)
    except Broken as broken:
        return None, f"{broken}{where}"
    except Exception as crash:
        return None, f"it crashed with {type(crash).__name__}: {crash}{where}"
    return None, None


def check_method(
    method: Method,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    groups: Sequence[int] = (1, 4),
    seed: int = 0,
) -> None:
    """Raise Broken listing every law that the method breaks; return None if it keeps them all.

    `dtypes` of the cache and sizes of the GQA group (`groups`) are tested where the law may depend on them. `seed` is
    that of the random token streams and of the method's own draws.
    """
    outcome = run_checks(method, dtypes=dtypes, groups=groups, seed=seed)
    if outcome.failed:
        lines = [f"- {failure['check']}: {failure['why']}" for failure in outcome.failed]
        raise Broken(f"{outcome.method} breaks {len(lines)} of its laws\n" + "\n".join(lines))
