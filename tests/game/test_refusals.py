"""What cannot be played is refused by name, in every game."""

import math

import pytest

from kvfloor.game import play

USUAL = {
    "spike": {"n": 16, "d": 8},
    "codebook": {"n": 64, "codebook": 256, "d": 32},
    "packing": {},
    "probing": {"n": 128, "d": 8},
    "sparse": {},
    "tensor": {"n": 48, "d": 64},
    "visual": {"sides": (1, 2, 4, 6), "d": 32},
    "window": {"n": 256, "window": 64, "d": 32},
}
REFUSED = [
    ("spike", {"bits": 0}, "bits must be a whole number >= 1, got 0"),
    ("spike", {"bits": 25}, r"bits must lie in 1\.\.24, got 25"),
    ("spike", {"eta": 1.0}, r"eta must lie in \[0, 1\)"),
    ("spike", {"n": 0}, "n must be"),
    ("spike", {"d": 0}, "d must be"),
    ("spike", {"dv": 0}, "dv must be"),
    ("spike", {"rows": 0}, "rows must be"),
    ("spike", {"heads": 0}, "heads must be"),
    ("spike", {"layers": 0}, "layers must be"),
    ("spike", {"seed": -1}, "seed must be"),
    ("spike", {"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
    ("spike", {"family": "golden"}, "family must be one of chirp, .*, got 'golden'"),
    ("spike", {"family": "jl", "d": 16, "n": 1024}, "its theorem needs d >= 9242"),
    ("spike", {"d": 1, "n": 5}, "no family has n=5 keys"),
    ("codebook", {"codebook": 63}, r"codebook must lie in n\.\.16384 = 64\.\.16384, got 63"),
    ("codebook", {"codebook": 20_000}, "codebook must lie in"),
    ("codebook", {"heads": 2}, "codebook plays one head and asks for every key"),
    ("codebook", {"rows": 5}, "leave heads, layers and rows out"),
    ("codebook", {"family": "golden"}, "family must be one of"),
    ("codebook", {"bits": 25}, r"bits must lie in 1\.\.24"),
    ("packing", {"radius": 0.0}, "radius must be a positive number"),
    ("packing", {"radius": math.inf}, "radius must be a positive number"),
    ("packing", {"radius": -3}, "radius must be a positive number"),
    ("packing", {"n": 0}, "n must be"),
    ("packing", {"d": 0}, "d must be"),
    ("packing", {"eta": -0.1}, "eta must lie in"),
    ("packing", {"bits": 2}, "barrier 'packing' takes no bits"),
    ("probing", {"n": 15}, "n must be a whole number >= 16, got 15"),
    ("probing", {"n": 16, "eta": 0.95}, r"n must be at least 54 for barrier 'probing' at eta=0.95, got 16"),
    ("probing", {"runs": 0}, "runs must be"),
    ("probing", {"d": 0}, "d must be"),
    ("probing", {"bits": 2}, "barrier 'probing' takes no bits"),
    ("sparse", {"n": 16_385}, "n must be at most 16384 for barrier 'sparse', got 16385"),
    ("sparse", {"n": 0}, "n must be"),
    ("sparse", {"family": "golden"}, "family must be one of"),
    ("sparse", {"rows": 3}, "barrier 'sparse' takes no rows"),
    ("tensor", {"caches": 3}, "caches must be 2 or 4, got 3"),
    ("tensor", {"n": 3}, "n must be a whole number >= 4, got 3"),
    ("tensor", {"n": 1025}, r"n must be at most 1024 tokens for four caches \(n\^2 pairs are read\), got 1025"),
    ("tensor", {"d": 4}, "two pairs of the 48 tokens have the same product key in d=4: take d above 6 ln n"),
    ("tensor", {"d": 4, "caches": 2}, "cannot be singled out by any query"),
    ("tensor", {"family": "chirp"}, "barrier 'tensor' takes no family"),
    ("visual", {"sides": ()}, "sides must hold the side of at least one map, got none"),
    ("visual", {"sides": (2, 0)}, "side must be a whole number >= 1, got 0"),
    ("visual", {"sides": (2, 1.5)}, "side must be a whole number >= 1, got 1.5"),
    ("visual", {"sides": None, "n": 0}, "n must be"),
    ("visual", {"append": True}, "barrier 'visual' takes no append"),
    ("window", {"window": 257}, "window must be at most n = 256, got 257"),
    ("window", {"window": 0}, "window must be a whole number >= 1, got 0"),
    ("window", {"window": 1, "append": True}, "window must be a whole number >= 2, got 1"),
    ("window", {"n": 1, "window": None, "append": True}, "window must be at most n = 1, got 2"),
    ("window", {"n": 0}, "n must be"),
    ("window", {"caches": 2}, "barrier 'window' takes no caches"),
]


@pytest.mark.parametrize(("game", "changed", "message"), REFUSED)
def test_bad_input_is_refused_by_name(game, changed, message):
    barrier = "spike" if game == "codebook" else game
    with pytest.raises(ValueError, match=message):
        play("exact", **({"barrier": barrier, "isolated": False} | USUAL[game] | changed))


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match=r"barrier must be one of spike, packing, .*, got 'wall'"):
        play("exact", barrier="wall")
    with pytest.raises(ValueError, match="barrier 'visual' takes no window; it takes n, d, dv"):
        play("exact", barrier="visual", window=3)
    with pytest.raises(ValueError, match="unknown policy or method 'windw'"):
        play("windw@3")
    with pytest.raises(ValueError, match="tensor: the store must keep whole tokens and read them all"):
        play("quant(bits=8)", barrier="tensor", n=48, d=64, caches=4, isolated=False)
