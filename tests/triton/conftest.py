"""Let triton interpret kernels on a CPU; leave the tests out where it is not installed: `make test-triton` has it."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
