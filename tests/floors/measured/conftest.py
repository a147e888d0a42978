"""One thread, derandomised properties, and this folder's oracle importable by name."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
settings.register_profile("measured", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("measured")


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """draw(3, 4) gives seeded standard normal float64 numbers of that shape; dtype= and scale= adapt them."""
    generator = torch.Generator().manual_seed(20261101)

    def numbers(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return numbers
