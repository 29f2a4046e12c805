"""What a recipe does to the student before any image is looked at: fold, equalise, ranges, biases."""

import torch
from torch import fx

from zsq.graph.equalize import absorb_bias, equalize, relu6_to_relu
from zsq.graph.fold import fold_batch_norms
from zsq.graph.moments import Normals, batch_norm_outputs, moments, needed
from zsq.graph.normal import Moments
from zsq.graph.tensors import device_of
from zsq.images.prior import InputPrior
from zsq.quant.attach import Quantizers
from zsq.quant.placement import place
from zsq.quant.statistical_ranges import set_ranges
from zsq.recipe import Recipe, StatisticalRanges
from zsq.recover.correct_bias import correct_biases, correctable


def rewritten(graph: fx.GraphModule, settings: Recipe) -> tuple[fx.GraphModule, Normals]:
    """The network that the student is attached to: folded and with weights rewritten, as the recipe says.

    Args:
        graph: captured teacher with its BatchNorm layers; left as it is.
        settings: the recipe.

    Returns:
        The network, and mean and deviation of what the layers return that a BatchNorm was folded into.
    """
    known: Normals = {}
    if settings.fold_batch_norm:
        outputs = batch_norm_outputs(graph)
        graph, folded = fold_batch_norms(graph)
        known = {pair.layer: outputs[pair.batch_norm] for pair in folded if pair.layer is not None}
    rewrites = settings.equalization
    if rewrites is not None:
        if rewrites.replace_relu6:
            graph = relu6_to_relu(graph)
        graph, known = equalize(graph, known, passes=rewrites.passes)
        if rewrites.absorb:
            graph, known = absorb_bias(graph, known, deviations=rewrites.absorb_deviations)
    return graph, known


def settle_by_statistics(
    original: fx.GraphModule,
    known: Normals,
    student: fx.GraphModule,
    quantizers: Quantizers,
    settings: Recipe,
    prior: InputPrior,
) -> None:
    """Set ranges and correct biases of a student from BatchNorm statistics, if the recipe does so; in place.

    Args:
        original, known: from `rewritten`.
        student, quantizers: from `attach`, of `original`.
        settings: the recipe.
        prior: of the images.

    Raises:
        UsageError: something that is needed cannot be derived from the model's statistics.
    """
    if not _needs_statistics(settings):
        return
    found = _moments(original, known, settings, prior)
    if isinstance(settings.calibration, StatisticalRanges):
        set_ranges(student, quantizers, found)
    if settings.bias_correction is not None:
        correct_biases(original, student, quantizers, found)


def check_statistics(graph: fx.GraphModule, settings: Recipe, prior: InputPrior) -> None:
    """Refuse a model whose statistics do not say what the recipe needs of them.

    Args: as for `rewritten` and `settle_by_statistics`.

    Raises:
        UsageError: so.
    """
    if not _needs_statistics(settings):
        return
    original, known = rewritten(graph, settings)
    found = _moments(original, known, settings, prior)
    if isinstance(settings.calibration, StatisticalRanges):
        for tensor in place(original.graph, settings.scheme).activations:
            needed(found, tensor)
    if settings.bias_correction is not None:
        for node in correctable(original.graph):
            needed(found, str(node.args[0]))


def _needs_statistics(settings: Recipe) -> bool:
    return isinstance(settings.calibration, StatisticalRanges) or settings.bias_correction is not None


def _moments(
    original: fx.GraphModule, known: Normals, settings: Recipe, prior: InputPrior
) -> dict[str, Moments]:
    ranges = settings.calibration
    placeholder = next(n for n in original.graph.nodes if n.op == "placeholder")
    channels, device = int(placeholder.meta["val"].shape[1]), device_of(original)
    mean, std = (torch.tensor(v, device=device) for v in prior.of(channels))
    deviations = (ranges if isinstance(ranges, StatisticalRanges) else StatisticalRanges()).deviations
    return moments(original, known, (mean, std), deviations=deviations)
