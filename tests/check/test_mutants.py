"""Every check rejects a method with one wrong line, and no check rejects more than that line breaks."""

import pytest
import torch
from mutants import MUTANTS, Mutant, stored
from mutants.base import Small, SmallObserving
from mutants.coded import DenseCoded, SmallCoded

from kvfloor import Method
from kvfloor.check import CHECKS, Broken, Setting, run_checks


@pytest.fixture(autouse=True)
def nothing_hidden() -> None:
    """Clear what an earlier test's mutant hid in its module."""
    stored.HIDDEN.clear()


def test_every_check_has_a_mutant() -> None:
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_mutant_breaks_its_law(mutant: Mutant) -> None:
    check = CHECKS[mutant.check]
    assert check.not_claimed(mutant.method) is None
    with pytest.raises(Broken, match=r"\w+ \w+"):
        check.run(mutant.method, Setting(g=2))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_mutant_breaks_no_other_law(mutant: Mutant) -> None:
    outcome = run_checks(mutant.method, dtypes=(torch.float32,), groups=(2,))
    why = {failure["check"]: failure["why"] for failure in outcome.failed}
    assert set(why) == {mutant.check, *mutant.also}, why


@pytest.mark.parametrize(
    "method",
    [Small(), SmallObserving(), SmallCoded(), pytest.param(DenseCoded(), marks=pytest.mark.slow)],
    ids=lambda method: type(method).__name__,
)
def test_what_mutants_derive_from_keeps_every_law(method: Method) -> None:
    assert run_checks(method, dtypes=(torch.float32,), groups=(2,)).failed == []
