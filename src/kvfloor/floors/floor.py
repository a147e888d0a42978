"""Hold a memory floor: a lower bound on the bits that any method needs, beside memory sizes that are known to suffice.

A method is a way to keep a KV cache, exact or compressed; its state is the memory that it keeps of a stream of tokens.
In the proof of a floor, hidden bits are stored as the values of a stream, and queries of the state read them back. Keys
are "public" if they are fixed in advance, so that the state need not hold them.
"""

import dataclasses
import math
from typing import Any

_LEAST_GAP = 2.0**-10
_TOO_FINE = "keys this close, and queries this long, are numbers of no 16-bit format: a floor for real arithmetic alone"


@dataclasses.dataclass(frozen=True)
class Possible:
    """Hold a memory size that is known to suffice for attention, to compare with a floor.

    name       the method that needs it
    bits       its memory
    condition  what must hold, such as a bound on the logits
    source     the paper or page that has the proof
    vacuous    True if the method keeps at least as many bits as all tokens take, so that it saves nothing
    """

    name: str
    bits: float
    condition: str
    source: str
    vacuous: bool = False


@dataclasses.dataclass(frozen=True)
class Floor:
    """Hold a space floor: the bits that any method needs to answer attention accurately with probability p.

    p is the probability that a whole row, the dv values of one answer, is within the error that the floor was computed
    for.
    bits        the floor
    bytes       the floor in whole bytes, rounded up
    upper_bits  memory that suffices if the keys are fixed in advance and the values are those of the proof. If queries
                can read the values of all tokens, bits / upper_bits is about p, so no floor for these values can be
                much larger
    regime      the case of the theorem that these sizes fall under, such as "near-orthogonal"
    theorem     the theorem that gives `bits`
    constants   every number that was used to compute `bits`, name -> number
    possible    memory sizes that suffice, smallest first
    """

    bits: float
    bytes: int
    upper_bits: float
    regime: str
    theorem: str
    constants: dict[str, Any]
    possible: tuple[Possible, ...] = ()

    @staticmethod
    def of(
        bits: float,
        upper_bits: float,
        regime: str,
        theorem: str,
        constants: dict[str, Any],
        possible: list[Possible],
    ) -> "Floor":
        """Return a floor of `bits`, with `bytes` computed from the bits and `possible` sorted by size.

        The arguments are fields of the floor. If `bits` is 0, the field regime becomes the text "vacuous (...)" with
        the given `regime` in the brackets. If the keys' gap (`constants`) is below 2^-10, a constant `note` says that
        no 16-bit number format can represent such keys.
        """
        if constants.get("gap", 1.0) < _LEAST_GAP:
            constants = constants | {"note": _TOO_FINE}
        return Floor(
            bits=bits,
            bytes=whole_bytes(bits),
            upper_bits=upper_bits,
            regime=regime if bits > 0.0 else f"vacuous ({regime})",
            theorem=theorem,
            constants=constants,
            possible=tuple(sorted(possible, key=lambda memory: memory.bits)),
        )

    def ratio(self, memory: Possible) -> float:
        """Return the bits of `memory` divided by the bits of the floor; infinite for a floor of 0."""
        return memory.bits / self.bits if self.bits > 0.0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain JSON types, name -> value; a number that is not finite becomes None.

        Each entry of `possible` becomes a dict too, with two more names: its "bytes", and its "ratio" to the floor.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["constants"] = {name: _finite(value) for name, value in self.constants.items()}
        fields["possible"] = [
            {
                "name": memory.name,
                "bits": _finite(memory.bits),
                "bytes": whole_bytes(memory.bits) if math.isfinite(memory.bits) else None,
                "ratio": _finite(self.ratio(memory)),
                "vacuous": memory.vacuous,
                "condition": memory.condition,
                "source": memory.source,
            }
            for memory in self.possible
        ]
        return fields


def whole_bytes(bits: float) -> int:
    """Return `bits` in whole bytes, rounded up."""
    return math.ceil(bits / 8.0 * (1.0 - 1e-12))  # the factor keeps float noise from adding a byte


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
