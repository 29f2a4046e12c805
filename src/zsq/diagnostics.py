"""What a student makes of images that stand for the real ones: flatness, alignment and generalisation.

Nothing in a run depends on these figures, and none of them is an accuracy.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.generalisation import Generalisation, generalisation
from zsq.graph.blocks import split
from zsq.graph.capture import moved
from zsq.images.settings import Scope
from zsq.kernels import reproducible
from zsq.models import Teacher
from zsq.recipe import Equalization, Recipe
from zsq.run import Run
from zsq.sharpness import Alignment, Sharpness, gradient_alignment, sharpness
from zsq.stages import captured
from zsq.without_images import rewritten


@dataclass(frozen=True)
class Diagnostics:
    """Figures of a student on the images that it was made with, and on others.

    Attributes:
        own, others: how flat the reconstruction loss is on each set.
        alignment: of the gradients that the two sets give the student.
        generalisation: losses and gradient norms on both sets.
    """

    own: Sharpness
    others: Sharpness
    alignment: Alignment
    generalisation: Generalisation

    def to_json(self) -> dict[str, Any]:
        """As nested dictionaries."""
        return asdict(self)


def diagnose(
    run: Run,
    teacher: Teacher,
    images: Tensor,
    *,
    gradients: Scope = "last_layer",
    relative_radius: float = 0.002,
    power_steps: int = 0,
    device: torch.device | str = "cpu",
) -> Diagnostics:
    """Measure the student of a run on its own images and on others, e.g. real ones.

    Args:
        run: finished; left as it is.
        teacher: the model that was quantized.
        images: (N, C, H, W), normalised.
        gradients: whose are aligned, see `Refinement.gradients`.
        relative_radius, power_steps: see `sharpness`.
        device: where to compute.

    Raises:
        UsageError: there are no images, the teacher is another one than the run's, or the network has no
            last layer whose gradients could be aligned.

    Source: SADAG (arXiv:2510.07018) for sharpness and alignment, mixup-class prompting (arXiv:2507.21947) for
    the gap and the gradient norms.
    """
    if teacher.sha256 != run.record["model"]["sha256"]:
        raise UsageError(
            f"The run was made from weights of sha256 {run.record['model']['sha256'][:12]}..., and the given "
            f"teacher has {teacher.sha256[:12]}... Give the model that was quantized."
        )
    target = torch.device(device)
    with reproducible(target):
        original, _ = rewritten(captured(teacher, target), _rewriting(run.record["recipe"]))
        student = moved(run.student, target)
        units = split(original.graph)
        own, others = run.images.to(target), images.to(target)
        size = {"relative_radius": relative_radius, "power_steps": power_steps}
        flat = {
            name: sharpness(original, student, units, x, **size)  # type: ignore[arg-type]
            for name, x in (("own", own), ("others", others))
        }
        return Diagnostics(
            **flat,
            alignment=gradient_alignment(original, student, units, own, others, gradients=gradients),
            generalisation=generalisation(original, student, units, own, others),
        )


def _rewriting(described: Mapping[str, Any]) -> Recipe:
    """The part of a described recipe that says which network the student was attached to.

    A rewrite around LayerNorms keeps what units return: a LayerNorm is in one unit with the layers after it.
    """
    rewrites = described.get("equalization")
    values = {key: value for key, value in (rewrites or {}).items() if key != "kind"}
    return Recipe(
        name=described["name"],
        paper=described["paper"],
        fold_batch_norm=described["fold_batch_norm"],
        equalization=None if rewrites is None else Equalization(**values),
    )
