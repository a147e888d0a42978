"""The built-in model's shape: a small Llama with grouped queries."""

from __future__ import annotations

from transformers import LlamaConfig

POSITIONS = 8192


def small_llama(vocab_size: int, bos: int, eos: int, pad: int, *, layers: int = 4, hidden: int = 128) -> LlamaConfig:
    """Heads of 64, two query heads per key-value head, tied embeddings.

    The rotary base is high, so that half of each head turns so slowly that matching by content works over
    thousands of tokens, while the fast half still finds the previous token.
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
