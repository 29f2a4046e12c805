"""How flat a student's reconstruction loss is, and whether two sets of images pull its weights the same way.

Diagnostics: they need a set of images that stands for the real ones, and nothing in a run depends on them.

The reconstruction loss of images X is 1/(2|X|) times the sum over images and units of the squared distance
between the teacher's and the student's output of that unit, both networks run from the images on. Its
parameters are the float values that the student's weight codes stand for. SADAG (arXiv:2510.07018).

Gradients pass quantized activations straight through. The loss itself is the true one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit, extract
from zsq.images.gradients import (
    CHUNK,
    Gradients,
    Probe,
    directions,
    gradient_probe,
    gradients_of,
    similarity_matrix,
)
from zsq.images.settings import Scope
from zsq.quant.plain import plain_part


@dataclass(frozen=True)
class Sharpness:
    """Flatness of the reconstruction loss on one set of images.

    Attributes:
        loss: at the student's weights.
        perturbed_loss: after a step of `radius` along the loss's gradient.
        sharpness: `perturbed_loss` - `loss`.
        radius: length of that step, weight units.
        eigenvalue: of the Hessian, the one largest in magnitude; None if it was not asked for.
        num_images: how many.
    """

    loss: float
    perturbed_loss: float
    sharpness: float
    radius: float
    eigenvalue: float | None
    num_images: int

    def to_json(self) -> dict[str, float | int | None]:
        """As a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Alignment:
    """Cosines between the gradients that two sets of images give a student, averaged over layers or units.

    Attributes:
        of_means: between the mean gradients of the sets: what one step on the first does for the second.
        pairwise: mean over all pairs of an image of each set.
        nearest: mean over images of the second set of the largest cosine with one of the first.
    """

    of_means: float
    pairwise: float
    nearest: float

    def to_json(self) -> dict[str, float]:
        """As a dictionary."""
        return asdict(self)


class ReconstructionLoss:
    """The loss of the module's docstring as a function of a list of float weights."""

    def __init__(
        self, teacher: fx.GraphModule, student: fx.GraphModule, units: Sequence[Unit], images: Tensor
    ) -> None:
        """
        Args:
            teacher: captured network, folded as the student is; untouched.
            student: quantized, finished; untouched.
            units: of the teacher.
            images: (N, C, H, W), normalised, on the networks' device.
        """
        image = next(node.name for node in teacher.graph.nodes if node.op == "placeholder")
        outputs = list(dict.fromkeys(name for unit in units for name in unit.outputs))
        part = plain_part(student, [image], outputs)
        self._images, self._student = images, part.module
        self._teacher = extract(teacher, [image], outputs)
        self.weights = list(part.weights.values())

    def __call__(self, weights: Sequence[Tensor]) -> float:
        """Its value."""
        with torch.no_grad():
            return sum(float(part) for part in self._parts(weights))

    def gradient(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """In the weights."""
        return self._summed(weights, lambda loss, leaves: torch.autograd.grad(loss, leaves))

    def hessian_product(self, weights: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian times a vector, by differentiating the gradient once more.

        Exact and symmetric for the network in which every activation quantizer is replaced by the line
        through its present value with its straight-through slope; the quantizer itself has no curvature.
        """

        def product(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
            slopes = torch.autograd.grad(loss, leaves, create_graph=True)
            along = torch.stack([(g * v).sum() for g, v in zip(slopes, vector, strict=True)]).sum()
            return torch.autograd.grad(along, leaves)

        return self._summed(weights, product)

    def _parts(self, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        for start in range(0, len(self._images), CHUNK):
            chunk = self._images[start : start + CHUNK]
            with torch.no_grad():
                targets = self._teacher(chunk)
            errors = [
                (t - y).square().sum() for t, y in zip(targets, self._student(chunk, *weights), strict=True)
            ]
            yield torch.stack(errors).sum() / (2 * len(self._images))

    def _summed(
        self, weights: Sequence[Tensor], function: Callable[[Tensor, list[Tensor]], Sequence[Tensor]]
    ) -> list[Tensor]:
        leaves = [w.detach().requires_grad_() for w in weights]
        totals = [torch.zeros_like(w) for w in weights]
        for loss in self._parts(leaves):
            for total, value in zip(totals, function(loss, leaves), strict=True):
                total += value.detach()
        return totals


def sharpness(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    units: Sequence[Unit],
    images: Tensor,
    *,
    relative_radius: float = 0.002,
    power_steps: int = 0,
    rng: torch.Generator | None = None,
) -> Sharpness:
    """How much the reconstruction loss rises after a step uphill, and how curved it is.

    Args:
        teacher, student, units, images: see `ReconstructionLoss`.
        relative_radius: length of the step along the gradient, as a share of the length of all weights. Keep
            it small: 0.05 multiplied the loss of a W2A4 cifar100_resnet20s by 15.
        power_steps: steps of the power iteration for the eigenvalue; 0 leaves it out.
        rng: on the CPU, draws the start of the power iteration; None for one of seed 0.

    Returns:
        The eigenvalue is the Rayleigh quotient after the last step: a lower bound of the largest magnitude.

    Raises:
        UsageError: there are no images.

    Source: SAM (arXiv:2010.01412) for the step; SADAG (arXiv:2510.07018) for what it is measured on.
    """
    if len(images) == 0:
        raise UsageError("The sharpness of a loss needs at least one image, got none.")
    loss = ReconstructionLoss(teacher, student, units, images)
    slopes = loss.gradient(loss.weights)
    radius = relative_radius * float(_length(loss.weights))
    step = radius / _length(slopes).clamp(min=1e-30)
    here = loss(loss.weights)
    there = loss([w + step * g for w, g in zip(loss.weights, slopes, strict=True)])
    eigenvalue = None
    if power_steps:
        eigenvalue = largest_eigenvalue(
            lambda vector: loss.hessian_product(loss.weights, vector),
            [w.shape for w in loss.weights],
            steps=power_steps,
            rng=rng or torch.Generator().manual_seed(0),
            device=images.device,
        )
    return Sharpness(here, there, there - here, radius, eigenvalue, len(images))


def largest_eigenvalue(
    product: Callable[[list[Tensor]], list[Tensor]],
    shapes: Sequence[torch.Size],
    *,
    steps: int,
    rng: torch.Generator,
    device: torch.device | str = "cpu",
) -> float:
    """Eigenvalue of largest magnitude of a symmetric operator on lists of tensors, by power iteration.

    Args:
        product: the operator.
        shapes: of the tensors.
        steps: applications of the operator.
        rng: on the CPU, draws the start.
        device: where `product` computes.
    """
    vector = [torch.randn(shape, generator=rng).to(device) for shape in shapes]
    value = torch.zeros(())
    for _ in range(steps):
        length = _length(vector)
        if float(length) == 0:
            return 0.0
        vector = [v / length for v in vector]
        image = product(vector)
        value = torch.stack([(v * i).sum() for v, i in zip(vector, image, strict=True)]).sum()
        vector = image
    return float(value)


def gradient_alignment(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    units: Sequence[Unit],
    images: Tensor,
    others: Tensor,
    *,
    gradients: Scope = "last_layer",
) -> Alignment:
    """Whether two sets of images, e.g. synthetic and real, give a student the same gradients.

    Args:
        teacher: captured network, folded as the student is; untouched.
        student: quantized, hard; untouched.
        units: of the teacher.
        images, others: (N, C, H, W) and (M, C, H, W), normalised, on the networks' device.
        gradients: of which weights, see `Refinement`; all of a unit's weights are kept for every image.

    Raises:
        UsageError: a set is empty, or the scope does not fit the network, see `gradient_probe`.
    """
    if min(len(images), len(others)) == 0:
        raise UsageError(f"Alignment needs images in both sets, got {len(images)} and {len(others)}.")
    probe: Probe = gradient_probe(teacher, student, units, gradients)
    first, second = gradients_of(probe, images), gradients_of(probe, others)
    cosines = [
        torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-30)
        for a, b in zip(_means(first), _means(second), strict=True)
    ]
    matrix = similarity_matrix(directions(first), directions(second))
    return Alignment(float(torch.stack(cosines).mean()), float(matrix.mean()), float(matrix.amax(0).mean()))


def _means(gradients: Gradients) -> list[Tensor]:
    """Mean gradient of a set, one vector a piece; two factors are multiplied out."""
    found = []
    for first, *rest in gradients:
        found.append(first.mean(0) if not rest else (rest[0].T @ first / len(first)).flatten())
    return found


def _length(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean length of all tensors as one vector."""
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()
