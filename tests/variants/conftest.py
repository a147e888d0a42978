"""One thread, for every test of another attention law; methods of this folder are imported by name."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # ones:Ones is imported by name
