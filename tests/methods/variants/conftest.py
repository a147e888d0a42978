"""One thread, for every test of another attention law."""

import torch

torch.set_num_threads(1)
