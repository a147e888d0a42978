"""Provide the small built-in model with its tokenizer, and load local models."""

from kvfloor.models.load import builtin_path, load

__all__ = ["builtin_path", "load"]
