"""Synthesise images: train latents and a generator until the teacher's statistics are met, batch by batch."""

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from zsq.distributed import ALONE, Group, spread
from zsq.graph.tensors import device_of
from zsq.health import Watch
from zsq.images.batches import (
    Batch,
    Log,
    batch_names,
    batch_sizes,
    generator_state,
    is_complete,
    log_batch,
    piece_of,
    room_advice,
)
from zsq.images.class_losses import classes_by_batch
from zsq.images.forward import observe
from zsq.images.prior import STANDARD, InputPrior
from zsq.images.schedules import (
    LOGS_A_BATCH,
    Convergence,
    check_finite,
    cooling,
    generator_rates,
    latent_optimizer,
    schedule,
)
from zsq.images.settings import Synthesis
from zsq.images.sources import LatentGenerator
from zsq.images.synthesis_loss import needs, synthesis_loss
from zsq.images.variety import draw_looks
from zsq.images.views import Shifts, draw_shifts, swing
from zsq.kernels import computing_in, reproducible
from zsq.out_of_memory import no_room
from zsq.replay import Course, can_record, replayed
from zsq.rng import rng_for

Finished = MutableMapping[str, dict[str, Tensor]]


def synthesize(
    teacher: fx.GraphModule,
    settings: Synthesis,
    input_size: tuple[int, int, int],
    *,
    seed: int,
    finished: Finished,
    log: Log,
    prior: InputPrior | None = None,
    group: Group = ALONE,
    keep_sources: bool = False,
) -> Tensor:
    """Images in batches that know nothing of one another; each has its own stream of `seed`.

    With `settings.reuse_steps` all batches start from the generator of the first one; they still know nothing
    of each other and can be made in any order after it. With classes, all images together have each class
    equally often, and so has every batch.

    Args:
        teacher: captured network with its BatchNorm layers, on the device to compute on; untouched.
        settings: how many, and how.
        input_size: (C, H, W) of the teacher's images.
        seed: batch k draws from the stream ("synthesis", k) of it, so batches can be made in any order.
        finished: {"images", and with classes "labels", (N,) int64} of finished batches by name; those found
            there are taken over, others added. With `reuse_steps`, the first one's also has its latents and
            the parameters of its generator.
        log: called as log(batch name, step, steps, values) a few times a batch.
        prior: mean and deviation that the images start from and are held to; None for 0 and 1.
        group: processes that make a batch each at a time; all get all images, the same bits whatever their
            number.
        keep_sources: keep latents and generator in `finished` too, for `batch_from_piece`; a finished batch
            without them is made again.

    Returns:
        (num_images, C, H, W), normalised, float32, on the CPU.

    Raises:
        UsageError: the teacher has none of the BatchNorm layers or classes that the settings ask for.
        JobError: the optimisation diverged.
    """
    sizes = batch_sizes(settings.num_images, settings.batch_size)
    names = batch_names(settings)
    parts, seconds = classes_by_batch(teacher, settings.classes, sizes, seed)

    advice = room_advice(settings)

    def make(index: int) -> dict[str, Tensor]:
        follows = settings.reuse_steps > 0 and index > 0
        own = replace(settings, steps=settings.reuse_steps) if follows else settings
        with no_room(advice), reproducible(device_of(teacher), rounded=True):
            batch = synthesize_batch(
                teacher,
                own,
                input_size,
                sizes[index],
                labels=parts[index],
                second=seconds[index],
                rng=rng_for(seed, "synthesis", index),
                log=partial(log_batch, log, names[index], own.steps),
                prior=prior,
                start=generator_state(finished[names[0]]) if follows else None,
                where=f"batch {index + 1} of {len(names)}",
            )
        return piece_of(batch, keep_source=keep_sources or (settings.reuse_steps > 0 and index == 0))

    def complete(piece: Mapping[str, Tensor]) -> bool:
        return is_complete(piece, keep_sources)

    if settings.reuse_steps:
        spread(names[:1], make, finished, group, complete)
    spread(names, make, finished, group, complete)
    return torch.cat([finished[name]["images"] for name in names])


def synthesize_batch(
    teacher: fx.GraphModule,
    settings: Synthesis,
    input_size: tuple[int, int, int],
    num_images: int,
    *,
    rng: torch.Generator,
    log: Callable[[int, dict[str, float]], None],
    labels: Tensor | None = None,
    second: Tensor | None = None,
    prior: InputPrior | None = None,
    start: Mapping[str, Tensor] | None = None,
    where: str = "",
) -> Batch:
    """Train latents and a fresh generator together so that the teacher's BatchNorm statistics are reproduced.

    The loss is `SynthesisLoss`. The images are those of the latents and the generator after the last step.

    Args:
        teacher: captured network with its BatchNorm layers, on the device to compute on; untouched.
        settings: of the recipe; `num_images` and `batch_size` are not read.
        input_size: (C, H, W) of the teacher's images.
        num_images: images of this batch.
        rng: on the CPU; draws latents, parameters of the generator, looks, targets of classes and shifts, in
            this order.
        log: called as log(step, values) about 20 times; only then the host waits for the device. The learning
            rates are those of the next step.
        labels: (num_images,), int64; None if the settings ask for no class.
        second: (num_images,), int64; None if they ask for no second class.
        prior: mean and deviation that the images start from and are held to; None for 0 and 1.
        start: state dict of a generator to start from; None for fresh parameters.
        where: how to call the batch in an error.

    Raises:
        UsageError: the teacher has no BatchNorm.
        JobError: the optimisation diverged.

    Source: GENIE-D (arXiv:2212.04780), learning rates as its code applies them (latents 0.1, generator 0.01).
    """
    device = device_of(teacher)
    prior = prior or STANDARD
    latents = torch.randn(num_images, settings.latent_size, generator=rng).to(device).requires_grad_()
    generator = LatentGenerator(input_size, latent_size=settings.latent_size, rng=rng)
    if start is not None:
        generator.load_state_dict(start)
    generator = generator.to(device)
    looks = None
    if settings.variety is not None:
        mean, std = draw_looks(num_images, input_size[0], settings.variety, rng)
        looks = mean.to(device), std.to(device)
    objective = synthesis_loss(teacher, settings, prior, looks=looks, labels=labels, second=second, rng=rng)
    view, num_swinging = swing(teacher)
    observer = observe(view, fold=True, **needs(settings))
    parameters = [latents, *generator.parameters()]
    patience, interval = schedule(settings)
    optimizer, plateau = latent_optimizer(latents, generator, settings, patience=patience)
    reduced = computing_in(settings.precision, device)
    log_every = math.ceil(settings.steps / LOGS_A_BATCH)
    still = [[0, 0]] * num_swinging
    convergence = Convergence(settings.converged)
    advice = (
        f"Try a smaller synthesis.lr_latent (now {settings.lr_latent}) or synthesis.lr_generator (now "
        f"{settings.lr_generator}), or synthesis.precision=float32 (now {settings.precision})."
    )
    watch = Watch("The synthesis of images", advice, steps=settings.steps, device=device, where=where)
    rates = generator_rates(settings, interval=interval)
    factors = [cooling(step, settings) for step in range(settings.steps + 1)]

    def learn(shifts: Shifts) -> dict[str, Tensor]:
        with reduced:
            images = prior.apply(generator(latents))
            forward = observer(images.contiguous(memory_format=torch.channels_last), shifts)
        loss, found = objective(forward)
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        plateau.step(loss.detach())
        return {"loss": loss, **found}

    of_latents, of_generator = optimizer.param_groups
    recorded = None
    if can_record(device):
        drawn = [draw_shifts(num_swinging, rng) for _ in range(settings.steps if settings.swing else 0)]
        course = Course(
            device,
            rates=torch.tensor([factors, [rate * f for rate, f in zip(rates, factors, strict=True)]]).T,
            **({"shifts": torch.tensor(drawn).view(-1, num_swinging, 2)} if drawn else {}),
        )
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros((), device=device)

        def learn_next(row: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
            of_latents["lr"].copy_(plateau.lr * row["rates"][0])
            of_generator["lr"].copy_(row["rates"][1])
            losses = learn(row.get("shifts", still))
            watch.see(step, [losses["loss"]])
            return losses

        recorded = replayed(learn_next, course, device)
    for step in range(settings.steps):
        if recorded is not None:
            losses = recorded()
        else:
            losses = learn(draw_shifts(num_swinging, rng) if settings.swing else still)
            watch.see(step, [losses["loss"]])
            if factors[step + 1] < 1:
                of_latents["lr"] = plateau.lr * factors[step + 1]
            of_generator["lr"] = rates[step + 1] * factors[step + 1]
        ended = convergence.reached(step, losses["loss"].detach())
        if step % log_every == 0 or step == settings.steps - 1 or ended:
            watch.check()
            shown = {name: value.item() for name, value in (losses | {"lr_latent": plateau.lr}).items()}
            shown["lr_latent"] *= factors[step + 1]
            log(step, shown | {"lr_generator": rates[step + 1] * factors[step + 1]})
        if ended:
            break
    with torch.no_grad(), reduced:
        images = prior.apply(generator(latents))
    check_finite(images, "synthesis", advice)
    return Batch(images.contiguous(), latents.detach(), generator.requires_grad_(False), labels, second)
