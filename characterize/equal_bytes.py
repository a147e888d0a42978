"""Audit every method that applies on the built-in model at equal bytes, task by task.

    python -m characterize.equal_bytes [--n N] [--budgets ...] [--methods ...]

The script runs the audit of `kvfloor audit` with 512 tokens of context. The budget is in bytes of a whole sequence's
cache, so that it covers everything that a method holds beside its tokens (scores, samples, sketches, its open block);
exact takes 2 MiB. The question comes after the compression ("after"). For `kv`, whose question names the key, it is
also compressed together with the context ("visible"). Each row gives the state's measured bytes, the bytes that one
token reads, and the right answers of n with Wilson's 95 % interval. All rows of a task share their samples. The script
takes a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from characterize.lib.table import save
from kvfloor.audit import run
from kvfloor.audit.request import AuditRequest
from kvfloor.splitting import split_list
from kvfloor.statistics import wilson_interval

CELLS = {"recall": ("after",), "registers": ("after",), "kv": ("after", "visible")}
METHODS = (
    "h2o",
    "h2o(recent=0)",
    "h2o(prefill=dense)",
    "tova",
    "snapkv(decode=evict)",
    "raas(prompt=evict)",
    "knorm",
    "keydiff",
    "ridge_leverage",
    "expected",
    "k_center",
    "sinks+value_sum",
    "sinks+moments(covariance=diagonal)",
    "sinks+less(kernels=builtin)",
    "subgen_sketch",
    "balance",
    "quant(bits=2)",
    "exact|hip(k=64)",
    "exact|pages(pages=8)",
    "exact|zeta(k=64)",
    "exact|top_k(k=64)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--budgets", default="512KiB")
    parser.add_argument("--methods", help="with commas; instead of all")
    given = parser.parse_args()
    torch.set_num_threads(1)
    methods = METHODS if given.methods is None else split_list(given.methods)
    rows = []
    for task, protocols in CELLS.items():
        with tempfile.TemporaryDirectory() as folder:
            question = AuditRequest(
                methods=methods,
                budgets=split_list(given.budgets),
                tasks=(task,),
                protocols=protocols,
                n=given.n,
                facts=0,
                out=Path(folder) / "audit",
            )
            answer = run.run(question, lambda total, text: print(text, flush=True))
        for row in answer.rows:
            right = sum(row.outcomes)
            rows.append(
                (row.protocol, row.task, row.method, row.state_bytes, int(row.bytes_read_per_token))
                + (right, row.n, *wilson_interval(right, row.n))
            )
    save(__file__, ("question", "task", "method", "state_bytes", "bytes_read", "right", "n", "low", "high"), rows)


if __name__ == "__main__":
    main()
