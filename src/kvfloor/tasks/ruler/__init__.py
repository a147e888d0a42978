"""Generate the tasks of the long-context benchmark RULER (Hsieh et al., 2024) as published, for any tokenizer.

The length of a sample is that of the context, the question and the generated answer together. A sample's score in RULER
is the share of the references (the right words or numbers) that the answer contains.
"""

from .coded import CODED_WORDS
from .common import COMMON_WORDS
from .documents import DOCUMENTS
from .niah import NEEDLES
from .variables import VARIABLES

RULER = (*NEEDLES, VARIABLES, COMMON_WORDS, CODED_WORDS, DOCUMENTS)

__all__ = ["RULER"]
