"""Progress of a run: one small record, handed to one callback."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: "centres" (one image a class, of which others take targets), "synthesize", "warm-up" (of the
            student that images are refined against), "refine", "reconstruct", "fine-tune", "holdout" (images
            that only serve to estimate) or "evaluate".
        item: what is being worked on, e.g. "batch 2 of 3" or a unit's name.
        done, total: optimizer steps (or images) of the stage; the time left follows from their rate.
        values: numbers worth showing, such as a loss.
        resumed: the item was taken over from an earlier, interrupted run.
    """

    stage: str
    item: str
    done: int
    total: int
    values: dict[str, float] = field(default_factory=dict)
    resumed: bool = False


Callback = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The callback that does nothing."""


def unit_log(
    report: Callback, stage: str, units: Sequence[str], steps: int, resumed: Collection[str]
) -> Callable[[str, int, int, dict[str, float]], None]:
    """A `log` for `zsq.recover.reconstruct`: log(unit, step, steps, values) becomes a Progress.

    Args:
        report: called with it.
        stage: its stage.
        units: names, in the order in which they are learned.
        steps: of a unit.
        resumed: names of the units that are taken over.
    """
    position = {name: index for index, name in enumerate(units)}

    def log(unit: str, step: int, _: int, values: dict[str, float]) -> None:
        done = position[unit] * steps + (step + 1 if step >= 0 else steps)
        report(Progress(stage, unit, done, len(position) * steps, values, unit in resumed))

    return log
