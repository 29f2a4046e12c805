"""Amounts as people read them."""

from collections.abc import Mapping
from typing import Any


def seconds_text(seconds: float) -> str:
    """0.42 -> "0.4 s", 42.3 -> "42 s", 200 -> "3 min 20 s", 7300 -> "2 h 1 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def bytes_text(count: float) -> str:
    """1234 -> "1.2 kB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def drop_text(drop: Mapping[str, Any]) -> str:
    """An estimate in words: "2.1 points (0.0 to 5.3)"."""
    return f"{drop['points']:.1f} points ({drop['low']:.1f} to {drop['high']:.1f})"


def drop_error_text(drop: Mapping[str, Any]) -> str:
    """How wrong such estimates were, in words."""
    known = drop["known_error"]
    return (
        f"an estimate: on {known['networks']} networks that the fit did not see it was off by "
        f"{known['mean_absolute_error']:.1f} points on average, by {known['of_drops_below_15']:.1f} where "
        f"fewer than 15 were lost, and {known['interval_covered']:.0f} % of {known['rows']} rows were in the "
        "interval"
    )
