"""Measure memory floors on given keys and queries: the bits that *this* model's attention needs, by theorem.

`readable_by` and `readable_within` return floors: lower bounds on the bits that the state of any method must hold.
`gaussian_reference` and `covering_curve` return figures to compare a floor with; they are no lower bounds.
docs/floors.md ("Readable tokens", "Gaussian reference", "Covering ceiling") has the proofs and their limits.
"""

from kvfloor.floors.measured.covering import Ceiling, covering_curve, covering_number, greedy_cover
from kvfloor.floors.measured.levels import Demand
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

__all__ = [
    "Ceiling",
    "Demand",
    "GaussianReference",
    "Readable",
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
]
