"""Numbers that go wrong: what was found and done about it, and the first step whose loss is not finite."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsq.distributed import ALONE, Group
from zsq.errors import JobError

AGAIN = "The same command with --force and another value goes on from the images."


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with the numbers of a run and did not end it.

    Attributes:
        stage: of the run, as in its timings.
        layer: name of the layer, the tensor or the network.
        what: was found, half a sentence about `layer`.
        done: about it, half a sentence.
    """

    stage: str
    layer: str
    what: str
    done: str

    def __str__(self) -> str:
        return f"{self.stage}, {self.layer}: {self.what}; {self.done}."


class Watch:
    """The first step of a loop whose loss is not finite, kept on the device until it is asked for.

    Args:
        of: what the loop does, as a user knows it: "The synthesis of images".
        advice: which settings to try.
        steps: of the loop.
        device: where the losses are.
        where: which part of it, "batch 2 of 3"; "" for all of it.
        group: processes that run the loop together, each with a loss of its own.
    """

    def __init__(
        self,
        of: str,
        advice: str,
        *,
        steps: int,
        device: torch.device,
        where: str = "",
        group: Group = ALONE,
    ) -> None:
        self._of, self._advice, self._steps, self._group = of, advice, steps, group
        self._where = f" in {where}" if where else ""
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def see(self, step: int | Tensor, losses: Iterable[Tensor]) -> None:
        """Take notice of the losses (scalars) of a step (0-based); nothing waits for the device."""
        for loss in losses:
            broken = (self._first < 0) & ~loss.detach().isfinite()
            self._first.copy_(torch.where(broken, step, self._first))

    def first(self) -> int | None:
        """The first step (from 1) whose loss was not finite in any of the processes; waits for the device."""
        found = torch.stack([self._first >= 0, self._first * (self._first >= 0)]).double()
        self._group.add([found])
        count, total = found.tolist()
        return int(total // count) + 1 if count else None  # processes have it in the same step, or the next

    def check(self) -> None:
        """Called where the loss is logged; waits for the device.

        Raises:
            JobError: a loss was not finite, in any of the processes.
        """
        step = self.first()
        if step is not None:
            raise JobError(
                f"{self._of} diverged{self._where}: from step {step} of {self._steps} on the loss is NaN "
                f"or infinity. In a run folder what was finished before is kept. {self._advice}"
            )
