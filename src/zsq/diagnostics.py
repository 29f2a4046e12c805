"""What a student makes of images that stand for the real ones: flatness, alignment and generalisation.

Nothing in a run depends on these figures, and none of them is an accuracy.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.generalisation import Generalisation, generalisation
from zsq.graph.blocks import split
from zsq.graph.equalize_norms import channel_ranges, equalize_norms
from zsq.images.settings import Scope
from zsq.models import Teacher
from zsq.pipeline import captured
from zsq.recipe import Equalization, NormEqualization, Recipe
from zsq.run import Run
from zsq.sharpness import Alignment, Sharpness, gradient_alignment, sharpness
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
    own, others = run.images.to(target), images.to(target)
    original, norms = _rewritten(captured(teacher, target), run.record["recipe"])
    if norms is not None and len(own):
        original = equalize_norms(original, channel_ranges(original, own[: norms.num_images]))
    student = run.student if target.type == "cpu" else copy.deepcopy(run.student).to(target)
    units = split(original.graph)
    flat = {
        name: sharpness(original, student, units, x, relative_radius=relative_radius, power_steps=power_steps)
        for name, x in (("own", own), ("others", others))
    }
    return Diagnostics(
        **flat,
        alignment=gradient_alignment(original, student, units, own, others, gradients=gradients),
        generalisation=generalisation(original, student, units, own, others),
    )


def _rewritten(
    graph: fx.GraphModule, described: Mapping[str, Any]
) -> tuple[fx.GraphModule, NormEqualization | None]:
    """The network that the student of a described recipe was attached to, and what images rewrite of it."""

    def settings(stage: str) -> dict[str, Any] | None:
        values = described.get(stage)
        return None if values is None else {key: value for key, value in values.items() if key != "kind"}

    weights, norms = settings("equalization"), settings("norm_equalization")
    recipe = Recipe(
        name=described["name"],
        paper=described["paper"],
        fold_batch_norm=described["fold_batch_norm"],
        equalization=None if weights is None else Equalization(**weights),
    )
    return rewritten(graph, recipe)[0], None if norms is None else NormEqualization(**norms)
