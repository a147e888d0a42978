"""Provide the small built-in model, its tokenizer and its trainer."""

from kvfloor.models.load import builtin_path, load

__all__ = ["builtin_path", "load"]
