"""What is known of activations without images: BatchNorm's own statistics, carried through the graph.

After a BatchNorm, channel c is taken to be normal with mean beta_c and deviation |gamma_c|. From there mean,
deviation and bounds of every channel follow operation by operation; different tensors, and different channels
that a layer adds up, are taken to be independent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.fold import BATCH_NORM
from zsq.graph.moment_rules import derived
from zsq.graph.normal import Moments
from zsq.graph.tensors import get_tensor

Normals = Mapping[str, tuple[Tensor, Tensor]]  # node -> mean and deviation of its channels


def batch_norm_outputs(graph_module: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean beta and deviation |gamma|, each (C,), of what every BatchNorm with stored statistics returns."""
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is BATCH_NORM and node.args[3] is not None:
            gamma, beta = (
                None if a is None else get_tensor(graph_module, str(a.target)).detach()
                for a in node.args[1:3]
            )
            like = get_tensor(graph_module, str(node.args[3].target)).detach()
            found[node.name] = (
                torch.zeros_like(like) if beta is None else beta,
                torch.ones_like(like) if gamma is None else gamma.abs(),
            )
    return found


def moments(
    graph_module: fx.GraphModule, known: Normals, images: tuple[Tensor, Tensor], *, deviations: float
) -> dict[str, Moments]:
    """Moments of all activations that they can be derived for, by node name.

    ReLU and clipping: moments of a clipped normal distribution in closed form. Other element-wise operations:
    quadrature. Average pooling keeps deviations, maximum pooling means too (its true mean is larger). Padding
    with zeros counts for the bounds only.

    Args:
        graph_module: a captured network, folded or not.
        known: what the outputs of some nodes are, e.g. of layers that a BatchNorm was folded into; taken
            instead of what their inputs would give.
        images: mean and deviation of the images' channels, (C,) each.
        deviations: bounds of a normal distribution lie so many deviations from its mean.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ,
    arXiv:1906.04721), section 4.2.1 and appendix C for the clipped normal distribution.
    """
    normals = {**batch_norm_outputs(graph_module), **known}
    found: dict[str, Moments] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            found[node.name] = Moments.normal(*images, deviations)
        elif node.name in normals:
            found[node.name] = Moments.normal(*normals[node.name], deviations)
        elif node.op == "call_function":
            result = derived(graph_module, node, found, deviations)
            if result is not None and _fits(node, result):
                found[node.name] = result
    return found


def needed(found: Mapping[str, Moments], name: str) -> Moments:
    """The moments of a node.

    Raises:
        UsageError: they could not be derived.
    """
    if name not in found:
        raise UsageError(
            f"What the model computes at {name!r} cannot be derived from its BatchNorm statistics: there is "
            "no BatchNorm before it, or an operation between that this recipe does not know. Take a recipe "
            "that makes images instead: zeroq for ranges alone, or genie."
        )
    return found[name]


def _fits(node: fx.Node, result: Moments) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == len(result.mean)
