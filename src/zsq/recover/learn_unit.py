"""The loop of one unit: learn roundings and step sizes so that it returns what the teacher's does."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.graph.tensors import device_of
from zsq.health import AGAIN, Watch
from zsq.kernels import computing_in, reproducible
from zsq.out_of_memory import no_room
from zsq.quant.affine import MIN_SCALE
from zsq.quant.choice import Rows
from zsq.quant.dropping import dropping
from zsq.quant.quantizers import ActivationQuantizer, LearnedRounding, WeightQuantizer
from zsq.quant.rounding import rounding_regulariser
from zsq.recipe import Reconstruction
from zsq.recover.losses import output_distance
from zsq.recover.storage import MEMORY, Storage
from zsq.recover.unit_maps import UnitMaps
from zsq.recover.unit_tensors import take, take_mixed
from zsq.replay import Course, can_record, replayed

RELEASE_EVERY = 16  # steps after which what was read of files leaves memory


@dataclass(frozen=True)
class UnitData:
    """What the loop of a unit sees, for all images.

    Attributes:
        teacher_inputs: what the teacher gives the unit.
        student_inputs: what the student gives it.
        targets: what the teacher's unit returns for the teacher's inputs.
        channel_axis: of channels in what it returns.
        maps: class activation maps that are to be alike too.
    """

    teacher_inputs: Sequence[Tensor]
    student_inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    channel_axis: int = 1
    maps: UnitMaps | None = None


def learn_unit(
    part: fx.GraphModule,
    weights: Mapping[str, Tensor],
    data: UnitData,
    *,
    settings: Reconstruction,
    settled: Collection[nn.Module],
    where: str,
    rng: torch.Generator,
    log: Callable[[int, dict[str, float]], None],
    group: Group = ALONE,
    storage: Storage = MEMORY,
) -> None:
    """Learn a unit's roundings and scales; at the end roundings are hard and nothing requires gradients.

    Args:
        part: the student's unit, changed in place; what it holds but quantizers is not trained.
        weights: in float, by the names of their quantizers, which round to nearest.
        data: that it learns from.
        settings: of the loop.
        settled: activation quantizers that stay as they are.
        where: the unit's name, for messages.
        rng: draws minibatches, drops and mixes.
        log: called as log(step, values), ten times and at the last step.
        group: processes that share every minibatch.
        storage: where the data are.

    Raises:
        JobError: the loss is NaN or infinity, or there is no room.
    """
    learned: dict[str, LearnedRounding] = {}
    for name, weight in weights.items():
        nearest = part.get_submodule(name)
        assert isinstance(nearest, WeightQuantizer)
        learned[name] = LearnedRounding(weight, nearest)
        part.set_submodule(name, learned[name])
    free = (m for m in part.modules() if isinstance(m, ActivationQuantizer) and m not in settled)
    activation_scales = [module.scale for module in free]
    logits = [m.rounding_logits for m in learned.values()]
    weight_scales = [m.scale for m in learned.values()]
    device = device_of(part)
    recordable = can_record(device) and group.size == 1 and storage.folder is None
    optimizer = torch.optim.Adam(
        [
            {"params": logits, "lr": settings.lr_rounding},
            {"params": weight_scales, "lr": settings.lr_weight_scale},
            {"params": activation_scales, "lr": settings.lr_activation_scale},
        ],
        fused=True,
        capturable=recordable,
    )
    for scale in activation_scales:
        scale.requires_grad_(True)
    draw = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
    num_images = len(data.targets[0])
    batches = minibatches(num_images, settings.batch_size, rng)
    mine, share, rows = _share(group, min(settings.batch_size, num_images))
    rounding_weight = settings.rounding_weight / group.size
    watch = _watch(settings, device, where, group)
    reduced = computing_in(settings.precision, device, cache=False)

    def learn(
        index: Tensor, beta: float | Tensor | None, gate: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """A step on images (n,): the loss, and of it how far outputs and maps are from the teacher's."""
        inputs = [
            take_mixed(s, t, index, settings.input_mix_prob, draw, rows)
            for s, t in zip(data.student_inputs, data.teacher_inputs, strict=True)
        ]
        distance = torch.zeros((), device=device)
        with reduced:
            outputs = part(*inputs)
        targets = [take(target, index) for target in data.targets]
        for output, target in zip(outputs, targets, strict=True):
            distance = distance + output_distance(output, target, channel_axis=data.channel_axis)
        if data.maps is not None:
            distance = distance + data.maps(outputs[0], targets[0], index)
        distance = distance * share  # the processes' shares add up to the mean over the minibatch
        loss = distance
        if beta is not None:
            for values in logits:
                loss = loss + gate * rounding_weight * rounding_regulariser(values, beta)
        optimizer.zero_grad()
        with reproducible(device, rounded=True):
            loss.backward()
        group.add([p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_clamp_min_([*activation_scales, *weight_scales], MIN_SCALE)
        return loss, distance

    of_scales = {1: settings.lr_weight_scale, 2: settings.lr_activation_scale}  # by group, cosine to 0
    recorded = None
    if recordable:
        recorded = _recorded(learn, optimizer, of_scales, batches, settings, device, draw, watch)
    log_every = max(1, settings.steps // 10)
    advice = (
        "Give --memory to keep tensors between units off the device, or lower reconstruction.batch_size "
        f"(now {settings.batch_size}), which changes the result."
    )
    with dropping(part, settings.drop_prob, draw, rows), no_room(advice):
        for step in range(settings.steps):
            if recorded is not None:
                loss, distance = recorded().values()
            else:
                for number, lr in of_scales.items():
                    optimizer.param_groups[number]["lr"] = lr * _cosine(step, settings)
                loss, distance = learn(next(batches)[mine].to(device), beta_at(step, settings))
                watch.see(step, [loss])
            if step % RELEASE_EVERY == 0:
                storage.release()
            if step % log_every == 0 or step == settings.steps - 1:
                watch.check()
                shown = [loss.detach().clone(), distance.detach().clone()]
                group.add(shown)
                log(step, dict(zip(("loss", "reconstruction"), map(float, shown), strict=True)))
    for scale in activation_scales:
        scale.requires_grad_(False)
        scale.grad = None
    for name, module in learned.items():
        part.set_submodule(name, module.harden())


def _share(group: Group, count: int) -> tuple[slice, float, Rows]:
    """Of a minibatch of `count` images, what this process takes, its part of the mean, and its draws."""
    mine, share = slice(0, count), 1 / group.size  # with fewer images than processes all do the same
    if count >= group.size:
        mine = group.share(count)
        share = (mine.stop - mine.start) / count
    return mine, share, Rows(mine.start, mine.stop, count)


def _watch(settings: Reconstruction, device: torch.device, where: str, group: Group) -> Watch:
    rates = f"lr_rounding (now {settings.lr_rounding:g}), lr_weight_scale ({settings.lr_weight_scale:g})"
    return Watch(
        "The reconstruction",
        f"Lower reconstruction.{rates} or lr_activation_scale ({settings.lr_activation_scale:g}). {AGAIN}",
        steps=settings.steps,
        device=device,
        where=f"unit {where}",
        group=group,
    )


def _recorded(
    learn: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    of_scales: dict[int, float],
    batches: Iterator[Tensor],
    settings: Reconstruction,
    device: torch.device,
    draw: torch.Generator,
    watch: Watch,
) -> Callable[[], dict[str, Tensor]]:
    """The steps of `learn_unit`, with all that changes from one to the next on the device."""
    exponents = [beta_at(step, settings) for step in range(settings.steps)]
    rates = [[lr * _cosine(step, settings) for lr in of_scales.values()] for step in range(settings.steps)]
    course = Course(
        device,
        index=torch.stack(list(islice(batches, settings.steps))),
        rates=torch.tensor(rates),
        beta=torch.tensor([settings.beta_start if beta is None else beta for beta in exponents]),
        gate=torch.tensor([float(beta is not None) for beta in exponents]),
    )
    for number in of_scales:
        optimizer.param_groups[number]["lr"] = torch.zeros((), device=device)

    def learn_next(row: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
        for number, rate in zip(of_scales, row["rates"].unbind(), strict=True):
            optimizer.param_groups[number]["lr"].copy_(rate)
        loss, distance = learn(row["index"], row["beta"], row["gate"])
        watch.see(step, [loss])
        return {"loss": loss, "distance": distance}

    return replayed(learn_next, course, device, generators=[draw])


def beta_at(step: int, settings: Reconstruction) -> float | None:
    """Exponent of the rounding regulariser at a step (0-based); None during the warm-up.

    Linear from `beta_start` at the end of the warm-up to `beta_end` at `steps`.
    """
    start = settings.warmup * settings.steps
    if step < start:
        return None
    progress = (step - start) / (settings.steps - start)
    return settings.beta_start + (settings.beta_end - settings.beta_start) * progress


def minibatches(num_images: int, batch_size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches: every pass visits each image once; a short rest of a pass is dropped.

    With fewer images than `batch_size`, every batch is all of them.
    """
    size = min(batch_size, num_images)
    while True:
        order = torch.randperm(num_images, generator=rng)
        for start in range(0, num_images - size + 1, size):
            yield order[start : start + size]


def _cosine(step: int, settings: Reconstruction) -> float:
    """Factor of the learning rates of scales at a step (0-based): half a cosine from 1 to 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / settings.steps))
