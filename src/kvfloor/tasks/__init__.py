"""Generate seeded recall tasks with exact answers, offline: `lookup(name).generate(seed, index, length) -> Sample`.

A sample is a context of nearly `length` tokens, and at least one question about it. Each question has a right answer
and the checks that score a generated one. `name` is a task's, such as "recall"; `seed` and `index`, the sample's
number, decide all random choices.
"""

from .checks import AnswerCheck, BeginsWith, Contains, JsonField, Lines, Matches, Part, SameWords
from .lexicon import FULL, Lexicon
from .registry import EVERY, GROUPS, TASKS, expand, lookup
from .sample import Question, Sample, score
from .task import Request, Task, Woven
from .weave import Plot

__all__ = [
    "EVERY",
    "FULL",
    "GROUPS",
    "TASKS",
    "AnswerCheck",
    "BeginsWith",
    "Contains",
    "JsonField",
    "Lexicon",
    "Lines",
    "Matches",
    "Part",
    "Plot",
    "Question",
    "Request",
    "SameWords",
    "Sample",
    "Task",
    "Woven",
    "expand",
    "lookup",
    "score",
]
