"""Write numbers as text, in the same way in the recommendation, the terminal table and the report."""


def bytes_text(count: float) -> str:
    """Write a size with three significant digits in binary units, e.g. `1.25 MiB`; whole bytes below 1 KiB."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1000 or unit == "TiB":
            break
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def percent_text(share: float) -> str:
    """Write a share as whole per cent, e.g. `12 %`; `<1 %` between 0 and 1 %, `>99 %` between 99 and 100 %."""
    if 0 < share < 0.01:
        return "<1 %"
    if 0.99 < share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def points_text(share: float) -> str:
    """Write a difference of shares in percentage points, e.g. `15 points`."""
    return f"{100 * share:.0f} points"


def smaller_text(exact_bytes: float, state_bytes: float) -> str:
    """Write the ratio of the exact cache's bytes to a method's state bytes, e.g. `7.5x`; `-` for a state of 0 bytes."""
    return f"{exact_bytes / state_bytes:.1f}x" if state_bytes else "-"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: `1 cell`, `3 cells`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nats_text(nats: float) -> str:
    """Write a divergence or a loss with two significant digits, e.g. `0.0056 nats`; `0 nats` below 1e-6."""
    return f"{number_of_nats(nats)} nats"


def number_of_nats(nats: float) -> str:
    """Write a number of nats with two significant digits, e.g. `0.0056` or `2e-5`; `0` below 1e-6."""
    if abs(nats) < 1e-6:
        return "0"
    return f"{nats:.2g}" if abs(nats) >= 1e-4 else f"{nats:.0e}".replace("e-0", "e-")
