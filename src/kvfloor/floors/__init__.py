"""Floors: theorems on how little memory attention can use, as functions that return numbers.

`space` is the question users ask; the other functions are the formulas it is made of. docs/floors.md has the proofs.
"""

from kvfloor.floors.coherence import (
    gap_circle,
    gap_hypercube,
    gap_known,
    gap_packing,
    jl_dim_paper,
    log_packing_count,
    mu_chirp,
    mu_rademacher,
    mu_reed_solomon,
    mu_sphere,
)
from kvfloor.floors.entropy import H2, index_bits, row_bits, token_ids
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.floors.separation import eps_s, eps_s_limit, level_eps_s, level_tolerance, tau
from kvfloor.floors.spike import paper_C, spike_C, window_C
from kvfloor.floors.standard import Floor, space

__all__ = [
    "H2",
    "Floor",
    "N_dr",
    "eps_s",
    "eps_s_limit",
    "gap_circle",
    "gap_hypercube",
    "gap_known",
    "gap_packing",
    "index_bits",
    "jl_dim_paper",
    "level_eps_s",
    "level_tolerance",
    "log_packing_count",
    "mu_chirp",
    "mu_rademacher",
    "mu_reed_solomon",
    "mu_sphere",
    "paper_C",
    "row_bits",
    "space",
    "spike_C",
    "tau",
    "token_ids",
    "window_C",
]
