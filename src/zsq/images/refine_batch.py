"""One batch of a refinement: its latents and a copy of its generator, trained further against a student."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq.health import Watch
from zsq.images.batches import Batch
from zsq.images.forward import ForwardPass, Observer
from zsq.images.gradients import Gradients, Probe, detached, directions, diversity, gradient_match
from zsq.images.neighbours import find_neighbours, to_edge
from zsq.images.schedules import LOGS_A_BATCH, check_finite, generator_rates, latent_optimizer
from zsq.images.settings import Refinement
from zsq.images.synthesis_loss import SynthesisLoss
from zsq.images.views import Shifts, draw_shifts
from zsq.kernels import computing_in
from zsq.replay import Course, can_record, replayed

SMALLEST_LOSS = 1e-6  # that another is divided by
HOLD_EXPONENT = 4.0  # of the ratio of a held loss to its start, by which its weight changes in a step
LARGEST_HOLD = 1e4  # weight of a held loss, in that with which it begins

Step = Callable[[Tensor | None, Shifts | None], dict[str, Tensor]]


@dataclass(frozen=True)
class RefinementLoss:
    """What a refinement asks of a batch: three parts, each with its weight.

    "bn" is the loss of synthesis on the images, see `Refinement.swing`, in which images that differ in their
    looks are held to what they have of them; "match" is `gradient_match` with the neighbours that the same
    generator makes of latents at `radius`; "diversity" is that of the batch and the bank.

    Attributes:
        settings: weights, radius, and how neighbours are found.
        objective: the loss of synthesis.
        observer: of the teacher, with logits, or of a swinging view of it, which need not have them.
        probe: gradients that images give a frozen student.
        bank: directions of finished images, without history; None if there are none.
        latents: (N, L).
        generator: of images from latents.

    Source: SADAG (arXiv:2510.07018) and its code.
    """

    settings: Refinement
    objective: SynthesisLoss
    observer: Observer
    probe: Probe
    bank: Gradients | None
    latents: Tensor
    generator: nn.Module

    def __call__(
        self, bn_weight: Tensor, start: Tensor | None, carried: Tensor | None, shifts: Shifts | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and those parts of it that have a weight, without it.

        Offsets of neighbours are constants; the gradient passes through both members of a pair, and reaches
        offsets that are carried, so that they can follow it.

        Args:
            bn_weight: of the first part.
            start: (N, L), directions in which searches for neighbours start.
            carried: (N, L), the neighbours' offsets, where none are searched for; with neither there are no
                neighbours.
            shifts: of the swinging view; None without.
        """
        settings = self.settings
        parts: dict[str, tuple[float | Tensor, Tensor]] = {}
        forward = self.seen(shifts)
        if settings.bn_weight > 0:
            parts["bn"] = bn_weight, self.objective(forward)[0]
        if is_matching(settings) or settings.diversity_weight > 0:
            own = directions(self.probe(forward.images, forward.logits))
        offsets = carried
        if start is not None:
            latents = self.latents.detach()
            offsets = find_neighbours(latents, self.directions_at, detached(own), settings, start)
        if offsets is not None:
            others = self.directions_at(self.latents + offsets)
            match = gradient_match(own, others, focus=settings.match_focus)
            parts["match"] = settings.match_weight, match
        if settings.diversity_weight > 0:
            spread = diversity(own, self.bank, threshold=settings.diversity_threshold)
            parts["diversity"] = settings.diversity_weight, spread
        loss = torch.stack([weight * part for weight, part in parts.values()]).sum()
        return loss, {name: part for name, (_, part) in parts.items()}

    def seen(self, shifts: Shifts | None) -> ForwardPass:
        """What the teacher makes of the images as they are now."""
        return self.observer(self.images_at(self.latents), *(() if shifts is None else (shifts,)))

    def images_at(self, latents: Tensor) -> Tensor:
        """(N, C, H, W), normalised, of latents (N, L)."""
        with computing_in(self.objective.settings.precision, latents.device):
            images = self.objective.image.prior.apply(self.generator(latents))
        return images.contiguous(memory_format=torch.channels_last)

    def directions_at(self, latents: Tensor) -> Gradients:
        """Of the gradients that images of latents (N, L) give the student."""
        return directions(self.probe(self.images_at(latents), None))


def held(weight: Tensor, lightest: Tensor, loss: Tensor, start: Tensor) -> Tensor:
    """The next weight of a loss that is not to rise above `start`; all are scalars.

    It is the weight times (loss / start)^4, between `lightest` and ten thousand times that: of a loss that is
    a tenth too high, the weight doubles in two steps.
    """
    found = weight * (loss / start) ** HOLD_EXPONENT
    return found.clamp(min=lightest, max=LARGEST_HOLD * lightest)


def is_matching(settings: Refinement) -> bool:
    """Whether gradients are to be like those of neighbours."""
    return settings.match_weight > 0 and settings.radius > 0


def refine_batch(
    observer: Observer,
    probe: Probe,
    batch: Batch,
    settings: Refinement,
    objective: SynthesisLoss,
    *,
    bank: Gradients | None,
    rng: torch.Generator,
    log: Callable[[int, dict[str, float]], None],
    num_swinging: int = 0,
    where: str = "",
) -> tuple[Batch, Gradients]:
    """Train a copy of a batch's latents and generator further, on `RefinementLoss`.

    Offsets that are carried on start in random directions and follow the slope of each step's loss
    (`to_edge`).

    Args:
        observer: of the teacher, with logits, or of a swinging view of it, which need not have them.
        probe: gradients with respect to a frozen student.
        batch: left as it is.
        settings: see `refine`.
        objective: the loss of synthesis.
        bank: directions of finished images, without history; None if there are none.
        rng: on the CPU; draws the starts of the neighbour searches, and shifts.
        log: called as log(step, values) about 20 times.
        num_swinging: convolutions of the view, 0 for the teacher as it is.
        where: how to call the batch in an error.

    Returns:
        the batch after the last step, and the directions of its images.

    Raises:
        JobError: the optimisation diverged.
    """
    latents = batch.latents.clone().requires_grad_()
    device = latents.device
    generator = copy.deepcopy(batch.generator).requires_grad_(True)
    loss_of = RefinementLoss(settings, objective, observer, probe, bank, latents, generator)
    parameters = [latents, *generator.parameters()]
    optimizer, plateau = latent_optimizer(latents, generator, settings, patience=settings.plateau_patience)
    advice = (
        f"Try a smaller refinement.lr_latent (now {settings.lr_latent}) or refinement.lr_generator (now "
        f"{settings.lr_generator})."
    )
    watch = Watch("The refinement of images", advice, steps=settings.steps, device=device, where=where)

    def starts() -> Tensor:
        """Where neighbour searches start; a draw for every step that searches, or one for all."""
        return torch.randn(latents.shape, generator=rng)

    carried = None
    if is_matching(settings) and settings.neighbour == "carried":
        carried = (settings.radius * F.normalize(starts().to(device), dim=1)).requires_grad_()
        parameters.append(carried)
    searching = is_matching(settings) and carried is None
    bn_weight, bn_start = torch.tensor(settings.bn_weight, device=device), None
    if (settings.bn_relative or settings.bn_hold) and settings.bn_weight > 0:
        with torch.no_grad():
            first, _ = objective(loss_of.seen([[0, 0]] * num_swinging if num_swinging else None))
            bn_start = first.clamp(min=SMALLEST_LOSS)
        bn_weight = bn_weight / bn_start if settings.bn_relative else bn_weight
    lightest = bn_weight.clone()

    def learn(start: Tensor | None, shifts: Shifts | None) -> dict[str, Tensor]:
        loss, parts = loss_of(bn_weight, start, carried, shifts)
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        plateau.step(loss.detach())
        if settings.bn_hold and bn_start is not None:
            bn_weight.copy_(held(bn_weight, lightest, parts["bn"].detach(), bn_start))
        if carried is not None and carried.grad is not None:
            with torch.no_grad():  # the loss rises where neighbours become less similar
                carried.copy_(to_edge(carried.grad, settings.radius, otherwise=carried))
            carried.grad = None
        return {"loss": loss, **parts}

    asked = settings.bn_weight > 0 or is_matching(settings) or settings.diversity_weight > 0
    steps = settings.steps if asked else 0
    rates, of_generator = generator_rates(settings, interval=settings.generator_decay_interval), 1
    recorded = None
    if can_record(device) and steps:
        drawn = {"starts": torch.stack([starts() for _ in range(steps)])} if searching else {}
        if num_swinging:
            drawn["shifts"] = torch.tensor([draw_shifts(num_swinging, rng) for _ in range(steps)])
        course = Course(device, rates=torch.tensor(rates), **drawn)
        recorded = _recorded(learn, course, optimizer.param_groups[of_generator], watch, device)
    log_every = math.ceil(settings.steps / LOGS_A_BATCH)
    for step in range(steps):
        if recorded is not None:
            values = recorded()
        else:
            optimizer.param_groups[of_generator]["lr"] = rates[step]
            start = starts().to(device) if searching else None
            values = learn(start, draw_shifts(num_swinging, rng) if num_swinging else None)
            watch.see(step, [values["loss"]])
        if step % log_every == 0 or step == settings.steps - 1:
            watch.check()
            log(step, {name: value.item() for name, value in values.items()})
    with torch.no_grad():
        images = loss_of.images_at(latents)
        found = directions(probe(images, None))
    check_finite(images, "refinement", advice)
    made = Batch(
        images.contiguous(), latents.detach(), generator.requires_grad_(False), batch.labels, batch.second
    )
    return made, found


def _recorded(
    learn: Step, course: Course, of_generator: dict[str, Tensor | float], watch: Watch, device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    """The steps of `refine_batch`, with all that changes from one to the next on the device."""
    rate = of_generator["lr"] = torch.zeros((), device=device)

    def learn_next(row: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
        rate.copy_(row["rates"])
        values = learn(row.get("starts"), row.get("shifts"))
        watch.see(step, [values["loss"]])
        return values

    return replayed(learn_next, course, device)
