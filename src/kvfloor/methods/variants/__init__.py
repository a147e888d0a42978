"""Define other attention laws over the same caches: tensor attention over token pairs, and attention over images."""

from kvfloor.methods.variants.subgen_tensor import SubGenTensor
from kvfloor.methods.variants.tensor import TensorAttention
from kvfloor.methods.variants.visual import NextScale, keep_coarse, scale_budgets, tokens_in

__all__ = ["NextScale", "SubGenTensor", "TensorAttention", "keep_coarse", "scale_budgets", "tokens_in"]
