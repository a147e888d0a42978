"""Leave out the tests that run vLLM where it is not installed, as it needs an environment of its own."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_engine.py", "test_schedules.py", "test_start.py"]
