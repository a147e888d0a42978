"""Seeded offline tasks with exact answers: `TASKS[name].generate(seed, index, length) -> Sample`."""

from .lexicon import FULL, Lexicon
from .registry import TASKS
from .sample import Question, Sample, score
from .task import Task

__all__ = ["FULL", "TASKS", "Lexicon", "Question", "Sample", "Task", "score"]
