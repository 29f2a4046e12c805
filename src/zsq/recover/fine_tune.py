"""Fine-tune a student end to end: straight-through weights, fixed activation ranges."""

import math
import statistics
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.graph.blocks import Unit
from zsq.health import AGAIN, Watch
from zsq.images.generator_training import GeneratorTraining, generator_advice
from zsq.out_of_memory import in_chunks, no_room
from zsq.quant.attach import Quantizers
from zsq.recover.network_outputs import Observed, looked_at
from zsq.recover.settings import FineTuning
from zsq.recover.standing import Standing
from zsq.recover.trainee import load_trainee, put_up, trainee_state
from zsq.recover.tuning_step import Step, Views
from zsq.recover.turns import Minibatch, of_generator, of_images
from zsq.recover.unit_tensors import CHUNK, take
from zsq.rng import rng_for

PIECE = "fine-tuning"  # under which the state after the last finished epoch is kept
GENERATOR = "generator/"  # before the names of a generator's tensors in it
LOGS_AN_EPOCH = 2
PROBES = 4  # minibatches that tell the loss before training
MAX_RETREATS = 5  # of a run; after them the loss may rise
Finished = MutableMapping[str, dict[str, Tensor]]
Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class FineTuningResult:
    """Mean loss over the steps of the first and of the last epoch; "loss" is the sum of the other parts.

    `lr_factor` is what the learning rate was multiplied by, below 1 if epochs were undone.
    """

    epochs: int
    first: dict[str, float]
    last: dict[str, float]
    lr_factor: float = 1.0


def decay_at(epoch: int, settings: FineTuning) -> float:
    """Factor of the learning rate of an epoch (0-based)."""
    factor: float = settings.lr_decay ** min(epoch // settings.lr_decay_epochs, settings.lr_decays)
    return factor


def lr_at(epoch: int, settings: FineTuning) -> float:
    """Learning rate of an epoch (0-based)."""
    return settings.lr * decay_at(epoch, settings)


def fine_tune(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    quantizers: Quantizers,
    units: Sequence[Unit],
    images: Tensor,
    labels: Tensor | None,
    *,
    settings: FineTuning,
    reconstructed: bool,
    seed: int,
    finished: Finished,
    log: Log,
    group: Group = ALONE,
    generator: GeneratorTraining | None = None,
) -> FineTuningResult:
    """Train the student's float parameters in place; its quantizers are hard again at the end.

    Args:
        teacher: captured network; untouched.
        student: from `attach`, with ranges.
        quantizers: from `attach`.
        units: from `split`.
        images: (N, C, H, W), normalised, on the device to compute on.
        labels: (N,) int64, the classes that the images were made for or came with; None takes the teacher's.
        settings: how.
        reconstructed: whether roundings of the student were learned, see `FineTuning`.
        seed: every epoch has its own stream of it.
        finished: the state after each epoch is put there under PIECE, and taken over from there.
        log: called as log(step, values) a few times an epoch; only then the host waits for the device.
        group: processes that share every minibatch; the draws are those of one process, so that the result
            differs only by the order in which gradients are summed.
        generator: that made the images, for settings with turns: trained on in place, with the student, whose
            steps are on new images of it; `images` serve the activation ranges alone.

    Raises:
        UsageError: the model is no classifier, or has not what the losses look at.
        JobError: the loss is not finite.

    Source: the protocol of GDFQ (arXiv:2003.03603), IntraQ, HAST and SynQ (arXiv:2603.18423), but for the
    places of the quantizers, which are those of `place`.
    """
    names = looked_at(teacher.graph, units, settings)
    own, shown = Observed(student, names, settings), Observed(teacher, names, settings).frozen()
    images = images.contiguous(memory_format=torch.channels_last)
    views = Views((images.shape[2], images.shape[3]), settings, images.device)
    piece = finished.get(PIECE)
    advice = f"Lower fine_tuning.batch_size (now {settings.batch_size}), which changes the result."
    observed = settings.ranges == "minmax" and not reconstructed
    with no_room(advice):

        def observe(part: nn.Module) -> None:
            if piece is None:  # else the ranges come with it
                _one_pass(part, images, views, settings, rng_for(seed, PIECE, "ranges"))

        trainee = put_up(
            own.part,
            teacher,
            quantizers,
            settings,
            reconstructed=reconstructed,
            observe=observe if observed else None,
        )
        labels = (_classes(shown, images) if labels is None else labels).to(images.device)
        parameters = [p.requires_grad_(True) for p in trainee.parameters().values()]
        optimizer = torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
            fused=True,
        )
        step = Step(own, shown, views, optimizer, settings, group)

        def state() -> dict[str, Tensor]:
            images_too = {} if generator is None else _prefixed(generator.state(), GENERATOR)
            return {**trainee_state(trainee, optimizer), **images_too}

        def go_back(to: dict[str, Tensor]) -> None:
            load_trainee(trainee, optimizer, to)
            if generator is not None:
                generator.load(_without(to, GENERATOR))

        standing = Standing() if piece is None else Standing.read(piece)
        if piece is not None:
            go_back(piece)
        good = state()
        if generator is None and standing.epochs < settings.epochs:
            step.remember(images, labels)
        if generator is None and piece is None:
            rng = rng_for(seed, PIECE, "began")
            probes = islice(of_images(images, labels, settings.batch_size, rng), PROBES)
            standing = replace(standing, began=tuple(step.loss(probe, rng) for probe in probes))

        steps = settings.epochs * settings.iterations
        advice = f"Lower fine_tuning.lr (now {settings.lr:g}). {AGAIN}"
        if generator is not None:
            advice = f"{generator_advice(generator.settings)} Or: {advice}"
        while standing.epochs < settings.epochs:
            done = standing.epochs
            rng = rng_for(seed, PIECE, done)
            if generator is None:
                batches = of_images(images, labels, settings.batch_size, rng)
            else:
                batches = of_generator(
                    generator,
                    own,
                    settings.batch_size,
                    rng,
                    adaptability=None if settings.turns is None else settings.turns.adaptability,
                    lr_factor=decay_at(done, settings),
                    group=group,
                )
            watch = Watch("Fine-tuning", advice, steps=steps, device=images.device, group=group)
            exhausted = standing.retreats == MAX_RETREATS
            free = exhausted or generator is not None  # whose images may become harder
            rate, known = lr_at(done, settings) * standing.lr_factor, () if free else standing.began
            means, risen = _epoch(step, batches, done, rate, rng, log, watch, known)
            if watch.first() is not None and exhausted:
                watch.check()
            if risen or watch.first() is not None:
                standing = replace(standing, retreats=standing.retreats + 1)
                go_back(good)
                continue
            standing = standing.after(means)
            good = state()
            finished[PIECE] = {**good, **standing.tensors()}
    trainee.harden(student)
    return FineTuningResult(settings.epochs, standing.first, standing.last, standing.lr_factor)


def _epoch(
    step: Step,
    batches: Iterator[Minibatch],
    epoch: int,
    lr: float,
    rng: torch.Generator,
    log: Log,
    watch: Watch,
    began: Sequence[float],
) -> tuple[dict[str, float], bool]:
    """The steps of one epoch, up to where its loss is found to have risen, or not to be finite.

    Returns:
        Mean loss by part, and whether it has risen above `began`, losses of minibatches before training.
    """
    settings = step.settings
    for parameters in step.optimizer.param_groups:
        parameters["lr"] = lr
    interval = math.ceil(settings.iterations / LOGS_AN_EPOCH)
    totals: dict[str, Tensor] = {}
    for iteration in range(settings.iterations):
        values = step(next(batches), rng)
        losses = [value for name, value in values.items() if name.endswith("loss")]
        watch.see(epoch * settings.iterations + iteration, losses)
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value.double()
        if (iteration + 1) % interval == 0 or iteration + 1 == settings.iterations:
            means = step.means(totals, iteration + 1)
            log(epoch * settings.iterations + iteration, {**means, "lr": lr})
            own = means["loss"] - means.get("perturbed", 0.0)  # of images as they are
            risen = bool(began) and own > _highest(began, iteration + 1, settings.undo_rise)
            if risen or watch.first() is not None:
                break
    return means, risen


def _highest(began: Sequence[float], steps: int, rise: float) -> float:
    """Mean loss over so many steps that is no more than a rise by a share, and three standard errors."""
    mean = statistics.fmean(began)
    error = statistics.stdev(began) * math.sqrt(1 / len(began) + 1 / steps)
    return mean + rise * abs(mean) + 3 * error


@torch.no_grad()
def _one_pass(
    part: nn.Module, images: Tensor, views: Views, settings: FineTuning, rng: torch.Generator
) -> None:
    """Run a part on all images once, a minibatch at a time, as they will be seen."""
    for index in torch.randperm(len(images), generator=rng).split(settings.batch_size):
        part(views(take(images, index.to(images.device)), rng))


@torch.no_grad()
def _classes(teacher: Observed, images: Tensor) -> Tensor:
    """What the teacher takes the images for, (N,)."""
    found = in_chunks(lambda rows: teacher.logits(images[rows]), len(images), CHUNK, "the teacher's pass")
    return torch.cat([logits.argmax(1) for _, logits in found])


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _without(piece: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those tensors whose names have the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in piece.items() if name.startswith(prefix)}
