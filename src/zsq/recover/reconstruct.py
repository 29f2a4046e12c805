"""Reconstruct a student unit by unit: learn roundings and step sizes so that units match the teacher's."""

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.errors import JobError
from zsq.graph.blocks import Unit, extract
from zsq.graph.frozen import freeze_batch_norms
from zsq.graph.nodes import aten, weight_node
from zsq.graph.tensors import get_tensor
from zsq.out_of_memory import no_room
from zsq.quant.attach import Quantizers
from zsq.quant.calibrate import calibrate, set_range_for
from zsq.quant.quantizers import ActivationQuantizer
from zsq.recipe import Calibration, Reconstruction, StatisticalRanges
from zsq.recover.learn_unit import UnitData, learn_unit
from zsq.recover.losses import energies, signal_to_noise
from zsq.recover.storage import MEMORY, Storage
from zsq.recover.unit_maps import map_unit, unit_maps
from zsq.recover.unit_tensors import Between, chunk_pairs, forward_in_chunks
from zsq.rng import rng_for

Finished = MutableMapping[str, dict[str, Tensor]]
Log = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit: signal-to-noise of its output before and after learning, in decibels."""

    name: str
    layers: int
    snr_nearest: float
    snr: float


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
    # What the teacher's and the student's units are given.
    images = images.contiguous(memory_format=torch.channels_last)
    clean, quantized = Between(teacher.graph, units, images), Between(student.graph, units, images)
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
        teacher_inputs, student_inputs = clean.inputs(index), quantized.inputs(index)
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
                learn_unit(
                    student_part,
                    _float_weights(teacher, unit, quantizers),
                    UnitData(teacher_inputs, student_inputs, targets, _channel_axis(teacher, unit), maps),
                    settings=settings,
                    settled=settled,
                    where=unit.name,
                    rng=rng_for(seed, "reconstruction", index),
                    log=lambda step, values, name=unit.name: log(name, step, settings.steps, values),  # type: ignore[misc]
                    group=group,
                    storage=storage,
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
        clean.put(index, targets)
        quantized.put(index, outputs)
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


def _refuse_nan(unit: Unit, targets: Sequence[Tensor], outputs: Sequence[Tensor], storage: Storage) -> None:
    if any(bool((t.isfinite() & ~o.isfinite()).any()) for t, o in chunk_pairs(targets, outputs, storage)):
        raise JobError(
            f"The quantized model returns NaN or infinity in {unit.name} on its own images. A learning rate "
            "may be too large (--set reconstruction.lr_rounding=..., reconstruction.lr_weight_scale=...)."
        )


def _snr(targets: Sequence[Tensor], outputs: Sequence[Tensor], storage: Storage) -> float:
    pairs = [energies(t, o) for t, o in chunk_pairs(targets, outputs, storage)]
    return signal_to_noise(sum(signal for signal, _ in pairs), sum(noise for _, noise in pairs))


def _float_weights(teacher: fx.GraphModule, unit: Unit, quantizers: Quantizers) -> dict[str, Tensor]:
    """The teacher's weights of a unit's layers, by the names of their quantizers in the student."""
    found = {}
    for node in teacher.graph.nodes:
        if node.name in unit.layers:
            weight = weight_node(node)
            assert weight is not None
            found[quantizers.weights[node.name]] = get_tensor(teacher, str(weight.target))
    return found


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
