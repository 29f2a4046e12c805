"""Fine-tune a student end to end on fixed images: straight-through weights, fixed activation ranges."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.errors import JobError
from zsq.graph.blocks import Unit
from zsq.images.augment import crop_and_flip
from zsq.images.low_pass import low_pass, low_pass_gain
from zsq.out_of_memory import in_chunks, no_room
from zsq.quant.attach import Quantizers
from zsq.quant.dropping import Rows
from zsq.recover.network_outputs import Observed, Outputs, joined, looked_at, parts_of_loss
from zsq.recover.reconstruct import CHUNK, minibatches, take
from zsq.recover.settings import FineTuning
from zsq.recover.trainee import load_trainee, put_up, trainee_state
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
    views = _Views(images.contiguous(memory_format=torch.channels_last), settings)
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
        step = _Step(own, shown, views, labels, optimizer, settings, group)
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


def _epoch(step: "_Step", epoch: int, settings: FineTuning, seed: int, log: Log) -> dict[str, float]:
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


class _Views:
    """The images as training sees them: cropped, flipped and filtered."""

    def __init__(self, images: Tensor, settings: FineTuning) -> None:
        self._images, self._settings = images, settings
        self.count, self.size = len(images), (images.shape[2], images.shape[3])
        low = settings.low_pass
        self._gain = None if low is None else low_pass_gain(low, *self.size, images.device)

    def __call__(self, index: Tensor, rng: torch.Generator | None, rows: Rows | None = None) -> Tensor:
        """Images of these indices; crops and flips are drawn from `rng`, if it is given."""
        images = take(self._images, index.to(self._images.device))
        if self._settings.augment and rng is not None:
            images = crop_and_flip(images, self._settings.crop_scale, rng, rows)
        if self._gain is not None:
            images = low_pass(images, self._gain)
        return images.contiguous(memory_format=torch.channels_last)


class _Step:
    """One step of the optimizer on one minibatch; made once, so that nothing is set up in the loop."""

    def __init__(
        self,
        student: Observed,
        teacher: Observed,
        views: _Views,
        labels: Tensor,
        optimizer: torch.optim.SGD,
        settings: FineTuning,
        group: Group,
    ) -> None:
        self.student, self.teacher, self.views, self.labels = student, teacher, views, labels
        self.optimizer, self.settings, self.group = optimizer, settings, group
        self.parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        self.device = labels.device
        self.reduced = torch.autocast(
            self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
        )
        # Without augmentation the teacher sees the same images every time; a step up the slope needs its own.
        cached = not settings.augment and settings.perturbation is None
        self.cache = self._all_teacher_outputs() if cached else None

    def __call__(self, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw the views of a minibatch, descend; this process's share of the loss by parts."""
        count, group = len(batch), self.group
        if count >= group.size:
            mine = group.share(count)
            share = (mine.stop - mine.start) / count
        else:  # all do the same
            mine, share = slice(0, count), 1 / group.size
        index = batch[mine].to(self.device)
        images, labels = self.views(index, rng, Rows(mine.start, mine.stop, count)), self.labels[index]
        perturbation = self.settings.perturbation
        self.optimizer.zero_grad()
        if perturbation is not None:
            images.requires_grad_()
        parts = self._parts(images, labels, index, maps=True)
        loss = torch.stack(list(parts.values())).sum() * share
        loss.backward(inputs=[*self.parameters, images] if perturbation is not None else self.parameters)
        if perturbation is not None:
            assert images.grad is not None
            moved = (images + perturbation.size * images.grad.sign()).detach()
            again = torch.stack(list(self._parts(moved, labels, None, maps=False).values())).sum()
            parts["perturbed"] = perturbation.weight * again
            (parts["perturbed"] * share).backward(inputs=self.parameters)
        self.group.add([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.step()
        parts = {name: part.detach() * share for name, part in parts.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def means(self, totals: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means over steps and processes of sums of what the steps returned; waits for the device."""
        joint = torch.stack(list(totals.values()))
        self.group.add([joint])
        return dict(zip(totals, (joint / steps).tolist(), strict=True))

    def _parts(
        self, images: Tensor, labels: Tensor, index: Tensor | None, *, maps: bool
    ) -> dict[str, Tensor]:
        if self.cache is not None and index is not None:
            wanted = self.cache.rows(index)
        else:
            wanted = self._teacher_outputs(images, labels, maps=maps)
        own = self.student(images, labels, maps=maps)
        return parts_of_loss(own, wanted, labels, self.settings, self.views.size)

    def _teacher_outputs(self, images: Tensor, labels: Tensor, *, maps: bool) -> Outputs:
        """Those of the teacher; with history only if the images have one."""
        maps = maps and self.settings.maps is not None
        with torch.set_grad_enabled(images.requires_grad or maps), self.reduced:
            found = self.teacher(images, labels, maps=maps)
        if images.requires_grad:  # the slope passes through both networks, but not through the maps' target
            return Outputs(found.logits, found.constant().maps, found.attentions)
        return found.constant()

    def _all_teacher_outputs(self) -> Outputs:
        def outputs(rows: slice) -> Outputs:
            index = torch.arange(rows.start, rows.stop)
            return self._teacher_outputs(self.views(index, None), self.labels[rows], maps=True)

        found = in_chunks(outputs, self.views.count, CHUNK, "the teacher's pass")
        return joined([piece for _, piece in found])


@torch.no_grad()
def _one_pass(part: nn.Module, views: _Views, settings: FineTuning, rng: torch.Generator) -> None:
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
