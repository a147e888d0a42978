"""Build the built-in tokenizer: one token per word of the tasks, one per two digits, BOS first.

It is a WordPiece tokenizer over text split at white space and punctuation, lower-cased. A word of the tasks is one
token. A run of digits is cut from the left into pairs ("48213" -> "48" "##21" "##3"). Any other word is spelt in
letters, so that plain English text never becomes "unknown". Decoding gives back the text exactly, provided that it is
lower-case and its only punctuation is ". , ? =" with "=" between spaces.
"""

from __future__ import annotations

import string
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kvfloor.tasks import lexicon

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
PUNCTUATION = (".", ",", "?", "=", "!", ":", ";", "-", "'", '"', "(", ")", "/", "+", "*")
SENTENCE = 160  # characters; longer texts are contexts


def vocabulary() -> dict[str, int]:
    """Return {token: id} in a fixed order: special tokens, punctuation, digits, letters, "##" pieces, tasks' words."""
    digits = [*string.digits, *lexicon.PAIRS]
    letters = list(string.ascii_lowercase)
    words = [
        *lexicon.GRAMMAR,
        *lexicon.REGISTERS,
        *lexicon.THINGS,
        *lexicon.TRAITS,
        *lexicon.PEOPLE,
        *lexicon.MANNERS,
        *lexicon.ACTIONS,
        *lexicon.PLACES,
        *lexicon.TIMES,
        *lexicon.LINKS,
    ]
    continued = ["##" + piece for piece in (*digits, *letters)]
    entries = [PAD, BOS, EOS, UNK, *PUNCTUATION, *digits, *letters, *continued, *words]
    return {token: i for i, token in enumerate(dict.fromkeys(entries))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the words of the tasks alone. It is the same on every call."""
    vocab = vocabulary()
    # WordPiece takes the longest match, so that two digits are taken before one
    fast = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNK, continuing_subword_prefix="##"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=8192,
    )


@lru_cache(maxsize=1)
def _shared() -> Tokenizer:
    return build_tokenizer().backend_tokenizer


def encode(text: str, *, bos: bool = True) -> list[int]:
    """Return the token ids of `text`, BOS first unless `bos` is False; faster than transformers' tokenizer call."""
    return _shared().encode(text, add_special_tokens=bos).ids


def count_tokens(text: str) -> int:
    """Return the number of tokens of `text`, BOS included. Counts of texts below 160 characters are cached."""
    return _count_sentence(text) if len(text) < SENTENCE else len(encode(text))


@lru_cache(maxsize=65536)
def _count_sentence(text: str) -> int:
    return len(encode(text))
