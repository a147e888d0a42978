"""Measure memory floors on given keys and queries: lower bounds, by theorem, on the bits that any method must hold.

A method is a way to keep a KV cache, exact or compressed; its state is the memory that it keeps of a stream of tokens.
Floors, for keys of a given model instead of the worst keys:
    readable_by         the bits of a state that answers given queries over given keys
    readable_within     the bits of a state that answers all queries up to a given length, over keys chosen from the
                        given ones
    volume_by           the bits of a state that answers given queries, from the volume of all answers: the larger floor
                        where queries mix many tokens and small errors are asked
    readable_after      the first floor for a recorded stream that is cut at a token: the keys before the cut are
                        stored, and the queries after the cut are answered
Figures to compare a floor with, which are no lower bounds for the given values:
    gaussian_reference  the fewest bits that describe attention's answers, if the values were Gaussian
    covering_curve      the memory of SubGen, a method that clusters keys ("covering ceiling")
docs/floors.md ("Readable tokens", "Gaussian reference", "Covering ceiling") has the proofs and their limits.
"""

from kvfloor.floors.measured.covering import Ceiling, covering_curve, covering_number, greedy_cover
from kvfloor.floors.measured.levels import Demand
from kvfloor.floors.measured.limit import Limit, Stopped
from kvfloor.floors.measured.readable import (
    Readable,
    readable_by,
    readable_by_rows,
    readable_within,
    readable_within_rows,
)
from kvfloor.floors.measured.recorded import causal_mass, longest_query, readable_after
from kvfloor.floors.measured.spectral import (
    GaussianReference,
    attention_matrix,
    gaussian_rate,
    gaussian_reference,
    squared_singular_values,
    value_spread,
)
from kvfloor.floors.measured.volume import VolumeFloor, volume_by

__all__ = [
    "Ceiling",
    "Demand",
    "GaussianReference",
    "Limit",
    "Readable",
    "Stopped",
    "VolumeFloor",
    "attention_matrix",
    "causal_mass",
    "covering_curve",
    "covering_number",
    "gaussian_rate",
    "gaussian_reference",
    "greedy_cover",
    "longest_query",
    "readable_after",
    "readable_by",
    "readable_by_rows",
    "readable_within",
    "readable_within_rows",
    "squared_singular_values",
    "value_spread",
    "volume_by",
]
