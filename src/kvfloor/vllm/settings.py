"""Read from environment variables what the user asks of the plug-in.

A method is the configuration of a compressed KV cache. vLLM runs a plug-in in every process before that process has a
configuration. So a method can only be asked for by an environment variable, which vLLM's worker processes inherit.
"""

from __future__ import annotations

import math
import os

from kvfloor.core.method import Method, standard_law
from kvfloor.methods.grammar import parse

METHOD = "KVFLOOR_METHOD"
"""Environment variable: the method as text, such as "sinks(4)@1024". Unset or empty: the plug-in does nothing."""

UNTESTED = "KVFLOOR_VLLM_UNTESTED"
"""Environment variable: 1 to run with a release of vLLM that is not in `TESTED`."""

SECONDS = "KVFLOOR_LOG_SECONDS"
"""Environment variable: seconds between two log lines on tokens that the running requests hold; 0 for no lines."""

TESTED = ("0.32.0",)
"""The releases of vLLM that the plug-in was tested with."""


def method_asked() -> Method | None:
    """Return the method that the environment variable KVFLOOR_METHOD names; None if it is unset or empty.

    Raises ValueError for text that is not a method, and for methods of tensor attention, which is softmax over pairs of
    tokens.
    """
    text = os.environ.get(METHOD, "").strip()
    if not text:
        return None
    try:
        return standard_law(parse(text), "vLLM")
    except ValueError as cause:
        raise ValueError(f"{METHOD}={text}: {cause}") from None


def require_tested(release: str) -> None:
    """Raise ValueError for a release of vLLM that the plug-in was not tested with, unless the user accepts the risk.

    release: the version, such as "0.32.0"; a local part such as "+cpu" does not matter. The user accepts the risk by
    KVFLOOR_VLLM_UNTESTED=1.
    """
    if release.split("+")[0] not in TESTED and os.environ.get(UNTESTED) != "1":
        raise ValueError(
            f"{METHOD} is set, but kvfloor was tested with vLLM {', '.join(TESTED)} only and this is {release}: "
            f"install one of those, or set {UNTESTED}=1 to try"
        )


def log_seconds() -> float:
    """Return the seconds between two log lines about the running requests; infinite for no lines.

    The environment variable KVFLOOR_LOG_SECONDS gives them. If it is unset, they are 10; its value 0 means no lines.
    Raises ValueError if it is not a number >= 0.
    """
    text = os.environ.get(SECONDS, "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"{SECONDS} is a number of seconds, or 0 for no log lines, got {text!r}")
    return seconds or math.inf
