"""Provide compressed KV caches for transformers' `generate()`, and `prepare`, which makes a model able to use them."""

from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.calibrate import floor_shares
from kvfloor.hf.layer import Eviction
from kvfloor.hf.mixed import choose_layers
from kvfloor.hf.prepare import prepare, restore
from kvfloor.hf.saved import NewerVersion, OlderVersion, UnknownMethod, WrongModel

__all__ = [
    "CompressedCache",
    "Eviction",
    "NewerVersion",
    "OlderVersion",
    "UnknownMethod",
    "WrongModel",
    "choose_layers",
    "floor_shares",
    "prepare",
    "restore",
]
