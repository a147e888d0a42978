"""Find which of torch's operators the time of a decoded token goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvfloor.bench.records import OperatorShare

TOKENS, SHOWN = 5, 6


def operators(
    call: Callable[[], object], *, model: str, name: str, context: int, dtype: str
) -> Iterator[OperatorShare]:
    """Yield the SHOWN operators with the largest shares of their own processor time over TOKENS calls.

    model, name, context, dtype  as in a row. The profiler slows small operators more than large ones.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(TOKENS):
            call()
    events = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    whole = sum(one.self_cpu_time_total for one in events)
    for one in events[:SHOWN]:
        share = one.self_cpu_time_total / whole
        yield OperatorShare(model, name, context, dtype, one.key, share, one.count / TOKENS)
