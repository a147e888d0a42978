"""Measure how many hidden facts come back through compressed caches of two models, and the bits that this certifies.

    python -m characterize.facts_returned [builtin] [smollm2]

This is `kvfloor facts` (docs/audit.md) with fixed settings: prompts of 512 tokens with 64 facts for the built-in model,
of 1,024 tokens with 32 facts for SmolLM2, 4 prompts each. A fact is a word with a two-digit number. Each row gives the
bytes of the caches of all prompts in a 16-bit model, the facts that came back right with their share's 95 % interval
(Wilson), the bits certified at confidence 1 - 2^-20, and these per KiB. The rows of a model that is not named stay. The
built-in model takes a minute on one core, SmolLM2 ten.
"""

from __future__ import annotations

import argparse

from characterize.lib.table import ResultTable
from kvfloor.audit.facts import measure_facts
from kvfloor.hf import prepare
from kvfloor.models import load

METHODS = (
    *("exact", "exact:k4v4", "exact:k3v3"),
    *("snapkv@25%", "h2o@25%", "sinks@25%", "random@25%", "snapkv:k4v3@50%"),
)
MODELS = {"builtin": (512, 64), "smollm2": (1024, 32)}  # tokens and facts of each prompt
SHEETS = 4
FIELDS = (
    *("model", "context", "setting", "cache_16_bit_bytes", "right", "facts", "low", "high"),
    *("certified_bits", "hidden_bits", "bits_per_kib"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all unless given")
    names = parser.parse_args().models or list(MODELS)
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"no model {', '.join(unknown)}: they are {', '.join(MODELS)}")
    table = ResultTable(__file__, FIELDS, names, list(MODELS))
    for name in names:
        model, tokenizer = load(name)
        context, facts = MODELS[name]
        for row in measure_facts(prepare(model), tokenizer, METHODS, context=context, facts=facts, sheets=SHEETS):
            table.add(
                *(name, context, row.method, row.cache_16_bit_bytes, row.right, row.facts, *row.right_interval),
                *(row.certified_bits, row.hidden_bits, row.bits_per_kib),
            )
    table.save()


if __name__ == "__main__":
    main()
