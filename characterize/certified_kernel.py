"""Compare the bounds of the kernel of certified reads with those of torch, on real models' keys; needs numba.

    python -m characterize.certified_kernel "SmolLM2 2k"

Reads the first text of one of the sources of `characterize.certified_reads`: every fourth of the last 64 tokens'
queries attends to all tokens before them, in bfloat16. Prints how many queries each of the two certifies to 1, 2 and
5 % without an exact token, how large the kernel's bound is over that of torch, and how many of the kernel's answers err
more than their bound.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from characterize.certified_reads import ASKED, SOURCES, rows_of, truth
from kvfloor.methods.tiered import kernel
from kvfloor.methods.tiered.tiered import Tiered


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) != 2 or sys.argv[1] not in SOURCES:
        raise SystemExit(f"give one of {', '.join(SOURCES)}")
    source, layers = SOURCES[sys.argv[1]]
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    ratios: list[Tensor] = []
    violations = 0
    for streams in replace(source, texts=source.texts[:1]).streams(layers):
        for stream in rows_of(streams):
            q, exact = truth(stream)
            state = Tiered().open(stream.spec())
            state.append(stream.k[:, :-ASKED], stream.v[:, :-ASKED])
            assert state.hot is not None
            if not kernel.serves(state.hot):
                raise SystemExit(
                    'the kernel does not serve these keys, or numba is missing: pip install "kvfloor[fast]"'
                )
            for token in range(0, ASKED, 4):
                found = kernel.read(state.hot, q[:, :, token], None)
                wanted, _ = state.hot.glimpse(q[:, :, token], None)[0].answer()
                error = (found.partial.mean.double() - exact[:, :, token]).norm(dim=-1)
                violations += int((error > found.bound).sum())
                ratios.append((found.bound / wanted.bound).flatten())
                mine.append(found.relative.flatten())
                theirs.append(wanted.relative.flatten())
    ratio, kernels, torchs = (torch.cat(x) for x in (ratios, mine, theirs))
    print(f"{len(ratio)} queries, {violations} violations; kernel over torch: ", end="")
    print(", ".join(f"{ratio.quantile(share):.3f} at {share:.0%}" for share in (0.5, 0.9, 1.0)))
    for epsilon in (0.01, 0.02, 0.05):
        shares = [float((bounds <= epsilon).double().mean()) for bounds in (kernels, torchs)]
        print(f"certified to {epsilon:.0%}: kernel {shares[0]:.4f}, torch {shares[1]:.4f}")


if __name__ == "__main__":
    main()
