"""Compressed caches for transformers' `generate()`. The only folder that imports transformers' internals."""

from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.prepare import prepare, restore

__all__ = ["CompressedCache", "prepare", "restore"]
