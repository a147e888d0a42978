"""Measure how far each method's predictions diverge from exact ones at each budget, on both models.

    python -m characterize.nats_by_budget [PART ...] [--out DIR]

The script runs `kvfloor audit` on texts alone: a context is taken in under the method and sealed, then the continuation
is predicted token by token while the method keeps running. A part is a model with a context length; all parts run
unless some are named, and the rows of the others stay. Each row of the table gives the bytes of the cache at the
context's end, of exact ones with it, and the mean KL divergence in nats per token with its 95 % interval over blocks of
64 tokens. A method without a budget (codes, selectors) has one row. Afterwards the rank correlation of each two parts
is printed, over the settings that both have. The part smollm2-512 has a short context and a long continuation, as RaaS
is made for. SmolLM2 takes about an hour on two cores. With --out, rows that are in the folder are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import correlation

from characterize.lib.table import Row, save
from kvfloor.audit.nats import TextSummary, summaries
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import run

EVICTORS = (
    "h2o",
    "h2o(prefill=dense)",
    "tova",
    "snapkv",
    "snapkv(decode=evict)",
    "knorm",
    "keydiff",
    "ridge_leverage",
    "expected(epsilon=0.01)",
    "expected(epsilon=0.01,prefill=dense)",
    "k_center",
)
OTHERS = ("sinks+value_sum", "sinks+moments(covariance=diagonal)", "subgen_sketch", "balance")
LONG_ANSWER = (
    "raas",
    "raas(prompt=evict)",
    "h2o",
    "tova",
    "sinks",
    "random",
)
SELECTORS = ("exact|top_k(k=256)", "exact|pages(pages=16)", "exact|zeta(k=256)")
FIELDS = (
    "model",
    "context",
    "method",
    "budget",
    "state_bytes",
    "exact_bytes",
    "kl",
    "low",
    "high",
    "same_top",
    "tokens",
)


@dataclass(frozen=True)
class ModelPart:
    """Hold some audits of one model with the same lengths of contexts and continuations, in tokens.

    plan: per audit its methods, their budgets and the texts.
    """

    model: str
    context: int
    continuation: int
    plan: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]

    @property
    def name(self) -> str:
        return f"{self.model}-{self.context}"

    def measured(self, folder: Path) -> list[TextSummary]:
        """Run the audits in subfolders of `folder`; return one summary per setting, of the first audit that has it."""
        found: dict[str, TextSummary] = {}
        for number, (methods, budgets, texts) in enumerate(self.plan):
            request = AuditRequest(
                model=self.model,
                methods=methods,
                budgets=budgets,
                tasks=(),
                texts=texts,
                contexts=(self.context,),
                continuation=self.continuation,
                facts=0,
                out=folder / f"{self.name}-{number}",
            )
            answer = run(request, lambda total, text: print(text, flush=True))
            found = {one.setting: one for one in summaries(answer.texts)} | found
        return list(found.values())


SHORT = tuple(text.replace("256", "64").replace("pages=16", "pages=4") for text in SELECTORS)
BUDGETS = ("12.5%", "25%", "50%")
TEXTS, MIXTURES = ("speech", "novel", "facts"), ("mixture-0", "mixture-1", "mixture-2")
PARTS = {
    part.name: part
    for part in (
        ModelPart(
            "builtin",
            512,
            256,
            ((EVICTORS, BUDGETS, MIXTURES), ((*OTHERS, *SHORT), ("25%",), MIXTURES)),
        ),
        ModelPart(
            "smollm2",
            2048,
            512,
            ((EVICTORS, BUDGETS, TEXTS), ((*OTHERS, *SELECTORS), ("25%",), ("speech",))),
        ),
        ModelPart("smollm2", 512, 4096, ((LONG_ANSWER, ("256", "512"), ("speech",)),)),
    )
}


def correlations(parts: Mapping[str, Iterable[TextSummary]]) -> list[tuple[str, str, int, float]]:
    """Return (part, part, number of settings, Spearman's rank correlation of their KL) for each two parts."""
    kl = {name: {one.setting: one.figures.kl for one in rows if one.setting != "exact"} for name, rows in parts.items()}
    found = []
    for one, other in combinations(kl, 2):
        both = sorted(kl[one].keys() & kl[other].keys())
        ranks = [{name: rank for rank, name in enumerate(sorted(both, key=kl[part].get))} for part in (one, other)]
        rho = correlation(*([rank[name] for name in both] for rank in ranks))
        found.append((one, other, len(both), rho))
    return found


def table(parts: Mapping[str, Iterable[TextSummary]]) -> list[Row]:
    """Return one row per part and setting, the smallest divergence of a part first; columns as in FIELDS."""
    rows: list[Row] = []
    for name, summed in parts.items():
        part = PARTS[name]
        for one in sorted(summed, key=lambda one: one.figures.kl):
            _, _, budget = one.setting.partition("@")
            found = one.figures
            rows.append(
                (part.model, part.context, one.configuration, budget or "none", int(one.state_bytes))
                + (int(one.exact_bytes), found.kl, found.kl_low, found.kl_high, found.same_top, found.tokens)
            )
    return rows


def with_others(rows: Iterable[Row], measured: Iterable[str]) -> list[Row]:
    """Return the rows with those of the parts that were not measured, as they stand in the table, part after part."""
    _, *lines = (line.split("\t") for line in Path(__file__).with_suffix(".tsv").read_text("utf-8").splitlines())
    kept: list[Row] = [tuple(line) for line in lines if f"{line[0]}-{line[1]}" not in measured]
    return sorted([*kept, *rows], key=lambda row: list(PARTS).index(f"{row[0]}-{row[1]}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        found = {name: PARTS[name].measured(folder) for name in given.parts or PARTS}
    save(__file__, FIELDS, with_others(table(found), found))
    for one, other, count, rho in correlations(found):
        print(f"{one} and {other}: rank correlation {rho:.2f} over {count} settings")


if __name__ == "__main__":
    main()
