"""Generate seeded recall tasks with exact answers, offline: `lookup(name).generate(seed, index, length) -> Sample`.

A sample is a context of `length` tokens, at least one question about it, and each question's only right answer.
"""

from .lexicon import FULL, Lexicon
from .registry import TASKS, lookup
from .sample import Question, Sample, score
from .task import Request, Task, Woven
from .weave import Plot

__all__ = ["FULL", "TASKS", "Lexicon", "Plot", "Question", "Request", "Sample", "Task", "Woven", "lookup", "score"]
