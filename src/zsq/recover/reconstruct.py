"""Reconstruct a student unit by unit: learn roundings and step sizes so that units match the teacher's."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.errors import JobError
from zsq.graph.blocks import Unit, extract, last_readers
from zsq.graph.capture import aten, weight_node
from zsq.graph.tensors import device_of, get_tensor
from zsq.health import AGAIN, Watch
from zsq.images.forward import freeze_batch_norms
from zsq.kernels import reproducible
from zsq.out_of_memory import in_chunks, no_room
from zsq.quant.affine import MIN_SCALE
from zsq.quant.attach import Quantizers
from zsq.quant.calibrate import calibrate, set_range_for
from zsq.quant.dropping import Rows, dropping, mix
from zsq.quant.quantizers import ActivationQuantizer, LearnedRounding
from zsq.quant.rounding import rounding_regulariser
from zsq.recipe import Calibration, Reconstruction, StatisticalRanges
from zsq.recover.losses import energies, output_distance, signal_to_noise
from zsq.recover.storage import MEMORY, Storage
from zsq.recover.unit_maps import UnitMaps, map_unit, unit_maps
from zsq.replay import Course, Replay, can_record
from zsq.rng import rng_for

CHUNK = 64  # images a forward pass when caching
RELEASE_EVERY = 16  # steps after which what was read of files leaves memory
Finished = MutableMapping[str, dict[str, Tensor]]
Log = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit: signal-to-noise of its output before and after learning, in decibels."""

    name: str
    layers: int
    snr_nearest: float
    snr: float


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


def reconstruct(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    quantizers: Quantizers,
    units: Sequence[Unit],
    images: Tensor,
    *,
    settings: Reconstruction | None,
    calibration: Calibration | StatisticalRanges,
    seed: int,
    finished: Finished,
    log: Log,
    group: Group = ALONE,
    storage: Storage = MEMORY,
) -> list[UnitResult]:
    """Calibrate and reconstruct all units in order; the student's quantizers are changed in place.

    Args:
        teacher: captured network; untouched.
        student: from `attach`.
        quantizers: from `attach`.
        units: from `split`; each is calibrated on what the finished units before it give.
        images: (N, C, H, W), normalised.
        settings: None only calibrates.
        calibration: first ranges of the activations; those from statistics are there already.
        seed: every unit has its own stream of it.
        finished: state dicts of finished units by name; those found there are taken over, others are added.
        log: called as log(unit name, step, steps, values).
        group: processes that share every minibatch; the draws are those of one process, so that the result
            differs only by the order in which gradients are summed. Every process has all caches.
        storage: where the tensors between units are kept; the result is the same, bit for bit.

    Raises:
        JobError: a unit returns NaN or infinity where the teacher's does not.

    A unit that learning leaves further from the teacher than rounding to nearest did, over all images, keeps
    the latter: with few steps the published rates, absolute numbers, are too coarse for 8-bit scales.

    An activation quantizer that several units call belongs to the first of them; the others take it as it is.
    If tensors of several units share it, its first range fits the teacher's tensors. One that has a range
    already keeps it.

    Source: BRECQ (arXiv:2102.05426) for the units, QDrop (2203.05740) for the drops, Genie (2212.04780) for
    learning rounding and scales together.
    """
    last = last_readers(units)
    # The teacher's and the student's tensors that are still to be read.
    caches: list[dict[str, Tensor]] = [{}, {}]
    images = images.contiguous(memory_format=torch.channels_last)
    for cache in caches:
        cache[next(n.name for n in teacher.graph.nodes if n.op == "placeholder")] = images
    results = []
    # Quantizers of finished units, and those whose range was set beforehand.
    settled: set[nn.Module] = {
        m for m in student.modules() if isinstance(m, ActivationQuantizer) and bool(m.scale.isfinite())
    }
    ranged: set[nn.Module] = set()
    if isinstance(calibration, Calibration):
        ranged = _range_across_units(teacher, student, units, images, calibration)
    alignment = None if settings is None else settings.maps
    shown = None if alignment is None else map_unit(teacher.graph, units)
    for index, unit in enumerate(units):
        teacher_part = extract(teacher, unit.inputs, unit.outputs)
        student_part = extract(student, unit.inputs, unit.outputs)
        freeze_batch_norms(student_part.graph)
        student_part.recompile()
        teacher_inputs, student_inputs = ([cache[name] for name in unit.inputs] for cache in caches)
        targets = forward_in_chunks(teacher_part, teacher_inputs, storage)
        key = unit_name(index)
        done = finished.get(key)
        owned = {name: q for name, q in _unit_quantizers(student_part, quantizers)}
        if done is None:
            if isinstance(calibration, Calibration):
                first = [x[: calibration.num_images].to(images.device) for x in student_inputs]
                advice = f"Lower calibration.num_images (now {calibration.num_images}), or use --memory."
                with no_room(advice):
                    calibrate(student_part, first, calibration, settled=settled | ranged)
            outputs = forward_in_chunks(student_part, student_inputs, storage)
            snr_nearest = _snr(targets, outputs, storage)
            if settings is not None:
                outputs.clear()  # not held while learning
                nearest = {name: copy.deepcopy(q) for name, q in owned.items()}
                maps = None
                if alignment is not None and index == shown:
                    size = (images.shape[2], images.shape[3])
                    maps = unit_maps(teacher, unit, targets[0], size, alignment)
                _reconstruct_unit(
                    teacher,
                    student_part,
                    [quantizers.weights[name] for name in unit.layers],
                    {quantizers.weights[n.name]: n for n in teacher.graph.nodes if n.name in unit.layers},
                    (teacher_inputs, student_inputs, targets),
                    channel_axis=_channel_axis(teacher, unit),
                    settings=settings,
                    settled=settled,
                    maps=maps,
                    group=group,
                    storage=storage,
                    where=unit.name,
                    rng=rng_for(seed, "reconstruction", index),
                    log=lambda step, values, name=unit.name: log(name, step, settings.steps, values),  # type: ignore[misc]
                )
                owned = {name: q for name, q in _unit_quantizers(student_part, quantizers)}
                outputs = forward_in_chunks(student_part, student_inputs, storage)
                _refuse_nan(unit, targets, outputs, storage)
                if _snr(targets, outputs, storage) < snr_nearest:
                    owned = nearest
                    for name, quantizer in owned.items():
                        student_part.set_submodule(name, quantizer)
                    outputs = forward_in_chunks(student_part, student_inputs, storage)
                _take_from_first(owned, group)
        else:
            snr_nearest = float(done["snr_nearest"])
            _load(owned, done)
            outputs = forward_in_chunks(student_part, student_inputs, storage)
        for name, quantizer in owned.items():
            student.set_submodule(name, quantizer)
        settled.update(owned.values())
        _refuse_nan(unit, targets, outputs, storage)
        result = UnitResult(unit.name, len(unit.layers), snr_nearest, _snr(targets, outputs, storage))
        results.append(result)
        if done is None:
            state = {f"{n}.{k}": v.clone() for n, q in owned.items() for k, v in q.state_dict().items()}
            finished[key] = {**state, "snr_nearest": torch.tensor(snr_nearest, dtype=torch.float64)}
        log(unit.name, -1, 0, {"snr": result.snr, "snr_nearest": snr_nearest})
        for cache, values in zip(caches, (targets, outputs), strict=True):
            cache.update(zip(unit.outputs, values, strict=True))
            for name in [n for n in cache if last.get(n, -1) <= index]:
                del cache[name]
    return results


def _range_across_units(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    units: Sequence[Unit],
    images: Tensor,
    settings: Calibration,
) -> set[nn.Module]:
    """Set the ranges of quantizers that tensors of several units share, and name these quantizers."""
    unit_of = {name: index for index, unit in enumerate(units) for name in unit.nodes}
    tensors: dict[str, list[str]] = {}
    callers: dict[str, set[int]] = {}
    for node in student.graph.nodes:
        if node.op == "call_module" and node.args:
            tensors.setdefault(str(node.target), []).append(node.args[0].name)
            readers = {unit_of[u.name] for u in node.users if u.name in unit_of}
            callers.setdefault(str(node.target), set()).update(readers)
    image = next(node.name for node in teacher.graph.nodes if node.op == "placeholder")
    found: set[nn.Module] = set()
    for target, read in tensors.items():
        names = list(dict.fromkeys(read))
        if len(names) > 1 and len(callers[target]) > 1:
            quantizer = student.get_submodule(target)
            assert isinstance(quantizer, ActivationQuantizer)
            part = extract(teacher, [image], names)
            set_range_for(quantizer, forward_in_chunks(part, [images[: settings.num_images]]), settings)
            found.add(quantizer)
    return found


def unit_name(index: int) -> str:
    """Under which a unit is kept once it is finished."""
    return f"unit-{index:03d}"


def _unit_quantizers(part: nn.Module, quantizers: Quantizers) -> Iterator[tuple[str, nn.Module]]:
    names = {*quantizers.weights.values(), *quantizers.activations.values()}
    return ((name, module) for name, module in part.named_modules() if name in names)


def _take_from_first(owned: dict[str, nn.Module], group: Group) -> None:
    """Process 0's quantizers in all processes, should another kind of processor have rounded otherwise."""
    if group.size > 1:
        state = {f"{n}.{k}": v for n, q in owned.items() for k, v in q.state_dict().items()}
        state = group.pieces_of_first({"unit": state})["unit"]
        _load(owned, state)


def _load(owned: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    for name, quantizer in owned.items():
        quantizer.load_state_dict(
            {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        )


def _reconstruct_unit(
    teacher: fx.GraphModule,
    part: fx.GraphModule,
    weight_quantizers: Sequence[str],
    nodes: dict[str, fx.Node],
    data: tuple[list[Tensor], list[Tensor], list[Tensor]],
    *,
    channel_axis: int,
    settings: Reconstruction,
    settled: Collection[nn.Module],
    maps: UnitMaps | None,
    group: Group,
    storage: Storage,
    where: str,
    rng: torch.Generator,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """The loop of one unit; at the end its weight quantizers are hard and nothing requires gradients."""
    teacher_inputs, student_inputs, targets = data
    learned: dict[str, LearnedRounding] = {}
    for name in weight_quantizers:
        weight = weight_node(nodes[name])
        assert weight is not None
        nearest: Any = part.get_submodule(name)
        learned[name] = LearnedRounding(get_tensor(teacher, str(weight.target)), nearest)
        part.set_submodule(name, learned[name])
    activation_scales = [
        m.scale for m in part.modules() if isinstance(m, ActivationQuantizer) and m not in settled
    ]
    logits = [m.rounding_logits for m in learned.values()]
    device = device_of(part)
    recordable = can_record(device) and group.size == 1 and storage.folder is None
    optimizer = torch.optim.Adam(
        [
            {"params": logits, "lr": settings.lr_rounding},
            {"params": [m.scale for m in learned.values()], "lr": settings.lr_weight_scale},
            {"params": activation_scales, "lr": settings.lr_activation_scale},
        ],
        fused=True,
        capturable=recordable,
    )
    for scale in activation_scales:
        scale.requires_grad_(True)
    draw = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
    batches = minibatches(len(targets[0]), settings.batch_size, rng)
    count = min(settings.batch_size, len(targets[0]))
    if count >= group.size:
        mine = group.share(count)
        share = (mine.stop - mine.start) / count
    else:  # all do the same
        mine, share = slice(0, count), 1 / group.size
    rows, rounding_weight = Rows(mine.start, mine.stop, count), settings.rounding_weight / group.size
    log_every = max(1, settings.steps // 10)
    advice = (
        "Give --memory to keep tensors between units off the device, or lower reconstruction.batch_size "
        f"(now {settings.batch_size}), which changes the result."
    )
    rates = f"lr_rounding (now {settings.lr_rounding:g}), lr_weight_scale ({settings.lr_weight_scale:g})"
    watch = Watch(
        "The reconstruction",
        f"Lower reconstruction.{rates} or lr_activation_scale ({settings.lr_activation_scale:g}). {AGAIN}",
        steps=settings.steps,
        device=device,
        where=f"unit {where}",
        group=group,
    )

    scales: list[Tensor] = [*activation_scales, *(m.scale for m in learned.values())]

    def learn(
        index: Tensor, beta: float | Tensor | None, gate: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        inputs = [
            mix(take(s, index), take(t, index), settings.input_mix_prob, draw, rows)
            for s, t in zip(student_inputs, teacher_inputs, strict=True)
        ]
        distance = torch.zeros((), device=device)
        outputs = part(*inputs)
        for output, target in zip(outputs, targets, strict=True):
            distance = distance + output_distance(output, take(target, index), channel_axis=channel_axis)
        if maps is not None:
            distance = distance + maps(outputs[0], take(targets[0], index), index)
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
            torch._foreach_clamp_min_(scales, MIN_SCALE)
        return loss, distance

    of_scales = {1: settings.lr_weight_scale, 2: settings.lr_activation_scale}  # by group, cosine to 0
    recorded = None
    if recordable:
        recorded = _recorded(learn, optimizer, of_scales, batches, settings, device, draw, watch)
    with dropping(part, settings.drop_prob, draw, rows), no_room(advice):
        for step in range(settings.steps):
            if recorded is not None:
                loss, distance = recorded()
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


def _recorded(
    learn: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    of_scales: dict[int, float],
    batches: Iterator[Tensor],
    settings: Reconstruction,
    device: torch.device,
    draw: torch.Generator,
    watch: Watch,
) -> Replay:
    """The steps of `_reconstruct_unit`, with all that changes from one to the next on the device."""
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

    def learn_next() -> tuple[Tensor, Tensor]:
        row = course.row()
        for number, rate in zip(of_scales, row["rates"].unbind(), strict=True):
            optimizer.param_groups[number]["lr"].copy_(rate)
        losses = learn(row["index"], row["beta"], row["gate"])
        watch.see(course.step, losses[:1])
        course.advance()
        return losses

    return Replay(learn_next, device, generators=[draw])


def _cosine(step: int, settings: Reconstruction) -> float:
    """Factor of the learning rates of scales at a step (0-based): half a cosine from 1 to 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` along axis 0 on the device of `index`, in the memory format of `x`.

    Many times faster for channels-last tensors.
    """
    where = index.to(x.device)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, where).to(index.device).permute(0, 3, 1, 2)
    return x.index_select(0, where).to(index.device)


@torch.no_grad()
def forward_in_chunks(part: nn.Module, inputs: Sequence[Tensor], storage: Storage = MEMORY) -> list[Tensor]:
    """Outputs of a unit for all images, computed a few images at a time and put where `storage` says."""
    device, count = device_of(part), len(inputs[0])
    outputs: list[Tensor] = []

    def forward(rows: slice) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = part(*(x[rows].to(device) for x in inputs))
        return found

    for rows, pieces in in_chunks(forward, count, CHUNK, "caching what units return"):
        num_images = rows.stop - rows.start
        if not outputs:
            outputs = [storage.room(piece, len(piece) // num_images * count) for piece in pieces]
        for output, piece in zip(outputs, pieces, strict=True):
            each = len(piece) // num_images  # rows an image
            output[rows.start * each : rows.stop * each] = piece
        storage.release()
    return outputs


def _refuse_nan(unit: Unit, targets: Sequence[Tensor], outputs: Sequence[Tensor], storage: Storage) -> None:
    if any(bool((t.isfinite() & ~o.isfinite()).any()) for t, o in _chunks(targets, outputs, storage)):
        raise JobError(
            f"The quantized model returns NaN or infinity in {unit.name} on its own images. A learning rate "
            "may be too large (--set reconstruction.lr_rounding=..., reconstruction.lr_weight_scale=...)."
        )


def _snr(targets: Sequence[Tensor], outputs: Sequence[Tensor], storage: Storage) -> float:
    pairs = [energies(t, o) for t, o in _chunks(targets, outputs, storage)]
    return signal_to_noise(sum(signal for signal, _ in pairs), sum(noise for _, noise in pairs))


def _chunks(
    targets: Sequence[Tensor], outputs: Sequence[Tensor], storage: Storage
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of pieces: checks need tensors several times as large as what they look at."""
    for target, output in zip(targets, outputs, strict=True):
        for pair in zip(target.split(CHUNK), output.split(CHUNK), strict=True):
            yield pair
            storage.release()


def _channel_axis(teacher: fx.GraphModule, unit: Unit) -> int:
    """Axis of channels in what the unit returns: the last one if its last layer is linear, else 1.

    The other way round where only so the axis is as long as the layer has channels (an image made of tokens).
    """
    nodes = {n.name: n for n in teacher.graph.nodes}
    layer, output = nodes[unit.layers[-1]], nodes[unit.outputs[-1]]
    likely, other = (-1, 1) if layer.target is aten.linear.default else (1, -1)
    channels, shape = layer.meta["val"].shape[likely], output.meta["val"].shape
    if len(shape) > 2 and shape[likely] != channels and shape[other] == channels:
        return other
    return likely
