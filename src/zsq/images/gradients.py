"""Directions of the gradients that images give a student's weights, and how similar they are.

The loss of one image is 1/2 |target - output|^2, between the teacher and the student at the output of a layer
or unit. Gradients are kept as pieces, one for each layer or unit; each piece is a tuple of factors, tensors
(N, D), whose outer product (for one factor: which itself) is the gradient of an image. The cosine of two
gradients is the product over factors of the factors' cosines.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.func import grad, vmap

from zsq.errors import UsageError
from zsq.graph.blocks import Unit, extract
from zsq.graph.fold import fold_batch_norms
from zsq.graph.frozen import freeze_batch_norms
from zsq.graph.nodes import aten, output_nodes, weight_node
from zsq.images.settings import Scope
from zsq.quant.plain import PlainPart, merge_calls, plain_part, store_weights

CHUNK = 32  # images whose gradients are computed at once
EPS = 1e-6  # rows shorter than this are not brought to length 1: their direction is noise
Gradients = tuple[tuple[Tensor, ...], ...]
Probe = Callable[[Tensor, Tensor | None], Gradients]


def gradient_probe(
    teacher: fx.GraphModule, student: fx.GraphModule, units: Sequence[Unit], scope: Scope
) -> Probe:
    """A function (images, teacher's logits) -> gradients, differentiable in the images.

    Where the last weighted layer is linear and returns the logits, "last_layer" needs no backward pass: the
    gradient of an image is the outer product of the logits' residual and the layer's input. Elsewhere (a
    convolution, a linear layer with something after it) the gradients of that layer's weight are computed by
    torch.func. The given logits save a forward pass in the first case and are not used in the others; None
    computes them.

    The input is taken before the layer's own activation quantizer, as published; the gradient with respect to
    the quantized layer would have the quantized one.

    Args:
        teacher: captured network, folded as the student is.
        student: from `attach`, weights hard and ranges set; untouched.
        units: of the teacher.
        scope: see `Refinement.gradients`.

    Raises:
        UsageError: "last_layer" of a network with several outputs, or whose output needs more than its last
            layer gives.
    """
    if scope != "last_layer":
        chosen = units if scope == "all_units" else units[-1:]
        return _UnitGradients(teacher, student, [(unit.inputs, unit.outputs) for unit in chosen])
    layer, output = _last_layer(teacher.graph)
    source = layer.args[0]
    assert isinstance(source, fx.Node)
    if layer.target is aten.linear.default and layer is output and output.meta["val"].ndim == 2:
        return _FactorisedGradients(teacher, student, source.name, output.name)
    try:
        return _UnitGradients(teacher, student, [((source.name,), (output.name,))])
    except ValueError as error:
        raise UsageError(
            f"The output of this model needs more than what its last layer ({layer.name}) gives, so there "
            "are no gradients of the last layer alone. Choose gradients=last_unit or all_units."
        ) from error


class _FactorisedGradients:
    """Residual of the logits and input of the last linear layer."""

    def __init__(self, teacher: fx.GraphModule, student: fx.GraphModule, source: str, output: str) -> None:
        self._teacher = _between_images_and(teacher, [output])
        self._student = _between_images_and(student, [source, output])

    def __call__(self, images: Tensor, logits: Tensor | None) -> Gradients:
        if logits is None:
            (logits,) = self._teacher(images)
        features, answers = self._student(images)
        return ((features, logits - answers),)


class _UnitGradients:
    """Gradients of the weights between named nodes, (inputs, outputs) of each part, by torch.func."""

    def __init__(
        self,
        teacher: fx.GraphModule,
        student: fx.GraphModule,
        ends: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
    ) -> None:
        self._ends = ends
        self._parts = [plain_part(student, inputs, outputs) for inputs, outputs in ends]
        self._read = list(dict.fromkeys(name for inputs, _ in ends for name in inputs))
        self._wanted = list(dict.fromkeys(name for _, outputs in ends for name in outputs))
        self._teacher = _between_images_and(teacher, self._wanted)
        self._student = _between_images_and(student, self._read)

    def __call__(self, images: Tensor, logits: Tensor | None) -> Gradients:
        targets = dict(zip(self._wanted, self._teacher(images), strict=True))
        given = dict(zip(self._read, self._student(images), strict=True))
        return tuple(
            (sample_gradients(part, [given[n] for n in inputs], [targets[n] for n in outputs]),)
            for part, (inputs, outputs) in zip(self._parts, self._ends, strict=True)
        )


def sample_gradients(part: PlainPart, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Gradient of 1/2 |target - output|^2 of each image in all weights of a part, one after the other.

    Args:
        part: of the student.
        inputs: what the student gives it, each (N, ...).
        targets: what the teacher returns there, each (N, ...).

    Returns:
        (N, number of weights), differentiable in inputs and targets.
    """

    def loss(weights: list[Tensor], inputs: list[Tensor], targets: list[Tensor]) -> Tensor:
        outputs = part.module(*(x[None] for x in inputs), *weights)
        errors = [(t[None] - y).square().sum() for t, y in zip(targets, outputs, strict=True)]
        return torch.stack(errors).sum() / 2

    by_sample = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=CHUNK)
    found = by_sample(list(part.weights.values()), list(inputs), list(targets))
    return torch.cat([g.flatten(1) for g in found], 1)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (N, D) divided by their Euclidean length, or by 1e-6 if they are shorter."""
    return F.normalize(rows, dim=1, eps=EPS)


def directions(gradients: Gradients) -> Gradients:
    """The gradients scaled to length 1, factor by factor."""
    return tuple(tuple(unit_rows(factor) for factor in piece) for piece in gradients)


def detached(gradients: Gradients) -> Gradients:
    """The same values without their history."""
    return tuple(tuple(factor.detach() for factor in piece) for piece in gradients)


def joined(parts: Sequence[Gradients]) -> Gradients:
    """Gradients of several sets of images as those of one."""
    return tuple(
        tuple(torch.cat(factors) for factors in zip(*pieces, strict=True))
        for pieces in zip(*parts, strict=True)
    )


def similarity(first: Gradients, second: Gradients) -> Tensor:
    """Cosine between the gradients of image i in both sets, averaged over pieces.

    Args:
        first, second: directions of N images each.

    Returns:
        (N,), -1..1.
    """
    cosines = [
        torch.stack([(a * b).sum(1) for a, b in zip(*factors, strict=True)]).prod(0)
        for factors in zip(first, second, strict=True)
    ]
    return torch.stack(cosines).mean(0)


def similarity_matrix(first: Gradients, second: Gradients) -> Tensor:
    """Cosine between the gradients of image i of the first and j of the second set, averaged over pieces.

    Args:
        first, second: directions of N and of M images.

    Returns:
        (N, M), -1..1.
    """
    total: Tensor | None = None
    for factors in zip(first, second, strict=True):
        cosines: Tensor | None = None
        for a, b in zip(*factors, strict=True):
            cosines = a @ b.T if cosines is None else cosines * (a @ b.T)
        assert cosines is not None
        total = cosines if total is None else total + cosines
    assert total is not None
    return total / len(first)


def gradient_match(images: Gradients, neighbours: Gradients, *, focus: float = 0.0) -> Tensor:
    """1 minus the mean similarity of images and their neighbours; both are directions. Scalar in [0, 2].

    Args:
        images, neighbours: directions of N images each.
        focus: in the mean, an image weighs in proportion to (1 - similarity)^focus, which is a constant.

    Source: SADAG (arXiv:2510.07018), where all weigh the same.
    """
    alike = similarity(images, neighbours)
    if focus == 0:
        return 1 - alike.mean()
    weights = (1 - alike.detach()).clamp(min=EPS) ** focus
    return (weights / weights.mean() * (1 - alike)).mean()


def diversity(images: Gradients, bank: Gradients | None, *, threshold: float) -> Tensor:
    """Largest similarity, positive or negative, of each image to any other image, averaged over images.

    Mean over i of max over j of max(|M_ij| - threshold, 0), j over the other images of the batch and the
    bank. No gradient reaches the second member of a pair.

    Args:
        images: directions of a batch.
        bank: directions of finished images, or None.
        threshold: similarities up to it cost nothing.

    Returns:
        Scalar in [0, 1].

    Source: SADAG (arXiv:2510.07018).
    """
    others = detached(images) if bank is None else joined([detached(images), detached(bank)])
    matrix = similarity_matrix(images, others)
    count = len(matrix)
    own = torch.eye(count, matrix.shape[1], dtype=torch.bool, device=matrix.device)
    return (matrix.abs() - threshold).clamp(min=0).masked_fill(own, 0.0).amax(1).mean()


@torch.no_grad()
def gradients_of(probe: Probe, images: Tensor, *, chunk: int = CHUNK) -> Gradients:
    """Gradients of any number of images, computed a few at a time, without history."""
    return joined([probe(images[i : i + chunk], None) for i in range(0, len(images), chunk)])


def _last_layer(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """The last weighted layer of a network and its output."""
    outputs = output_nodes(graph)
    if len(outputs) != 1:
        raise UsageError(
            f"This model returns {len(outputs)} tensors, so it has no last layer that all of its output "
            "comes from. Choose gradients=last_unit or all_units."
        )
    return [node for node in graph.nodes if weight_node(node) is not None][-1], outputs[0]


def _between_images_and(graph_module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The network up to named nodes, as a function of the images that is cheap to differentiate in them.

    Nothing in it changes any more, so that quantized weights are computed once, and BatchNorms that directly
    follow a layer are part of its weight: the values are the same up to rounding.
    """
    image = next(node.name for node in graph_module.graph.nodes if node.op == "placeholder")
    part = extract(graph_module, [image], names)
    merge_calls(part.graph)
    store_weights(part)
    part, _ = fold_batch_norms(part)
    freeze_batch_norms(part.graph)
    part.recompile()
    return part
