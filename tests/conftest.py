"""Set up every test: one thread, derandomised properties, and one source of seeded numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor

torch.set_num_threads(1)
settings.register_profile("kvfloor", deadline=None, derandomize=True)
settings.load_profile("kvfloor")


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Return `draw`: draw(3, 4) gives seeded standard normal float64 numbers (3, 4); dtype= and scale= change them."""
    generator = torch.Generator().manual_seed(20260101)

    def numbers(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return numbers
