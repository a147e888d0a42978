"""List methods with one wrong line each, and for each the check that must reject it (`MUTANTS`)."""

from dataclasses import dataclass, field

from kvfloor import Method
from mutants import answers, contract, rounding, rows, stored, tokens, traits


@dataclass(frozen=True)
class Mutant:
    """Hold a wrong method, the check that must reject it, and the other checks that rightly reject it too."""

    check: str
    method: Method
    also: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.check}-{type(self.method).__name__}"


def _mutant(check: str, method: Method, *also: str) -> Mutant:
    return Mutant(check, method, frozenset(also))


MUTANTS: tuple[Mutant, ...] = (
    _mutant("text", contract.Nameless()),
    _mutant("text", contract.Thawed()),
    _mutant("documented", contract.Undocumented()),
    _mutant("documented", contract.Unsourced()),
    _mutant("guarantee", contract.Boastful()),
    _mutant("empty", contract.WarmStart()),
    _mutant("shapes", contract.WideAnswers()),
    _mutant("read_pure", contract.CountingReads(), "input_forms"),
    _mutant("wrong_input", contract.Obliging()),
    _mutant("wrong_input", contract.HastyClock(), "empty", "non_finite"),
    _mutant("non_finite", contract.NanBlind()),
    _mutant("inputs_untouched", contract.Adopting()),
    _mutant("inputs_untouched", contract.InPlace(), "input_forms", "selector_subset"),
    _mutant("input_forms", contract.StrideBlind()),
    _mutant("broken", contract.MarkInFinally()),
    _mutant("broken", contract.LateClock()),
    _mutant("chunking", tokens.EvictsPerCall()),
    _mutant("chunking", rounding.RoundsByPlace(), "row_order", "row_alone", "select_rows"),
    _mutant("chunking", rounding.RoundsByBoundary(), "input_forms", "pads", "row_alone", "row_order", "select_rows"),
    _mutant("row_alone", rounding.RoundsByRows(), "chunking", "pads", "select_rows"),
    _mutant("causality", answers.FutureLeak(), "chunking", "hull", "pads", "reference"),
    _mutant("queries_independent", answers.CrowdTemperature()),
    _mutant("pads", tokens.PadsEnter(), "absorbed_once", "chunking", "empty", "held_tokens"),
    _mutant("pads", contract.PadsAnswered()),
    _mutant("capacity", tokens.OneTooMany()),
    _mutant("capacity", tokens.OneTooFew(), "constant_memory", "pads"),
    _mutant("held_tokens", tokens.ValuesStay(), "absorbed_once"),
    _mutant("pinned", tokens.PinsForgotten()),
    _mutant("absorbed_once", tokens.AbsorbedTwice()),
    _mutant("absorbed_once", answers.CountsTwice(), "attends_to_held", "hull"),
    _mutant("selector_subset", answers.ReadsGhosts(), "chunking", "message_round_trip", "pads"),
    _mutant("selector_subset", answers.ReadsNothing()),
    _mutant("selector_subset", answers.ReadsAhead(), "causality", "chunking", "hull", "message_round_trip", "pads"),
    _mutant("row_order", rows.KeyedByPlace(), "chunking", "pads", "row_alone", "select_rows"),
    _mutant("row_isolation", rows.SharedStabiliser()),
    _mutant("row_alone", rows.RelativeIds(), "pads"),
    _mutant("select_rows", rows.IdsStay(), "pads", "row_alone", "row_order"),
    _mutant("reference", answers.NoSoftcap()),
    _mutant("attends_to_held", answers.MassOff()),
    _mutant("turns", answers.TurnsByAge()),
    _mutant("hull", traits.ClaimsHull()),
    _mutant("value_linear", traits.ClaimsLinearity()),
    _mutant("constant_memory", traits.ClaimsConstantMemory(), "chunking"),
    _mutant("seeded", rows.GlobalDraw()),
    _mutant("shared", stored.SharedNotebook()),
    _mutant("clone", stored.HalfClone()),
    _mutant("nbytes", stored.BytesByFormula()),
    _mutant("message_round_trip", stored.PhaseDropped()),
    _mutant("corrupt_message", stored.DigestRepaired()),
    _mutant("index_floor", stored.HiddenInModule()),
)
