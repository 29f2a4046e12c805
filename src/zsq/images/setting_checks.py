"""Checks that settings of several stages share; each refuses with the setting's full name."""

from zsq.errors import UsageError


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
