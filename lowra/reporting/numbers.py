"""Numbers as people read them: as many digits as say something, never a share rounded to none or all."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Three decimals, or one digit and an exponent where three decimals would show nothing; "" for NaN."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return f"{value:.3f}" if abs(value) >= 0.005 else f"{value:.0e}"


def pair(mean: float, deviation: float) -> str:
    """`mean ± deviation`, both with three decimals unless the mean is too small to show so.

    A deviation that is not finite (one draw has none) leaves the mean alone.
    """
    if not math.isfinite(deviation) or math.isnan(mean):
        return number(mean)
    if abs(mean) >= 0.005 or not math.isfinite(mean):
        return f"{number(mean)} ± {deviation:.3f}"
    return f"{number(mean)} ± {number(deviation)}"


def share(fraction: float) -> str:
    """A fraction as a percentage: two decimals, four next to none and all, and "<" or ">" where four do not suffice."""
    if math.isnan(fraction):
        return ""
    percent = 100 * fraction
    if percent in (0, 100):
        return f"{percent:.0f}%"
    if 0.01 <= percent <= 99.99:
        return f"{percent:.2f}%"
    if percent < 0.00005:
        return "<0.0001%"
    if percent > 99.99995:
        return ">99.9999%"
    return f"{percent:.4f}%"


def duration(seconds: float) -> str:
    """A time in the unit people would say it in, three digits: 24.5 µs, 78.8 ms, 1.23 s, 12.5 min, 3.4 h."""
    if math.isnan(seconds):
        return ""
    for unit, size, limit in (("µs", 1e-6, 1e-3), ("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200)):
        if seconds < limit:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 3600)} h"


def _three(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """`1 draw`, `10 draws`."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
