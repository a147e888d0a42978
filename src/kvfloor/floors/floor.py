"""Hold a memory floor: a lower bound on the bits of every method, and memory sizes that are known to suffice.

In the proof of a floor, Alice hides values in a stream of tokens and sends a method's state, and Bob reads the values
back by queries of the state. Keys are public if Alice and Bob both know them beforehand.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Possible:
    """Hold a memory size, in bits, that is known to suffice for attention.

    The method `name` answers with `bits` bits of memory if `condition` holds; `source` has the proof. `vacuous` is True
    if the method keeps at least as many bits as all tokens take, so that nothing is saved.
    """

    name: str
    bits: float
    condition: str
    source: str
    vacuous: bool = False


@dataclasses.dataclass(frozen=True)
class Floor:
    """Hold a space floor: the `bits` that any method needs to answer accurately with probability p.

    A row is the dv values of one answer; p is the probability that a whole row is within the accuracy that the floor
    was computed for. `bytes` is `bits` in whole bytes. `upper_bits` suffices when the keys are public and the values
    are single bits, so the floor is tight up to the factor p - H2(p)/dv, H2 the binary entropy.
    `regime` names the case of the theorem that these sizes fall under, such as "near-orthogonal". `theorem` names the
    theorem that gives `bits`. `constants` has every number that was used to compute `bits`, name -> number.
    `possible` lists memory sizes that suffice, smallest first.
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

        The other arguments are fields of the floor. If `bits` is 0, the floor's regime is "vacuous (REGIME)", with the
        given regime in place of REGIME.
        """
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
        """Return the fields as a dict of plain JSON types, name -> value; a number that is not finite becomes None."""
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
