"""Set up every test: one thread, derandomised properties, and one source of seeded numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tests.support import Draw, seeded

torch.set_num_threads(1)
settings.register_profile("kvfloor", deadline=None, derandomize=True)
settings.load_profile("kvfloor")


@pytest.fixture
def draw() -> Draw:
    return seeded(20260101)
