"""Compute the worst-case floor of a model's layers: bytes that any method needs, for worst-case keys and values.

A method that an audit measures promises no relative error. So the floor is that of values of one bit, which holds for
every method whose answers have any relative error below 1, in every number format. The finer answers must be, the
larger is the floor (`kvfloor.floors.space`).
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from kvfloor import floors


def worst_case_bytes(
    config: PreTrainedConfig, context: int, d: int, dv: int, *, heads: int, layers: int = 1, tied: bool = False
) -> int:
    """Return a lower bound on the bytes that any method needs for `layers` layers with `heads` kv heads each.

    config   the model's configuration
    context  number of tokens
    d, dv    widths of a key and of a value as the cache gets them
    tied     True if a token's value is its key (latent attention): one tensor [c, r], a latent and a rotary key. The
             model reads the latents alone as values. So the bound is that of values of width c under keys of width r:
             queries without a part along the latent aim at rotary keys, which are public, and read latents. It is 0
             where the configuration does not tell the widths apart
    """
    if tied:
        latent = getattr(config.get_text_config(decoder=True), "kv_lora_rank", None)
        if not isinstance(latent, int) or not 0 < latent < d:
            return 0
        d, dv = d - latent, latent
    return floors.space(context, d, dv, heads=heads, layers=layers, values="binary").bytes
