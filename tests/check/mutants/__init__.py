"""List methods with one wrong line each, and for each the check that must reject it (`MUTANTS`)."""

from dataclasses import dataclass, field

from kvfloor import Method, parse
from mutants import answers, coded, contract, rows, stored, tokens, traits


@dataclass(frozen=True)
class Mutant:
    """Hold a wrong method, the check that must reject it, and the other checks that rightly reject it too."""

    check: str
    method: Method
    also: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.check}-{self.method}"


def _mutant(check: str, method: Method | str, *also: str) -> Mutant:
    return Mutant(check, parse(method) if isinstance(method, str) else method, frozenset(also))


MUTANTS: tuple[Mutant, ...] = (
    _mutant("text", contract.Nameless()),
    _mutant("text", contract.Thawed()),
    _mutant("documented", contract.Undocumented()),
    _mutant("documented", contract.Unsourced()),
    _mutant("guarantee", contract.Boastful()),
    _mutant("empty", contract.WarmStart()),
    _mutant("shapes", contract.WideAnswers(), "broken"),
    _mutant("read_pure", contract.CountingReads(), "input_forms", "message_round_trip", "seeded", "wrong_input"),
    _mutant("wrong_input", contract.Obliging()),
    _mutant("wrong_input", contract.HastyClock(), "empty", "index_floor", "non_finite"),
    _mutant("non_finite", contract.NanBlind()),
    _mutant("inputs_untouched", contract.Adopting()),
    _mutant("inputs_untouched", contract.InPlace(), "input_forms", "selector_subset"),
    _mutant("input_forms", contract.StrideBlind(), "wrong_input"),
    _mutant("broken", contract.MarkInFinally()),
    _mutant("broken", contract.LateClock()),
    _mutant("chunking", tokens.EvictsPerCall()),
    _mutant("chunking", "window(block=4)+mutants.rounding:RoundsByPlace@16", "row_order", "row_alone", "select_rows"),
    _mutant(
        "chunking",
        "window(block=4)+mutants.rounding:RoundsByBoundary@16",
        "input_forms",
        "pads",
        "row_alone",
        "row_order",
        "select_rows",
    ),
    _mutant(
        "row_alone", "mutants.rounding:RoundsByRows(sinks=2,recent=4,block=4)@16", "chunking", "pads", "select_rows"
    ),
    _mutant("causality", answers.FutureLeak(), "chunking", "hull", "pads", "reference"),
    _mutant("queries_independent", answers.CrowdTemperature()),
    _mutant("pads", tokens.PadsEnter(), "absorbed_once", "chunking", "empty", "held_tokens"),
    _mutant("pads", contract.PadsAnswered()),
    _mutant("capacity", tokens.OneTooMany()),
    _mutant("capacity", tokens.OneTooFew(), "constant_memory", "pads"),
    _mutant("held_tokens", tokens.ValuesStay(), "absorbed_once", "turns"),
    _mutant("held_tokens", coded.CodedAgain()),
    _mutant("chunking", coded.CodedPerCall(), "held_tokens", "pads"),
    _mutant("row_isolation", coded.SharedLength(), "chunking", "held_tokens", "pads", "row_alone", "select_rows"),
    _mutant("message_round_trip", coded.CodedInMessage()),
    _mutant("held_tokens", coded.LeftBehind()),
    _mutant("pinned", tokens.PinsForgotten()),
    _mutant("absorbed_once", tokens.AbsorbedTwice()),
    _mutant("absorbed_once", "window(block=4)+mutants.answers:CountsTwice@16", "attends_to_held", "hull", "turns"),
    _mutant(
        "selector_subset",
        "window(block=4)|mutants.answers:ReadsGhosts(k=6)@16",
        "chunking",
        "input_forms",
        "message_round_trip",
        "pads",
    ),
    _mutant("selector_subset", "window(block=4)|mutants.answers:ReadsNothing(k=6)@16", "input_forms"),
    _mutant(
        "selector_subset",
        "window(block=4)|mutants.answers:ReadsAhead(pages=1,page=2)@16",
        "causality",
        "chunking",
        "hull",
        "message_round_trip",
        "pads",
    ),
    _mutant("row_order", "mutants.rows:KeyedByPlace(block=4)@16", "chunking", "pads", "row_alone", "select_rows"),
    _mutant("row_isolation", rows.SharedStabiliser()),
    _mutant("row_alone", "mutants.rows:RelativeIds(block=4)@16", "pads"),
    _mutant("select_rows", rows.IdsStay(), "pads", "row_alone", "row_order"),
    _mutant("reference", answers.NoSoftcap()),
    _mutant("attends_to_held", answers.MassOff(), "turns"),
    _mutant("turns", answers.TurnsByAge()),
    _mutant("hull", traits.ClaimsHull()),
    _mutant("value_linear", traits.ClaimsLinearity()),
    _mutant("constant_memory", traits.ClaimsConstantMemory(), "chunking", "pads", "select_rows"),
    _mutant("seeded", rows.GlobalDraw()),
    _mutant("shared", stored.SharedNotebook()),
    _mutant("clone", stored.HalfClone()),
    _mutant("nbytes", stored.BytesByFormula()),
    _mutant("message_round_trip", stored.PhaseDropped(), "index_floor", "pinned", "seeded"),
    _mutant("corrupt_message", stored.DigestRepaired()),
    _mutant("index_floor", stored.HiddenInModule()),
)
