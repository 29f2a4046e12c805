"""Fine-tune a student end to end on fixed images: straight-through weights, fixed activation ranges."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.errors import JobError
from zsq.graph.blocks import Unit
from zsq.out_of_memory import in_chunks, no_room
from zsq.quant.attach import Quantizers
from zsq.recover.network_outputs import Observed, looked_at
from zsq.recover.reconstruct import CHUNK, minibatches
from zsq.recover.settings import FineTuning
from zsq.recover.trainee import load_trainee, put_up, trainee_state
from zsq.recover.tuning_step import Step, Views
from zsq.rng import rng_for

PIECE = "fine-tuning"  # under which the state after the last finished epoch is kept
LOGS_AN_EPOCH = 2
Finished = MutableMapping[str, dict[str, Tensor]]
Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class FineTuningResult:
    """Mean loss over the steps of the first and of the last epoch; "loss" is the sum of the other parts."""

    epochs: int
    first: dict[str, float]
    last: dict[str, float]


def lr_at(epoch: int, settings: FineTuning) -> float:
    """Learning rate of an epoch (0-based)."""
    decays = min(epoch // settings.lr_decay_epochs, settings.lr_decays)
    return settings.lr * settings.lr_decay**decays


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
) -> FineTuningResult:
    """Train the student's float parameters in place; its quantizers are hard again at the end.

    Args:
        teacher: captured network; untouched.
        student: from `attach`, with ranges.
        quantizers: from `attach`.
        units: from `split`.
        images: (N, C, H, W), normalised, on the device to compute on.
        labels: (N,) int64, the classes that the images were made for; None takes the teacher's.
        settings: how.
        reconstructed: whether roundings of the student were learned, see `FineTuning`.
        seed: every epoch has its own stream of it.
        finished: the state after each epoch is put there under PIECE, and taken over from there.
        log: called as log(step, values) a few times an epoch; only then the host waits for the device.
        group: processes that share every minibatch; the draws are those of one process, so that the result
            differs only by the order in which gradients are summed.

    Raises:
        UsageError: the model is no classifier, or has not what the losses look at.
        JobError: the loss is not finite.

    Source: the protocol of GDFQ (arXiv:2003.03603), IntraQ, HAST and SynQ (arXiv:2603.18423), but for the
    places of the quantizers, which are those of `place`.
    """
    names = looked_at(teacher.graph, units, settings)
    own, shown = Observed(student, names, settings), Observed(teacher, names, settings).frozen()
    views = Views(images.contiguous(memory_format=torch.channels_last), settings)
    piece = finished.get(PIECE)
    advice = f"Lower fine_tuning.batch_size (now {settings.batch_size}), which changes the result."
    with no_room(advice):

        def observe(part: nn.Module) -> None:
            if piece is None:  # else the ranges come with it
                _one_pass(part, views, settings, rng_for(seed, PIECE, "ranges"))

        trainee = put_up(
            own.part,
            teacher,
            quantizers,
            settings,
            reconstructed=reconstructed,
            observe=observe if settings.ranges == "minmax" else None,
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
        history: list[dict[str, float]] = []
        done = 0
        if piece is not None:
            load_trainee(trainee, optimizer, piece)
            done = int(piece["epochs"])
            history = [_numbers(piece, "first."), _numbers(piece, "last.")]
        step = Step(own, shown, views, labels, optimizer, settings, group)
        for epoch in range(done, settings.epochs):
            means = _epoch(step, epoch, settings, seed, log)
            if not math.isfinite(means["loss"]):
                raise JobError(
                    f"Fine-tuning diverged in epoch {epoch + 1}: its loss is not finite. Lower "
                    f"fine_tuning.lr (now {settings.lr:g})."
                )
            history = [*history[:1], means]
            finished[PIECE] = {
                **trainee_state(trainee, optimizer),
                "epochs": torch.tensor(epoch + 1),
                **_tensors(history[0], "first."),
                **_tensors(means, "last."),
            }
    trainee.harden(student)
    return FineTuningResult(settings.epochs, history[0], history[-1])


def _epoch(step: Step, epoch: int, settings: FineTuning, seed: int, log: Log) -> dict[str, float]:
    """The steps of one epoch; mean loss by part."""
    rng = rng_for(seed, PIECE, epoch)
    batches = minibatches(step.views.count, settings.batch_size, rng)
    for parameters in step.optimizer.param_groups:
        parameters["lr"] = lr_at(epoch, settings)
    interval = math.ceil(settings.iterations / LOGS_AN_EPOCH)
    totals: dict[str, Tensor] = {}
    for iteration in range(settings.iterations):
        for name, value in step(next(batches), rng).items():
            totals[name] = totals.get(name, 0.0) + value.double()
        if (iteration + 1) % interval == 0 or iteration + 1 == settings.iterations:
            means = step.means(totals, iteration + 1)
            log(epoch * settings.iterations + iteration, {**means, "lr": lr_at(epoch, settings)})
    return means


@torch.no_grad()
def _one_pass(part: nn.Module, views: Views, settings: FineTuning, rng: torch.Generator) -> None:
    """Run a part on all images once, a minibatch at a time, as they will be seen."""
    for index in torch.randperm(views.count, generator=rng).split(settings.batch_size):
        part(views(index, rng))


@torch.no_grad()
def _classes(teacher: Observed, images: Tensor) -> Tensor:
    """What the teacher takes the images for, (N,)."""
    found = in_chunks(lambda rows: teacher.logits(images[rows]), len(images), CHUNK, "the teacher's pass")
    return torch.cat([logits.argmax(1) for _, logits in found])


def _numbers(piece: dict[str, Tensor], prefix: str) -> dict[str, float]:
    order = sorted((name for name in piece if name.startswith(prefix)), key=lambda n: n != f"{prefix}loss")
    return {name.removeprefix(prefix): float(piece[name]) for name in order}


def _tensors(numbers: dict[str, float], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
