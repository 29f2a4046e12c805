"""How far a fine-tuning has come."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

RETREAT = 3.0  # by which the learning rate is divided after an epoch that was undone


@dataclass(frozen=True)
class Standing:
    """How far a fine-tuning has come; kept with the trainee's state after every epoch.

    Attributes:
        epochs: that are finished.
        retreats: how often an epoch was undone.
        began: losses of minibatches before training; none with a generator.
        first: mean loss by part of the first finished epoch.
        last: of the last one.
    """

    epochs: int = 0
    retreats: int = 0
    began: tuple[float, ...] = ()
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied by."""
        return RETREAT**-self.retreats

    def after(self, means: dict[str, float]) -> "Standing":
        """With one epoch more."""
        return replace(self, epochs=self.epochs + 1, first=self.first or means, last=means)

    def tensors(self) -> dict[str, Tensor]:
        """What `read` takes."""
        losses = {f"first.{name}": value for name, value in self.first.items()}
        losses |= {f"last.{name}": value for name, value in self.last.items()}
        return {
            "epochs": torch.tensor(self.epochs),
            "retreats": torch.tensor(self.retreats),
            "began": torch.tensor(self.began, dtype=torch.float64),
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()},
        }

    @classmethod
    def read(cls, piece: Mapping[str, Tensor]) -> "Standing":
        """What `tensors` gave, among others."""

        def losses(of: str) -> dict[str, float]:
            names = sorted((name for name in piece if name.startswith(of)), key=lambda n: n != f"{of}loss")
            return {name.removeprefix(of): float(piece[name]) for name in names}

        began = tuple(piece["began"].tolist())
        return cls(int(piece["epochs"]), int(piece["retreats"]), began, losses("first."), losses("last."))
