"""How far what a student learned on synthetic images carries over to real ones.

Diagnostics of mixup-class prompting (arXiv:2507.21947), whose exact definitions are not published. Here, for
unit b with the float values w_b that its weight codes stand for, and the student's own input of that unit,

    L_b(X) = 1/(2|X|) sum over images of |teacher's output of b - student's output of b|^2
    gradient norm G(X) = sum over b of |dL_b(X)/dw_b|
    generalisation gap = L(real) - L(synthetic), with L = sum over b of L_b.

A student generalises if its gradient on real images is small where that on synthetic ones is. A small gap
alone says little: a set of noise can have one beside a large loss, so both losses are given.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit, extract
from zsq.images.gradients import CHUNK
from zsq.quant.plain import plain_part


@dataclass(frozen=True)
class Generalisation:
    """Losses and gradients on the images that a student was made with, and on others.

    Attributes:
        loss, other_loss: L of the module's docstring.
        gap: `other_loss` - `loss`.
        gradient_norm, other_gradient_norm: G.
        by_unit: |dL_b/dw_b| on both sets, by the unit's name.
        num_images, num_others: how many.
    """

    loss: float
    other_loss: float
    gap: float
    gradient_norm: float
    other_gradient_norm: float
    by_unit: dict[str, tuple[float, float]]
    num_images: int
    num_others: int

    def to_json(self) -> dict[str, object]:
        """As a dictionary."""
        return asdict(self)


def generalisation(
    teacher: fx.GraphModule, student: fx.GraphModule, units: Sequence[Unit], images: Tensor, others: Tensor
) -> Generalisation:
    """Measure a student on its own images and on others, e.g. real ones.

    Args:
        teacher: captured network, folded as the student is; untouched.
        student: quantized, finished; untouched.
        units: of the teacher.
        images: (N, C, H, W), normalised, that the student was made with.
        others: (M, C, H, W).

    Raises:
        UsageError: a set is empty.
    """
    if min(len(images), len(others)) == 0:
        raise UsageError(f"Generalisation needs images in both sets, got {len(images)} and {len(others)}.")
    here, there = (_losses(teacher, student, units, x) for x in (images, others))
    loss, other_loss = (sum(value for value, _ in found.values()) for found in (here, there))
    norms = {name: (here[name][1], there[name][1]) for name in here}
    return Generalisation(
        loss=loss,
        other_loss=other_loss,
        gap=other_loss - loss,
        gradient_norm=sum(a for a, _ in norms.values()),
        other_gradient_norm=sum(b for _, b in norms.values()),
        by_unit=norms,
        num_images=len(images),
        num_others=len(others),
    )


def _losses(
    teacher: fx.GraphModule, student: fx.GraphModule, units: Sequence[Unit], images: Tensor
) -> dict[str, tuple[float, float]]:
    """L_b and |dL_b/dw_b| by the unit's name."""
    image = next(node.name for node in teacher.graph.nodes if node.op == "placeholder")
    outputs = list(dict.fromkeys(name for unit in units for name in unit.outputs))
    inputs = list(dict.fromkeys(name for unit in units for name in unit.inputs))
    targets_of, inputs_of = extract(teacher, [image], outputs), extract(student, [image], inputs)
    parts = [plain_part(student, unit.inputs, unit.outputs) for unit in units]
    weights = [[w.detach().requires_grad_() for w in part.weights.values()] for part in parts]
    totals = [torch.zeros((), device=images.device) for _ in units]
    slopes = [[torch.zeros_like(w) for w in each] for each in weights]
    for chunk in images.split(CHUNK):
        with torch.no_grad():
            wanted = dict(zip(outputs, targets_of(chunk), strict=True))
            given = dict(zip(inputs, inputs_of(chunk), strict=True))
        for k, (unit, part) in enumerate(zip(units, parts, strict=True)):
            found = part.module(*(given[name] for name in unit.inputs), *weights[k])
            errors = [(y - wanted[name]).square().sum() for name, y in zip(unit.outputs, found, strict=True)]
            loss = torch.stack(errors).sum() / (2 * len(images))
            totals[k] += loss.detach()
            if weights[k]:
                for total, slope in zip(slopes[k], torch.autograd.grad(loss, weights[k]), strict=True):
                    total += slope
    return {
        unit.name: (float(totals[k]), float(sum(s.square().sum() for s in slopes[k])) ** 0.5)
        for k, unit in enumerate(units)
    }
