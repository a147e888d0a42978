"""Leave out the tests that need vLLM or triton where these are not installed: they take an environment of their own."""

import importlib.util

ENGINES = ["test_engine.py", "test_modes.py", "test_schedules.py", "test_start.py"]

collect_ignore = [] if importlib.util.find_spec("vllm") else ENGINES
if importlib.util.find_spec("triton") is None:
    collect_ignore.append("test_attend_blocks_triton.py")
