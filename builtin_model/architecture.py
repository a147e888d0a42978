"""Define the built-in model's shape: a small Llama with grouped-query attention."""

from __future__ import annotations

from transformers import LlamaConfig

POSITIONS = 8192


def small_llama(vocab_size: int, bos: int, eos: int, pad: int, *, layers: int = 4, hidden: int = 128) -> LlamaConfig:
    """Return the configuration: heads of width 64, two query heads per kv head, tied embeddings.

    The rotary base is high. Half of each head's channels therefore rotate so slowly that queries and keys match by
    content over thousands of tokens. The fast half still finds the previous token by position.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
