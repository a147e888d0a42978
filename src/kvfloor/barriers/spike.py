"""The spike: one hidden row per public key, each read back by a query that gives its key nearly all the softmax mass.

It is the hard instance of Haris & Onak (COLT 2025), Theorems 6 and 8, with exact constants (docs/floors.md).
"""

import dataclasses
import time
from typing import Any, Literal

from kvfloor.barriers.certificates import ALPHA
from kvfloor.barriers.decode import Decoded, judge
from kvfloor.barriers.game import Answers, play_index
from kvfloor.barriers.instance import Hidden, Instance
from kvfloor.floors.domain import whole
from kvfloor.floors.standard import space
from kvfloor.method import Method

SUCCESS = 0.9  # p of the theorems
_ALL_ROWS_UP_TO = 16_384
_ROWS_SAMPLED = 2_048

Verdict = Literal["holds", "breaks", "cheats"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One game. Sizes in bytes, information in bits.

    certified_bits       what the message provably carries; live_certified_bits the same for Alice's own state
    bit_error            share of hidden bits decoded wrong, and row_success share of rows answered within 1±eta,
                         both from the restored state (from the live one where nothing could be restored)
    floor_bits           what any method that answers within 1±eta must hold (`kvfloor.floors.space`)
    verdict              cheats: more is certified than the bytes can hold, or the two sides answer differently;
                         breaks: row_success < 0.9; else holds
    certificate, family  the certificate that won and the key family; worst_gap over the queried rows
    hidden_seed          repeats the run's hidden values
    """

    method: str
    barrier: str
    n: int
    d: int
    dv: int
    bits: int
    eta: float
    seed: int
    alpha: float
    hidden_bits: int
    bit_error: float
    certified_bits: float
    live_certified_bits: float
    message_bytes: int
    state_bytes: int
    floor_bits: float
    verdict: Verdict
    why: str
    row_success: float
    rows_asked: int
    certificate: str
    family: str
    worst_gap: float
    hidden_seed: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return dataclasses.asdict(self)


def play(
    method: Method | str,
    *,
    n: int = 1024,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    rows: int | None = None,
    hidden_seed: int | str | None = None,
    family: str | None = None,
) -> Result:
    """Play the spike against a method and certify what it really carries.

    n, d, dv     keys, their width, the values' width (dv = d by default); `bits` per value, 1 to 16
    rows         how many rows to ask, drawn with replacement; by default all up to n = 16,384, else 2,048
    seed         gives the public keys and, by a one-way derivation, the seed that the method sees
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system. They never derive
                 from anything that the method sees, also where hidden_seed equals seed
    family       of keys, by default the one that separates best at (n, d)
    Raises ValueError naming the argument that is out of its domain, or what keeps the method from being rebuilt.
    """
    started = time.perf_counter()
    instance = Instance.agree(n, d, dv, bits, eta, whole("seed", seed, least=0), family)
    if rows is None:
        rows = n if n <= _ALL_ROWS_UP_TO else _ROWS_SAMPLED
    sampled = rows if whole("rows", rows) < n else None
    hidden = Hidden(hidden_seed)
    answers = play_index(method, instance, hidden, sampled)

    drawn_from = None if sampled is None else n
    live = judge(answers.live, answers.hidden, bits, eta, sampled_from=drawn_from)
    sent = live
    if answers.restored is not None and not answers.agree:
        sent = judge(answers.restored, answers.hidden, bits, eta, sampled_from=drawn_from)
    certified = 0.0 if answers.restored is None else sent.certified_bits
    verdict, why = _verdict(answers, live, sent, certified)
    return Result(
        method=str(method), barrier="spike", n=n, d=d, dv=instance.dv, bits=bits, eta=eta, seed=seed, alpha=ALPHA,
        hidden_bits=instance.hidden_bits, bit_error=sent.bit_error, certified_bits=certified,
        live_certified_bits=live.certified_bits, message_bytes=answers.message_bytes, state_bytes=answers.state_bytes,
        floor_bits=space(n, d, instance.dv, eta=eta, p=SUCCESS).bits, verdict=verdict, why=why,
        row_success=sent.row_success, rows_asked=len(answers.rows), certificate=sent.certificate,
        family=instance.family, worst_gap=answers.worst_gap, hidden_seed=hidden.seed,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _verdict(answers: Answers, live: Decoded, sent: Decoded, certified: float) -> tuple[Verdict, str]:
    """The verdict and its reason in words."""
    message_bits, state_bits = 8 * answers.message_bytes, 8 * answers.state_bytes
    if answers.restored is None:
        return "cheats", answers.why
    if live.certified_bits > state_bits:
        return "cheats", f"the live state carries {live.certified_bits:.0f} bits, its bytes hold {state_bits}"
    if max(live.certified_bits, certified) > message_bits:
        most = max(live.certified_bits, certified)
        return "cheats", f"{most:.0f} bits were answered, the message holds {message_bits}"
    if not answers.agree:
        return "cheats", "the live state and the one restored from the message answer differently"
    if sent.row_success < SUCCESS:
        return "breaks", f"{sent.row_success:.3f} of the rows are answered, {SUCCESS} are asked for"
    return "holds", f"{sent.row_success:.3f} of the rows are answered"
