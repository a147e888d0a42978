"""Methods of tensor attention in the suite: one side is the stream, ones stand on the other."""

import pytest
import torch

from kvfloor import Spec, parse
from kvfloor.check import CHECKS, Broken, Setting, run_checks
from kvfloor.check.tensor_adapter import Ones, beside_ones
from kvfloor.core.partial import Partial
from kvfloor.methods.variants.subgen_tensor import SubGenTensorState
from kvfloor.methods.variants.tensor import TensorState

QUICK = (
    *("text", "shapes", "message_round_trip", "empty", "pads"),
    *("clone", "select_rows", "row_alone", "corrupt_message", "wrong_input"),
)


@pytest.mark.parametrize("side", [1, 2])
def test_ones_make_it_standard_attention(side: int) -> None:
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, 4, generator=noise, dtype=torch.float64) for _ in range(3))
    spec = Spec(2, 4, 4, dtype=torch.float64)
    one, other = Ones("tensor", side).open(spec), parse("exact").open(spec)
    assert torch.allclose(one.step(q.unsqueeze(1), k, v), other.step(q.unsqueeze(1), k, v), atol=1e-12)
    told, truth = one.read(q), other.read(q)
    assert torch.allclose(told.mean, truth.mean, atol=1e-12) and torch.allclose(told.log_mass, truth.log_mass)


def test_methods_of_standard_attention_stand_for_themselves() -> None:
    assert beside_ones(parse("window@64")) == [parse("window@64")]
    assert [str(parse(str(m))) for m in beside_ones(parse("tensor(store=window)@64"))] == [
        f"kvfloor.check.tensor_adapter:Ones(inner='tensor(store=window)@64',side={side})" for side in (1, 2)
    ]


@pytest.mark.parametrize("text", ["tensor(store=sinks(4))@40", "subgen_tensor(t=2,s=16)"])
def test_laws_that_are_quick(text: str) -> None:
    for method in beside_ones(parse(text)):
        for name in QUICK:
            CHECKS[name].run(method, Setting())


def test_a_mutant_that_pairs_each_token_with_itself_is_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def diagonal(self: TensorState, q: torch.Tensor) -> Partial:
        view = self.store.slots.view()  # type: ignore[attr-defined]
        (k1, k2), (v1, v2) = view.k.chunk(2, -1), view.v.chunk(2, -1)
        return Partial.over(q, k1[:, :1] * k2, v1[:, :1] * v2, self.spec)  # of the first token only

    monkeypatch.setattr(TensorState, "_read", diagonal)
    CHECKS["reference"].run(Ones("tensor", 2), Setting())  # the first token's ones hide it: hence both sides
    with pytest.raises(Broken, match="against exact attention"):
        CHECKS["reference"].run(Ones("tensor", 1), Setting())


def test_a_mutant_whose_message_holds_one_side_twice_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SubGenTensorState.export
    monkeypatch.setattr(SubGenTensorState, "export", lambda self: whole(self) | {"second": self.first.export()})
    for side in (1, 2):
        with pytest.raises(Broken):
            CHECKS["message_round_trip"].run(Ones("subgen_tensor(t=2,s=16)", side), Setting())


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "tensor",
        "tensor(store=window)@64",
        "tensor(store=sinks(count=2,block=16))@24:40:32",
        "tensor(store=random(block=1))@20",
        "tensor(store=h2o(recent=3))@48",
        "subgen_tensor(delta1=0.4,delta2=0.4,t=2,s=16)",
        "subgen_tensor(t=2)@40",
    ],
)
def test_every_law_holds(text: str) -> None:
    outcome = run_checks(parse(text), dtypes=(torch.float32,), groups=(4,))
    assert outcome.failed == []
    skipped = {skip["check"] for skip in outcome.skipped}
    assert not {"chunking", "causality", "pads", "row_isolation", "index_floor"} & skipped
    assert ("reference" in skipped) == text.startswith("subgen_sketch")
