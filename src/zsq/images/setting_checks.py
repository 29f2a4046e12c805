"""Checks that settings of several stages share; each refuses with the setting's full name."""

from typing import Literal, get_args

from zsq.errors import UsageError

# Of the gaps between statistics and those that BatchNorm layers stored. "activations": as they are, as
# published, so that a layer with large activations counts the more. "deviations": divided by the root of the
# mean of the layer's stored variances, so that all layers count alike. "auto": the second where a layer has
# activations so much larger than others that the first would see it alone.
Units = Literal["auto", "activations", "deviations"]


def share_of_second(name: str, share: float) -> None:
    """Refuse what is no share of an image's second class: at most that of its first."""
    if not 0 <= share <= 0.5:
        raise UsageError(f"{name} is {share}. Expected 0 to 0.5, the share of the second of two classes.")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check a setting that is one of several texts.

    Raises:
        UsageError: it is none of them.
    """
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}. Expected {', '.join(allowed[:-1])} or {allowed[-1]}.")


def check_units(name: str, units: str) -> None:
    """Check the units of gaps of statistics.

    Raises:
        UsageError: there are none of that name.
    """
    one_of(name, units, get_args(Units))


def at_least(lowest: int, stage: str, settings: object, names: tuple[str, ...]) -> None:
    """Check numbers of a stage's settings against a lowest value.

    Raises:
        UsageError: one is below it, or not a number.
    """
    for name in names:
        if not getattr(settings, name) >= lowest:
            raise UsageError(f"{stage}.{name} is {getattr(settings, name)}. Expected at least {lowest}.")


def plateau_factor(stage: str, factor: float) -> None:
    """Check the factor by which a learning rate falls.

    Raises:
        UsageError: it is not between 0 and 1.
    """
    if not 0 < factor < 1:
        raise UsageError(f"{stage}.plateau_factor is {factor}. Expected a number between 0 and 1.")
