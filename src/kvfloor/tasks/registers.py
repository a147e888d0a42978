"""Define the task "registers": recall the current values of all registers after many assignments "r3 = 47.".

A register is a variable r0, r1, ... The registers are assigned to at very different rates: the slowest one twice in the
whole context, each faster one a constant factor more often. So some current values are recent and others very old, and
every register also has outdated values in the context.
"""

from __future__ import annotations

import random

from .lexicon import REGISTERS
from .sample import Question, Sample
from .task import Request, Task

JITTER = 0.2  # a period varies by this share: the next write is not known from the last


def make(request: Request) -> Sample:
    """Return a sample: assignments "r3 = 47." up to the requested length, and a question for all current values.

    The request has the random generator, the largest number of tokens, and the difficulty, which is the number of
    registers. The question ends in "r0 =", so the answer is the value of r0 and then the other registers, as in
    "47 r1 = 12 ...". Raises ValueError if the length has no room for two lines per register.
    """
    rng, k = request.rng, request.difficulty
    empty = request.count("")
    size = request.count("r0 = 00.") - empty
    lines = (request.length - empty) // size
    while True:
        if lines < 2 * k:
            raise ValueError(f"length={request.length}: {k} registers need at least {2 * k} lines of {size} tokens")
        names = list(REGISTERS[:k])
        writes = schedule(rng, names, lines)
        values = [request.lexicon.number(rng, 2) for _ in writes]
        context = " ".join(f"{name} = {value}." for name, value in zip(writes, values, strict=True))
        surplus = request.count(context) - request.length
        if surplus <= 0:
            break
        lines -= -(-surplus // size)
    current = dict(zip(writes, values, strict=True))
    answer = f"{current[names[0]]}" + "".join(f" {name} = {current[name]}" for name in names[1:])
    return Sample(context, (Question(f"list r0 to {names[-1]}. r0 =", answer),))


def schedule(rng: random.Random, names: list[str], lines: int) -> list[str]:
    """Draw the order of the assignments: return, for each of `lines` lines, the name of the register it assigns to.

    rng    the sample's random generator
    names  the registers' names
    Each register is assigned to at roughly regular intervals, with random jitter. The numbers of assignments are those
    of `speeds`: each is a constant factor larger than the one before. It is random which register has which number.
    """
    times: list[tuple[float, str]] = []
    for name, writes in zip(rng.sample(names, len(names)), speeds(len(names), lines), strict=True):
        phase = rng.random()
        for beat in range(writes):
            times.append(((beat + phase + JITTER * (rng.random() - 0.5)) / writes, name))
    return [name for _, name in sorted(times)]


def speeds(k: int, lines: int) -> list[int]:
    """Return the number of assignments to each of `k` registers, slowest first: about 2, 2q, 2q^2, ...

    The ratio q is chosen so that they sum to `lines`.
    """
    low, high = 1.0, float(lines)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(2 * middle**i for i in range(k)) < lines:
            low = middle
        else:
            high = middle
    writes = [max(2, int(2 * low**i)) for i in range(k)]
    writes[-1] += lines - sum(writes)
    return writes


REGISTERS_TASK = Task(
    name="registers",
    about="many assignments to registers of very different speeds, all current values asked",
    unit="registers",
    lowest=2,
    highest=len(REGISTERS),
    default=lambda length: max(2, min(8, length // 24)),
    make=make,
)
