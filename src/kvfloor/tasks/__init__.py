"""Generate seeded offline tasks with exact answers: `lookup(name).generate(seed, index, length) -> Sample`."""

from .lexicon import FULL, Lexicon
from .registry import TASKS, lookup
from .sample import Question, Sample, score
from .task import Request, Task, Woven
from .weave import Plot

__all__ = ["FULL", "TASKS", "Lexicon", "Plot", "Question", "Request", "Sample", "Task", "Woven", "lookup", "score"]
