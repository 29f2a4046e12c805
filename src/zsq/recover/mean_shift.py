"""Take from biases what quantization adds to the mean of each layer's output, as images show it."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from zsq.graph.blocks import Unit, extract
from zsq.graph.nodes import aten
from zsq.graph.tensors import device_of
from zsq.out_of_memory import in_chunks
from zsq.recover.correct_bias import Changes, apply_changes, correctable
from zsq.recover.reconstruct import Finished
from zsq.recover.storage import MEMORY, Storage
from zsq.recover.unit_tensors import CHUNK, Between, forward_in_chunks

PIECE = "biases"  # under which what was added to all biases is kept


@torch.no_grad()
def correct_means(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    units: Sequence[Unit],
    images: Tensor,
    *,
    finished: Finished,
    storage: Storage = MEMORY,
) -> None:
    """`correct_unit` for one unit after the other, each on what the corrected ones before it give.

    Args:
        teacher: what the student was attached to; untouched.
        student: from `attach`, with all ranges; changed.
        units: of both.
        images: (N, C, H, W), normalised, on the networks' device.
        finished: what was added is put there under PIECE, and taken over from there.
        storage: where the tensors between units are kept.
    """
    if PIECE in finished:
        apply_changes(student, finished[PIECE])
        return
    changes = Changes()
    clean, quantized = Between(teacher.graph, units, images), Between(student.graph, units, images)
    for index, unit in enumerate(units):
        changes |= correct_unit(teacher, student, unit, clean.inputs(index), quantized.inputs(index))
        for given, network in ((clean, teacher), (quantized, student)):
            part = extract(network, unit.inputs, unit.outputs)
            given.put(index, forward_in_chunks(part, given.inputs(index), storage))
    finished[PIECE] = changes


@torch.no_grad()
def correct_unit(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    unit: Unit,
    teacher_inputs: Sequence[Tensor],
    student_inputs: Sequence[Tensor],
) -> Changes:
    """Give every layer of a unit the teacher's mean output, in order of the graph; the student is changed.

    Each layer sees what the corrected ones before it give. A channel's bias gets the mean difference of
    teacher and student at the output of its layer, over images and positions. Transposed convolutions stay
    as they are.

    Args:
        teacher: what the student was attached to; untouched.
        student: from `attach`, with all ranges of the unit.
        unit: of both.
        teacher_inputs, student_inputs: what each network gives the unit, for all images.

    Returns:
        What was added, for `apply_changes`.

    Source: DFQ (arXiv:1906.04721), bias correction in its empirical form.
    """
    layers = {node.name: node for node in correctable(teacher.graph)}
    device, count = device_of(student), len(student_inputs[0])
    changes: Changes = {}
    for name in unit.layers:
        if name not in layers:
            continue
        parts = [extract(network, unit.inputs, [name]) for network in (teacher, student)]
        axis = -1 if layers[name].target is aten.linear.default else 1

        def differences(rows: slice, parts: Sequence[fx.GraphModule] = parts, axis: int = axis) -> Tensor:
            given = ([x[rows].to(device) for x in inputs] for inputs in (teacher_inputs, student_inputs))
            (wanted,), (found,) = (part(*inputs) for part, inputs in zip(parts, given, strict=True))
            return _by_image(wanted - found, rows.stop - rows.start, axis)

        pieces = in_chunks(differences, count, CHUNK, "the correction of biases")
        changes[name] = torch.cat([piece for _, piece in pieces]).mean(0)
        apply_changes(student, {name: changes[name]})
    return changes


def _by_image(difference: Tensor, count: int, axis: int) -> Tensor:
    """Mean over everything but images and channels, (N, C); an image may have several rows (windows)."""
    channels = difference.movedim(axis, -1)
    return channels.reshape(count, -1, channels.shape[-1]).mean(1)
