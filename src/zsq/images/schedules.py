"""Learning rates of image optimisation, kept on the device so that no step waits for it."""

import math

import torch
from torch import Tensor

from zsq.errors import JobError
from zsq.images.look_settings import Cosine
from zsq.images.settings import Refinement, Synthesis
from zsq.images.sources import LatentGenerator
from zsq.replay import can_record

LOGS_A_BATCH = 20
WINDOW = 50  # steps over which the loss is averaged to see whether it still falls
PLATEAU_THRESHOLD = 1e-4  # relative fall of the loss that counts as progress


class Plateau:
    """A learning rate that falls when the loss stops falling, kept on the device so that no step waits.

    The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau` (mode "min", relative threshold, no cooldown).

    Args:
        lr: at the start.
        factor: of the learning rate when it falls.
        patience: steps without progress that are waited for.
        lowest: the learning rate never falls below it, unless it starts there.
        device: where the losses are.

    Attributes:
        lr: the learning rate, a scalar tensor that `step` overwrites.
    """

    def __init__(
        self, lr: float, *, factor: float, patience: int, lowest: float, device: torch.device
    ) -> None:
        self._factor, self._min, self._patience = factor, lowest, patience
        self.lr = torch.tensor(lr, device=device)
        self._best = torch.tensor(torch.inf, device=device)
        self._waited = torch.zeros((), device=device)

    def step(self, loss: Tensor) -> None:
        """Take notice of the loss (scalar, detached) of one optimizer step."""
        better = loss < self._best * (1 - PLATEAU_THRESHOLD)
        self._best.copy_(torch.where(better, loss, self._best))
        waited = torch.where(better, 0.0, self._waited + 1)
        reduce = waited > self._patience
        lower = torch.minimum(self.lr, (self.lr * self._factor).clamp(min=self._min))
        self.lr.copy_(torch.where(reduce, lower, self.lr))
        self._waited.copy_(torch.where(reduce, 0.0, waited))


class Annealing:
    """A learning rate that rises linearly and falls along half a cosine, in each of some rounds.

    In step k of a round of n steps, w of them in the warm-up: lr (k + 1) / w, then
    lr (1 + cos(pi (k - w) / (n - w))) / 2. A last round that is cut short is as long as the others.

    Args:
        lr: the highest.
        settings: rounds and warm-up.
        steps: of all rounds.
        device: where `lr` is kept.

    Attributes:
        lr: the learning rate, a scalar tensor that `step` overwrites.

    Source: PSAQ-ViT's code (see arXiv:2203.02250).
    """

    def __init__(self, lr: float, settings: Cosine, *, steps: int, device: torch.device) -> None:
        self._highest, self._count = lr, 0
        self.length = math.ceil(steps / settings.rounds)
        self._warmup = round(settings.warmup * self.length)
        self.lr = torch.tensor(self._at(0), device=device)

    def step(self, _: Tensor) -> None:
        """Go on to the next step; the loss does not matter."""
        self._count += 1
        self.lr.fill_(self._at(self._count % self.length))

    def _at(self, step: int) -> float:
        if step < self._warmup:
            return self._highest * (step + 1) / self._warmup
        share = (step - self._warmup) / (self.length - self._warmup)
        return self._highest * (1 + math.cos(math.pi * share)) / 2


class Convergence:
    """Tells when a loss has stopped falling, by the mean of a window of steps and of the one before it.

    Args:
        share: by which the mean has to fall from window to window; 0 for any loss to count as falling.
    """

    def __init__(self, share: float) -> None:
        self._share, self._sum, self._before = share, torch.zeros(()), math.inf

    def reached(self, step: int, loss: Tensor) -> bool:
        """Take notice of the loss (scalar, detached) of a step; waits for the device once a window."""
        if self._share == 0:
            return False
        self._sum = self._sum.to(loss.device) + loss
        if (step + 1) % WINDOW:
            return False
        mean = float(self._sum) / WINDOW
        ended = mean >= self._before * (1 - self._share)
        self._before, self._sum = mean, torch.zeros_like(self._sum)
        return ended


def cooling(step: int, settings: Synthesis) -> float:
    """Factor of both learning rates at a step (0-based): 1, and from there linearly to 0 at `steps`."""
    length = settings.cooldown * settings.steps
    return min(1.0, (settings.steps - step) / length) if length else 1.0


def generator_rates(settings: Synthesis | Refinement, *, interval: int) -> list[float]:
    """The generator's learning rate in steps 0 .. `steps`, before any cooling: lower after each interval."""
    rates = [settings.lr_generator]
    for step in range(settings.steps):
        rates.append(rates[-1] * (settings.generator_decay if (step + 1) % interval == 0 else 1.0))
    return rates


def schedule(settings: Synthesis) -> tuple[int, int]:
    """Patience of the latents' learning rate and decay interval of the generator's, in steps.

    As set, or in proportion to the steps if there are fewer than `schedule_steps`.
    """
    share = min(1.0, settings.steps / settings.schedule_steps) if settings.schedule_steps else 1.0
    patience, interval = settings.plateau_patience, settings.generator_decay_interval
    return max(1, round(patience * share)), max(1, round(interval * share))


def latent_optimizer(
    latents: Tensor, generator: LatentGenerator, settings: Synthesis | Refinement, *, patience: int
) -> tuple[torch.optim.Adam, Plateau]:
    """Adam for latents (group 0) and their generator (group 1), with the plateau of the former's rate.

    Args:
        latents: leaf, (N, L).
        generator: trained with them.
        settings: learning rates and their plateau.
        patience: of the plateau, in steps.
    """
    plateau = Plateau(
        settings.lr_latent,
        factor=settings.plateau_factor,
        patience=patience,
        lowest=settings.lr_latent_min,
        device=latents.device,
    )
    groups = [
        {"params": [latents], "lr": plateau.lr},  # read anew in every step
        {"params": list(generator.parameters()), "lr": settings.lr_generator},
    ]
    return torch.optim.Adam(groups, fused=True, capturable=can_record(latents.device)), plateau


def check_finite(images: Tensor, stage: str, advice: str) -> None:
    """Refuse images with NaN or infinite pixels.

    Args:
        images: any shape.
        stage: what made them, as a user knows it.
        advice: which settings to try.

    Raises:
        JobError: so.
    """
    if not images.isfinite().all():
        raise JobError(f"The {stage} of images diverged: some pixels are not finite. {advice}")
