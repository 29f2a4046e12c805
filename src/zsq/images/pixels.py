"""Synthesise images as pixels, one batch at a time, each image of a class where the settings say so."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from zsq.distributed import ALONE, Group, spread
from zsq.graph.tensors import device_of
from zsq.health import Watch
from zsq.images.batches import Log, batch_names, batch_sizes, log_batch, room_advice
from zsq.images.class_losses import classes_by_batch, number_of_classes
from zsq.images.class_settings import ClassGuide
from zsq.images.crops import crop, draw_crops
from zsq.images.forward import observe
from zsq.images.looks import moved
from zsq.images.pixel_objective import Targets, pixel_objective
from zsq.images.pixel_settings import PixelSynthesis
from zsq.images.prior import STANDARD, InputPrior, PixelLimits
from zsq.images.schedules import LOGS_A_BATCH, Annealing, Plateau, check_finite
from zsq.images.statistics import pooled_statistics
from zsq.images.synthesize import Finished
from zsq.images.texture import natural_noise
from zsq.out_of_memory import no_room
from zsq.rng import rng_for


def synthesize_pixels(
    teacher: fx.GraphModule,
    settings: PixelSynthesis,
    input_size: tuple[int, int, int],
    *,
    seed: int,
    finished: Finished,
    log: Log,
    prior: InputPrior | None = None,
    limits: PixelLimits | None = None,
    group: Group = ALONE,
) -> Tensor:
    """Images in batches that know nothing of one another; each has its own stream of `seed`.

    With classes, all images together have each class equally often, and so has every batch.

    Args:
        teacher: captured network, with its BatchNorm layers if it has any, on the device to compute on;
            untouched.
        settings: how many, and how.
        input_size: (C, H, W) of the teacher's images.
        seed: batch k draws from the stream ("pixels", k) of it, so batches can be made in any order.
        finished: {"images", and with classes "labels", (N,) int64} of finished batches by name, centres by
            `centre_names`; those found there are taken over, others added.
        log: called as log(batch name, step, steps, values) a few times a batch.
        prior: mean and deviation that the images start from and are held to; None for 0 and 1.
        limits: normalised black and white, for settings that keep pixels valid.
        group: processes that make a batch each at a time; all get all images, the same bits whatever their
            number.

    Returns:
        (num_images, C, H, W), normalised, float32, on the CPU.

    Raises:
        UsageError: the teacher has none of the BatchNorm layers or classes that the settings ask for.
        JobError: the optimisation diverged.
    """
    names = batch_names(settings)
    sizes = batch_sizes(settings.num_images, settings.batch_size)
    parts, seconds = classes_by_batch(teacher, settings.classes, sizes, seed)
    advice = room_advice(settings)
    targets: Targets | None = None
    if settings.centres is not None and any(name not in finished for name in names):
        with no_room(advice):
            centres = make_centres(
                teacher,
                settings,
                input_size,
                seed=seed,
                finished=finished,
                log=log,
                prior=prior,
                group=group,
            )
            targets = _centre_statistics(teacher, finished, centres)

    def make(index: int) -> dict[str, Tensor]:
        with no_room(advice):
            images = optimise_pixels(
                teacher,
                settings,
                input_size,
                sizes[index],
                labels=parts[index],
                second=seconds[index],
                targets=targets,
                rng=rng_for(seed, "pixels", index),
                log=partial(log_batch, log, names[index], settings.steps),
                prior=prior,
                limits=limits,
                where=f"batch {index + 1} of {len(names)}",
            )
        part = parts[index]
        return {"images": images.cpu(), **({} if part is None else {"labels": part})}

    spread(names, make, finished, group)
    return torch.cat([finished[name]["images"] for name in names])


def centre_names(num_centres: int, settings: PixelSynthesis) -> list[str]:
    """Under which the batches of centres are kept once they are finished, in order."""
    return [f"centres-{k:03d}" for k in range(len(batch_sizes(num_centres, settings.batch_size)))]


def make_centres(
    teacher: fx.GraphModule,
    settings: PixelSynthesis,
    input_size: tuple[int, int, int],
    *,
    seed: int,
    finished: Finished,
    log: Log,
    prior: InputPrior | None = None,
    group: Group = ALONE,
) -> list[str]:
    """Make one image a class, unless they are there: in `finished`, in order of class, under these names.

    With fewer centres than classes, which ones is drawn from `seed`.

    Args: as for `synthesize_pixels`, for settings with centres.

    Source: calibration centres of TexQ (NeurIPS 2023) as in SynQ's code (arXiv:2603.18423), which fills a
    batch that has more places than classes are left with further images of class 0; here it is smaller.
    """
    assert settings.centres is not None and settings.bn is not None
    own = replace(
        settings,
        steps=settings.centres.steps,
        lr_min=settings.centres.lr_min,
        texture_weight=settings.centres.texture_weight,
        bn=replace(
            settings.bn, weight=1.0, shallow=settings.centres.shallow, deep=settings.centres.deep, slack=0.0
        ),
        classes=ClassGuide(weight=settings.centres.class_weight),
        crops=None,
        centres=None,
    )
    chosen = torch.arange(number_of_classes(teacher))
    if settings.centres.classes is not None:
        drawn = torch.randperm(len(chosen), generator=rng_for(seed, "centres", "classes"))
        chosen = chosen[drawn[: settings.centres.classes].sort().values]
    names, sizes = centre_names(len(chosen), settings), batch_sizes(len(chosen), settings.batch_size)
    parts = chosen.split(sizes)

    def make(index: int) -> dict[str, Tensor]:
        images = optimise_pixels(
            teacher,
            own,
            input_size,
            sizes[index],
            labels=parts[index],
            rng=rng_for(seed, "centres", index),
            log=partial(log_batch, log, names[index], own.steps),
            prior=prior,
            where=f"batch {index + 1} of {len(names)} of the centres",
        )
        return {"images": images.cpu(), "labels": parts[index]}

    spread(names, make, finished, group)
    return names


def _centre_statistics(teacher: fx.GraphModule, finished: Finished, names: list[str]) -> Targets:
    """The statistics of all centres at every BatchNorm."""
    observer = observe(teacher, fold=True)
    with torch.no_grad():
        device = device_of(teacher)
        return pooled_statistics([observer(finished[name]["images"].to(device)) for name in names])


def optimise_pixels(
    teacher: fx.GraphModule,
    settings: PixelSynthesis,
    input_size: tuple[int, int, int],
    num_images: int,
    *,
    labels: Tensor | None,
    second: Tensor | None = None,
    targets: Targets | None = None,
    rng: torch.Generator,
    log: Callable[[int, dict[str, float]], None],
    prior: InputPrior | None = None,
    limits: PixelLimits | None = None,
    where: str = "",
) -> Tensor:
    """Optimise the pixels of one batch, from Gaussian noise.

    Args:
        teacher: captured network, with its BatchNorm layers if it has any, on the device to compute on;
            untouched.
        settings: losses and learning rate; `num_images` and `batch_size` are not read.
        input_size: (C, H, W) of the teacher's images.
        num_images: images of this batch.
        labels: (num_images,), int64; None if the settings ask for no class.
        second: (num_images,), int64, second classes; None if the settings ask for one class.
        targets: statistics of the centres, for settings with centres.
        rng: on the CPU; draws pixels, targets of classes and smoothness, the noise that slack is measured on,
            crops and views.
        log: called as log(step, values) about 20 times; only then the host waits for the device.
        prior: mean and deviation that the images start from; None for 0 and 1.
        limits: normalised black and white, for settings that keep pixels valid.
        where: how to call the batch in an error.

    Returns:
        (num_images, C, H, W), normalised, float32, on the teacher's device.

    Raises:
        UsageError: the teacher has none of the BatchNorm layers or classes that the settings ask for.
        JobError: the optimisation diverged.
    """
    device, prior = device_of(teacher), prior or STANDARD
    shape = (num_images, *input_size)
    start = torch.randn(shape, generator=rng) if settings.start == "white" else natural_noise(shape, rng)
    pixels = start.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    schedule = _schedule(settings, device)
    optimizer = torch.optim.Adam(
        [{"params": [pixels], "lr": schedule.lr}],
        betas=(settings.momentum, settings.square_decay),
        fused=True,
    )
    bounds = limits.standard(prior, device) if settings.valid_pixels and limits is not None else None
    objective = pixel_objective(
        teacher, settings, shape, labels=labels, second=second, targets=targets, rng=rng, prior=prior
    )
    log_every = math.ceil(settings.steps / LOGS_A_BATCH)
    advice = f"Try a smaller synthesis.lr (now {settings.lr}) or synthesis.limit=3 (now {settings.limit:g})."
    watch = Watch("The synthesis of images", advice, steps=settings.steps, device=device, where=where)
    for step in range(settings.steps):
        shown = _shown(prior.apply(pixels), settings, step, rng)
        parts = objective(shown.contiguous(memory_format=torch.channels_last))
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad()
        loss.backward(inputs=[pixels])
        optimizer.step()
        watch.see(step, [loss])
        with torch.no_grad():
            if settings.limit:
                pixels.clamp_(-settings.limit, settings.limit)
            if bounds is not None:
                torch.clamp(pixels, *bounds, out=pixels)
        schedule.step(loss.detach())
        if step % log_every == 0 or step == settings.steps - 1:
            watch.check()
            values = {"loss": loss, **parts, "lr": schedule.lr}
            log(step, {name: value.item() for name, value in values.items()})
    images = prior.apply(pixels.detach()).contiguous()
    check_finite(images, "synthesis", advice)
    return images


def _schedule(settings: PixelSynthesis, device: torch.device) -> Plateau | Annealing:
    if settings.cosine is not None:
        return Annealing(settings.lr, settings.cosine, steps=settings.steps, device=device)
    return Plateau(
        settings.lr,
        factor=settings.plateau_factor,
        patience=settings.plateau_patience,
        lowest=settings.lr_min,
        device=device,
    )


def _shown(images: Tensor, settings: PixelSynthesis, step: int, rng: torch.Generator) -> Tensor:
    """What the teacher is shown of images (N, C, H, W) in a step: crops, views, two of them if they agree."""
    crops, views = settings.crops, settings.views
    if crops is not None and float(torch.rand((), generator=rng)) < crops.prob:
        boxes = draw_crops(len(images), (images.shape[2], images.shape[3]), crops.smallest, rng)
        images = crop(images, boxes.to(images.device, non_blocking=True))
    if views is None:
        return images
    rounds = settings.cosine.rounds if settings.cosine is not None else 1
    share = (step * rounds // settings.steps + 1) / rounds
    furthest = round(views.jitter * share * min(images.shape[2:]))
    found = []
    for _ in range(2 if views.agreement > 0 else 1):
        offset = int(torch.randint(-furthest, furthest + 1, (), generator=rng))
        found.append(moved(images, offset, mirror=float(torch.rand((), generator=rng)) < views.mirror))
    return torch.cat(found)
