"""Define two other forms of attention, whose caches can be compressed too.

Tensor attention is over all pairs of tokens. Visual autoregression makes an image from coarse to fine maps of tokens;
the tokens of a map attend to each other and to all coarser maps.
"""

from kvfloor.methods.variants.subgen_tensor import SubGenTensor
from kvfloor.methods.variants.tensor import TensorAttention
from kvfloor.methods.variants.visual import NextScale, keep_coarse, scale_budgets, tokens_in

__all__ = ["NextScale", "SubGenTensor", "TensorAttention", "keep_coarse", "scale_budgets", "tokens_in"]
