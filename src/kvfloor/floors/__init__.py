"""Compute floors: lower bounds on the memory that attention needs, each given by a theorem.

Most users need `space` only. For a context length and head sizes, it returns a `Floor`, which holds the bound in bits.
The other functions are the formulas behind `space`, the sizes of methods that are known to suffice (such as
`subgen_plan`), and lower bounds on time (`time_probes`, `time_operations`).
A method is any way to keep a KV cache, exact or compressed. Its state is the memory that it keeps of a stream of
tokens. The proof of a memory floor hides random bits in the values of a stream, and reads them back by queries of the
state. So the state must hold about as many bits as were hidden. docs/floors.md has the proofs.
"""

from kvfloor.floors.ball import ball_norm, ball_radius, best_points
from kvfloor.floors.coherence import (
    gap_circle,
    gap_hypercube,
    gap_known,
    jl_dim_paper,
    mu_chirp,
    mu_rademacher,
    mu_reed_solomon,
    mu_sphere,
)
from kvfloor.floors.covering import clusters, covering_balls, greedy_centres
from kvfloor.floors.entropy import H2, index_bits, row_bits, token_ids
from kvfloor.floors.floor import Floor, Possible
from kvfloor.floors.kept import kept_tokens
from kvfloor.floors.levels import (
    VALUES,
    additive_leak,
    additive_levels,
    additive_values,
    level_values,
    levels_leak,
    relative_levels,
)
from kvfloor.floors.metric import ball_bits, metric_space, noisy_row_bits, sign_norm, wrong_share
from kvfloor.floors.norm_bounded import N_dr, separable_keys
from kvfloor.floors.question import ATTENTIONS, METRICS, space
from kvfloor.floors.recall import fact_bits, most_facts, recall_bits
from kvfloor.floors.sampling import lazy_gumbel_tokens, subgen_numbers, subgen_plan, subgen_s, subgen_t
from kvfloor.floors.separation import eps_s, eps_s_limit, level_eps_s, level_tolerance, tau
from kvfloor.floors.spherical import gap_packing, log_packing_count
from kvfloor.floors.spike import paper_C, spike_C, window_C
from kvfloor.floors.standard import additive_space
from kvfloor.floors.taylor import taylor_degree, taylor_numbers
from kvfloor.floors.tensor import mu_tensor, tensor_C, tensor_rows, tensor_space
from kvfloor.floors.time import probing_success, time_operations, time_probes
from kvfloor.floors.upper import exact_bytes, running_sum_numbers
from kvfloor.floors.visual import pyramid, pyramid_tokens, visual_C, visual_rows, visual_space

__all__ = [
    "ATTENTIONS",
    "H2",
    "METRICS",
    "VALUES",
    "Floor",
    "N_dr",
    "Possible",
    "additive_leak",
    "additive_levels",
    "additive_space",
    "additive_values",
    "ball_bits",
    "ball_norm",
    "ball_radius",
    "best_points",
    "clusters",
    "covering_balls",
    "eps_s",
    "eps_s_limit",
    "exact_bytes",
    "fact_bits",
    "gap_circle",
    "gap_hypercube",
    "gap_known",
    "gap_packing",
    "greedy_centres",
    "index_bits",
    "jl_dim_paper",
    "kept_tokens",
    "lazy_gumbel_tokens",
    "level_eps_s",
    "level_tolerance",
    "level_values",
    "levels_leak",
    "log_packing_count",
    "metric_space",
    "most_facts",
    "mu_chirp",
    "mu_rademacher",
    "mu_reed_solomon",
    "mu_sphere",
    "mu_tensor",
    "noisy_row_bits",
    "paper_C",
    "probing_success",
    "pyramid",
    "pyramid_tokens",
    "recall_bits",
    "relative_levels",
    "row_bits",
    "running_sum_numbers",
    "separable_keys",
    "sign_norm",
    "space",
    "spike_C",
    "subgen_numbers",
    "subgen_plan",
    "subgen_s",
    "subgen_t",
    "tau",
    "taylor_degree",
    "taylor_numbers",
    "tensor_C",
    "tensor_rows",
    "tensor_space",
    "time_operations",
    "time_probes",
    "token_ids",
    "visual_C",
    "visual_rows",
    "visual_space",
    "window_C",
    "wrong_share",
]
