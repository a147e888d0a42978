"""Count the drafts of bounded caches that the exact cache accepts, and the tokens that verified decoding changes.

    python -m characterize.verified_acceptance [builtin smollm2]

A model in float32 continues passages of 512 tokens: the built-in model those of three mixtures of tasks, SmolLM2 those
of three texts. `generate_verified` with 8 drafts per verification is compared with greedy decoding from the exact
cache, one token per forward. SIZES has the numbers of passages and of new tokens. Each line is one measure:
  tokens that differ        of all new tokens, those unlike the exact cache's at the same place
  texts that differ         continuations with at least one such token
  least margin              the least difference of the two largest logits of a token
  tokens per verification   new tokens per forward over the exact cache, the mean over passages
  accepted at i             share of the i-th drafts of a round that are accepted, where all before them were
low, high: 95 % interval over passages, where at least 8 have such drafts; n: tokens, passages, verifications or drafts.
A minute on one core for the built-in model, ten for SmolLM2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from characterize.lib.table import ResultTable
from kvfloor.audit.texts import GENERATED, SHIPPED, excerpts
from kvfloor.hf import CompressedCache, VerifiedReport, generate_verified, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.models import load
from kvfloor.statistics import MIN_BLOCKS, mean_interval

TOKENS, DRAFT = 512, 8
FIELDS = ("model", "method", "measure", "value", "low", "high", "n")
TEXTS = {"builtin": GENERATED, "smollm2": SHIPPED}
SIZES = {  # passages, new tokens of each
    "builtin": {"snapkv@25%": (40, 250), "h2o@25%": (40, 250), "exact:k4v4": (40, 250)},
    "smollm2": {"snapkv@25%": (10, 60), "h2o@25%": (10, 60), "exact:k4v4": (40, 250)},
}


def passages(source: str, count: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Return the token ids of `count` passages of TOKENS tokens, of each text of the source in turn."""
    each = -(-count // len(TEXTS[source]))
    texts = [one.context for one in excerpts(TEXTS[source], [each * TOKENS], 0, encode)]
    return [text[i * TOKENS : (i + 1) * TOKENS] for i in range(each) for text in texts][:count]


def measures(report: VerifiedReport, said: torch.Tensor, exact: torch.Tensor) -> list[tuple[object, ...]]:
    """Return (measure, value, low, high, n) of one method, from the new tokens (passages, tokens) of both caches."""
    differ = said != exact
    made = [(float(n - 1), rounds) for n, rounds in zip(report.tokens, report.rounds, strict=True)]
    lines: list[tuple[object, ...]] = [
        ("tokens that differ", int(differ.sum()), "", "", differ.numel()),
        ("texts that differ", int(differ.any(1).sum()), "", "", len(differ)),
        ("least margin", report.least_margin, "", "", differ.numel()),
        ("tokens per verification", *mean_interval(made), sum(report.rounds)),
    ]
    for i in range(DRAFT):
        pairs = [(float(yes[i]), of[i]) for yes, of in zip(report.accepted, report.reached, strict=True) if of[i]]
        yes, of = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0)
        found = mean_interval(pairs)[1:] if len(pairs) >= MIN_BLOCKS else ()
        interval = [min(max(end, 0.0), 1.0) for end in found] or ("", "")  # the ends of a share
        lines.append((f"accepted at {i + 1}", yes / of if of else "", *interval, of))
    return lines


def main() -> None:
    torch.set_num_threads(1)
    sources = sys.argv[1:] or list(SIZES)
    table = ResultTable(__file__, FIELDS, sources, list(SIZES))
    for source in sources:
        model, tokenizer = load(source)
        prepare(model)
        count, new = (max(size[i] for size in SIZES[source].values()) for i in range(2))
        texts = passages(source, count, lambda text, encode=tokenizer: encode(text).input_ids)
        dialogue = Dialogue.start(model, CompressedCache(model, "exact"), count)
        dialogue.feed(texts)
        exact = torch.tensor(dialogue.answer(new, None)[0])
        del dialogue
        for method, (count, new) in SIZES[source].items():
            given = {"draft": DRAFT, "max_new_tokens": new, "eos_token_id": ()}
            ids, report = generate_verified(model, torch.tensor(texts[:count]), method, return_report=True, **given)
            assert isinstance(report, VerifiedReport)
            for line in measures(report, ids[:, TOKENS:], exact[:count, :new]):
                table.add(source, method, *line)
    table.save()


if __name__ == "__main__":
    main()
