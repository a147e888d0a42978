"""Provide compressed KV caches for transformers' `generate()`, and `prepare`, which makes a model able to use them."""

from kvfloor.hf.bases import CodingBasis, coding_basis
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.calibrate import floor_shares
from kvfloor.hf.layer import Eviction
from kvfloor.hf.mixed import choose_layers
from kvfloor.hf.prepare import prepare, restore
from kvfloor.hf.promise import PromiseBroken
from kvfloor.hf.saved import NewerVersion, OlderVersion, UnknownMethod, WrongBasis, WrongModel
from kvfloor.hf.verified.cache import VerifiedCache
from kvfloor.hf.verified.generate import generate_verified
from kvfloor.hf.verified.report import VerifiedReport

__all__ = [
    "CodingBasis",
    "CompressedCache",
    "Eviction",
    "NewerVersion",
    "OlderVersion",
    "PromiseBroken",
    "UnknownMethod",
    "VerifiedCache",
    "VerifiedReport",
    "WrongBasis",
    "WrongModel",
    "choose_layers",
    "coding_basis",
    "floor_shares",
    "generate_verified",
    "prepare",
    "restore",
]
