"""Compare a summary of the evicted tokens with spending its bytes on more tokens, by the attention output's error.

    python -m characterize.summary_error [--keys "built-in 2k,SmolLM2 2k,SmolLM2 8k"]

The keys are recorded ones (`characterize.lib.real_keys`): all layers of the built-in model, 7 of SmolLM2's 30. An
eviction policy streams over a text; then the queries of the text's last 16 tokens are answered. A stream's error is
||answer - exact|| / ||exact|| over these queries. A policy also holds the newest 16 tokens, of an open block. Each line
has the medians over the streams for
  alone    the policy with this budget
  summary  the policy with this budget and the summary
  tokens   the policy with as many bytes more in tokens as the summary holds ("more" tokens)
the median over the streams of summary / tokens with its bootstrap 95 % interval, and the number of streams in which the
summary errs less ("better"). LESS is measured on the model whose trained kernels are shipped, for the policy that they
were trained for; `h2o` is left out at 8k tokens, where it is slow. The script takes six minutes on one core.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from characterize.lib.real_keys import REAL, Streams, after, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor import parse

BUDGETS, LAYERS, ASKED = (64, 256), 7, 16
POLICIES = {"built-in 2k": ("sinks(4)", "h2o"), "SmolLM2 2k": ("sinks(4)", "h2o"), "SmolLM2 8k": ("sinks(4)",)}
SUMMARIES = ("value_sum", "moments(covariance=none)", "moments(covariance=diagonal)", "moments", "taylor(degree=1)")
LESS, LESS_KEYS, LESS_POLICY = "less(kernels=builtin)", "built-in 2k", ("sinks(4)", 64)
SIZES = ("keys", "policy", "budget", "summary", "more", "streams")
FIELDS = (*SIZES, "alone", "summary_error", "tokens_error", "ratio", "low", "high", "better")


def error(text: str, streams: Streams) -> tuple[Tensor, float]:
    """Return the error (rows,) of a method on each stream, and its state's bytes per stream."""
    q, k, v = streams.asked(ASKED)
    state = after(parse(text), streams, ASKED)
    exact = torch.softmax(streams.scale * q.double() @ k.double().mT, -1) @ v.double()
    wrong = (state.read(q).mean.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    return wrong, state.nbytes / len(k)


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, sources := tuple(source.name for source in REAL))
    table = ResultTable(__file__, FIELDS, names, sources)
    for name in names:
        parts = list(real(name).streams(LAYERS))
        token_bytes = (parts[0].k.shape[2] + parts[0].v.shape[2]) * 4
        for policy in POLICIES[name]:
            for budget in BUDGETS:
                alone, size = together(f"{policy}@{budget}", parts)
                known: dict[int, Tensor] = {}
                less = (LESS,) if (name, (policy, budget)) == (LESS_KEYS, LESS_POLICY) else ()
                for summary in (*SUMMARIES, *less):
                    mine, whole = together(f"{policy}+{summary}@{budget}", parts)
                    more = math.ceil((whole - size) / token_bytes)
                    if more not in known:
                        known[more] = together(f"{policy}@{budget + more}", parts)[0]
                    medians = [float(x.quantile(0.5)) for x in (alone, mine, known[more])]
                    better = int((mine < known[more]).sum())
                    ratio = median_interval((mine / known[more].clamp_min(1e-9)).tolist())
                    table.add(name, policy, budget, summary, more, len(mine), *medians, *ratio, better)
    table.save()


def together(text: str, parts: list[Streams]) -> tuple[Tensor, float]:
    """Return the errors of all parts' rows, and the bytes per row."""
    found = [error(text, part) for part in parts]
    return torch.cat([one for one, _ in found]), found[0][1]


if __name__ == "__main__":
    main()
