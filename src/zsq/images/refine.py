"""Refine synthetic images against a student: gradients that hold in the neighbourhood of every image."""

import copy
import math
from collections.abc import Callable, Iterable, MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq.graph.tensors import device_of
from zsq.health import Watch
from zsq.images.batches import Batch, is_complete, piece_of
from zsq.images.forward import ForwardPass, Observer, observe
from zsq.images.gradients import (
    Gradients,
    Probe,
    detached,
    directions,
    diversity,
    gradient_match,
    joined,
)
from zsq.images.neighbours import find_neighbours, to_edge
from zsq.images.prior import STANDARD, InputPrior
from zsq.images.schedules import LOGS_A_BATCH, check_finite, generator_rates, latent_optimizer
from zsq.images.settings import Refinement, Synthesis
from zsq.images.synthesis_loss import SynthesisLoss, needs, synthesis_loss
from zsq.images.variety import looks_of
from zsq.images.views import Shifts, draw_shifts, swing
from zsq.kernels import computing_in
from zsq.replay import Course, Replay, can_record
from zsq.rng import rng_for

SMALLEST_LOSS = 1e-6  # that another is divided by

Finished = MutableMapping[str, dict[str, Tensor]]
Log = Callable[[str, int, dict[str, float]], None]


def refine(
    teacher: fx.GraphModule,
    probe: Probe,
    batches: Iterable[Callable[[], Batch]],
    settings: Refinement,
    synthesis: Synthesis,
    *,
    seed: int,
    finished: Finished,
    log: Log,
    prior: InputPrior | None = None,
    keep_sources: bool = False,
) -> Tensor:
    """Refine batch after batch; each sees the gradients of the images finished before it.

    Args:
        teacher: captured network with its BatchNorm layers; untouched.
        probe: gradients with respect to a frozen student, from `gradient_probe`.
        batches: what synthesis made, in order; a batch is asked for when it is its turn.
        settings: how.
        synthesis: how the batches were made: precision of the generators, weights of the losses. Teacher and
            student run in float32: in bfloat16 the slope of the match points elsewhere (cosine 0.25 with that
            of float32, cifar100_resnet20s, W2A4).
        seed: batch k draws from the stream ("refinement", k) of it.
        finished: images and directions of finished batches by name; those found there are taken over, others
            added.
        log: called as log(batch name, step, values) a few times a batch.
        prior: as synthesis had it.
        keep_sources: keep latents and generators in `finished` too, for another refinement; a finished batch
            without them is made again.

    Returns:
        (num_images, C, H, W), normalised, float32, on the CPU.

    Raises:
        UsageError: the teacher has no BatchNorm, and the loss of synthesis has a weight.
        JobError: the optimisation diverged.
    """
    images: list[Tensor] = []
    bank: Gradients | None = None
    device = device_of(teacher)
    needed = needs(synthesis)
    observer, num_swinging = observe(teacher, **(needed | {"logits": True})), 0
    if settings.swing:
        view, num_swinging = swing(teacher)
        observer = observe(view, fold=True, **needed) if num_swinging else observer
    for index, batch in enumerate(batches):
        name = refined_name(index)
        piece = finished.get(name)
        if piece is None or not is_complete(piece, keep_sources):
            made, rng = batch(), rng_for(seed, "refinement", index)
            expected = prior or STANDARD
            objective = synthesis_loss(
                teacher,
                synthesis,
                expected,
                looks=None if synthesis.variety is None else looks_of(made.images, expected),
                labels=made.labels,
                second=made.second,
                rng=rng,
            )
            result, found = refine_batch(
                observer,
                probe,
                made,
                settings,
                objective,
                bank=bank,
                num_swinging=num_swinging,
                rng=rng,
                log=lambda step, values, name=name: log(name, step, values),  # type: ignore[misc]
                where=f"batch {index + 1}",
            )
            piece = finished[name] = piece_of(result, keep_source=keep_sources) | _named(found)
        images.append(piece["images"])
        bank = _remembered(bank, _gradients(piece, device), settings.bank_size)
    return torch.cat(images)


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
    """Train a copy of a batch's latents and generator further.

    Loss, each part with its weight: that of synthesis on the images, see `Refinement.swing`, in which images
    that differ in their looks are held to what they have of them;
    `gradient_match` with the neighbours that the same generator makes of latents at `radius`; `diversity`.
    The neighbours' offsets are constants, the gradient passes through both members of a pair; those that are
    carried on start in random directions and follow the slope of each step's loss (`to_edge`).

    Args:
        observer: of the teacher, with logits, or of a swinging view of it, which need not have them.
        probe: see `refine`.
        batch: left as it is.
        settings: see `refine`.
        objective: the loss of synthesis.
        bank: directions of finished images, without history; None if there are none.
        rng: on the CPU; draws the starts of the neighbour searches.
        log: called as log(step, values) about 20 times.
        num_swinging: convolutions of the view, 0 for the teacher as it is.
        where: how to call the batch in an error.

    Returns:
        the batch after the last step, and the directions of its images.

    Raises:
        JobError: the optimisation diverged.

    Source: SADAG (arXiv:2510.07018) and its code.
    """
    latents = batch.latents.clone().requires_grad_()
    device, prior = latents.device, objective.image.prior
    generator = copy.deepcopy(batch.generator).requires_grad_(True)
    parameters = [latents, *generator.parameters()]
    optimizer, plateau = latent_optimizer(latents, generator, settings, patience=settings.plateau_patience)
    reduced = computing_in(objective.settings.precision, device)

    def images_at(point: Tensor) -> Tensor:
        with reduced:
            images = prior.apply(generator(point))
        return images.contiguous(memory_format=torch.channels_last)

    def directions_at(point: Tensor) -> Gradients:
        return directions(probe(images_at(point), None))

    matching = settings.match_weight > 0 and settings.radius > 0
    log_every = math.ceil(settings.steps / LOGS_A_BATCH)
    advice = (
        f"Try a smaller refinement.lr_latent (now {settings.lr_latent}) or refinement.lr_generator (now "
        f"{settings.lr_generator})."
    )
    watch = Watch("The refinement of images", advice, steps=settings.steps, device=device, where=where)
    rates = generator_rates(settings, interval=settings.generator_decay_interval)

    def starts() -> Tensor:
        """Where neighbour searches start; a draw for every step that searches, or one for all."""
        return torch.randn(latents.shape, generator=rng)

    carried = None
    if matching and settings.neighbour == "carried":
        carried = (settings.radius * F.normalize(starts().to(device), dim=1)).requires_grad_()
    searching = matching and carried is None

    def seen(shifts: Shifts | None) -> ForwardPass:
        return observer(images_at(latents), *(() if shifts is None else (shifts,)))

    bn_weight: float | Tensor = settings.bn_weight
    if settings.bn_relative and settings.bn_weight > 0:
        with torch.no_grad():
            first, _ = objective(seen([[0, 0]] * num_swinging if num_swinging else None))
            bn_weight = settings.bn_weight / first.clamp(min=SMALLEST_LOSS)

    def learn(start: Tensor | None, shifts: Shifts | None) -> dict[str, Tensor]:
        parts: dict[str, tuple[float | Tensor, Tensor]] = {}
        forward = seen(shifts)
        if settings.bn_weight > 0:
            parts["bn"] = bn_weight, objective(forward)[0]
        if matching or settings.diversity_weight > 0:
            own = directions(probe(forward.images, forward.logits))
        offsets = carried
        if start is not None:
            offsets = find_neighbours(latents.detach(), directions_at, detached(own), settings, start)
        if offsets is not None:
            match = gradient_match(own, directions_at(latents + offsets), focus=settings.match_focus)
            parts["match"] = settings.match_weight, match
        if settings.diversity_weight > 0:
            spread = diversity(own, bank, threshold=settings.diversity_threshold)
            parts["diversity"] = settings.diversity_weight, spread
        loss = torch.stack([weight * part for weight, part in parts.values()]).sum()
        optimizer.zero_grad()
        loss.backward(inputs=parameters if carried is None else [*parameters, carried])
        optimizer.step()
        plateau.step(loss.detach())
        if carried is not None and carried.grad is not None:
            with torch.no_grad():  # the loss rises where neighbours become less similar
                carried.copy_(to_edge(carried.grad, settings.radius, otherwise=carried))
            carried.grad = None
        return {"loss": loss, **{name: part for name, (_, part) in parts.items()}}

    of_generator = optimizer.param_groups[1]
    names: list[str] = []
    recorded = None
    steps = settings.steps if settings.bn_weight > 0 or matching or settings.diversity_weight > 0 else 0
    if can_record(device) and steps:
        drawn = {"starts": torch.stack([starts() for _ in range(steps)])} if searching else {}
        if num_swinging:
            drawn["shifts"] = torch.tensor([draw_shifts(num_swinging, rng) for _ in range(steps)])
        course = Course(device, rates=torch.tensor(rates), **drawn)
        of_generator["lr"] = torch.zeros((), device=device)

        def learn_next() -> tuple[Tensor, ...]:
            row = course.row()
            of_generator["lr"].copy_(row["rates"])
            losses = learn(row.get("starts"), row.get("shifts"))
            names[:] = losses
            watch.see(course.step, [losses["loss"]])
            course.advance()
            return tuple(losses.values())

        recorded = Replay(learn_next, device)
    for step in range(steps):
        if recorded is not None:
            losses = recorded()
            values = dict(zip(names, losses, strict=True))
        else:
            of_generator["lr"] = rates[step]
            start = starts().to(device) if searching else None
            values = learn(start, draw_shifts(num_swinging, rng) if num_swinging else None)
            watch.see(step, [values["loss"]])
        if step % log_every == 0 or step == settings.steps - 1:
            watch.check()
            log(step, {name: value.item() for name, value in values.items()})
    with torch.no_grad():
        images = images_at(latents)
        found = directions(probe(images, None))
    check_finite(images, "refinement", advice)
    made = Batch(
        images.contiguous(), latents.detach(), generator.requires_grad_(False), batch.labels, batch.second
    )
    return made, found


def refined_name(index: int) -> str:
    """Under which a refined batch is kept once it is finished."""
    return f"refined-{index:03d}"


def _remembered(bank: Gradients | None, new: Gradients, size: int) -> Gradients | None:
    """The bank with the directions of another batch, at most `size` of them; None if it is empty."""
    found = new if bank is None else joined([bank, new])
    if size == 0:
        return None
    return tuple(tuple(factor[-size:].clone() for factor in piece) for piece in found)


def _named(gradients: Gradients) -> dict[str, Tensor]:
    return {
        f"direction.{piece}.{factor}": tensor
        for piece, factors in enumerate(gradients)
        for factor, tensor in enumerate(factors)
    }


def _gradients(piece: dict[str, Tensor], device: torch.device) -> Gradients:
    """What `_named` was given."""
    found: list[list[Tensor]] = []
    keys = (tuple(map(int, key.split(".")[1:])) for key in piece if key.startswith("direction."))
    for index, factor in sorted(keys):
        if factor == 0:
            found.append([])
        found[index].append(piece[f"direction.{index}.{factor}"].to(device))
    return tuple(tuple(factors) for factors in found)
