"""One forward pass of the teacher, as image losses see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.fold import BATCH_NORM, fold_into, foldable
from zsq.graph.frozen import freeze_batch_norms, freeze_convolutions
from zsq.graph.nodes import aten, weight_node
from zsq.graph.tensors import get_tensor
from zsq.images.looks import attention_patches
from zsq.images.setting_checks import Units

# BatchNorm with stored statistics -> positions of input, running_mean, running_var, training (or None), eps.
BATCH_NORMS: dict[Any, tuple[int, int, int, int | None, int]] = {
    aten.batch_norm.default: (0, 3, 4, 5, 7),
    aten.native_batch_norm.default: (0, 3, 4, 5, 7),
    aten.cudnn_batch_norm.default: (0, 3, 4, 5, 7),
    aten._native_batch_norm_legit.default: (0, 3, 4, 5, 7),
    aten._native_batch_norm_legit_no_training.default: (0, 3, 4, None, 6),
    aten._batch_norm_no_update.default: (0, 3, 4, None, 6),
}


# Name, running_mean, running_var, eps and, if the layer is folded, scale; see NormInput.
_Layer = tuple[str, Tensor, Tensor, float, Tensor | None]
# Of a folded BatchNorm, |shift| in deviations of its output; beyond it bfloat16 rounds the deviation away.
LARGEST_SHIFT = 16.0
SMALLEST_VARIANCE = 1e-12  # that squared gaps are divided by
# Variance of one layer in those of the middle one, beyond which gaps are in each layer's own units.
LARGEST_VARIANCE = 300.0


@dataclass(frozen=True)
class NormInput:
    """What one BatchNorm receives, beside what it stored in training.

    Attributes:
        name: dotted name of the layer.
        features: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), activation units, float32 or bfloat16.
        mean: its running_mean, (C,), activation units.
        var: its running_var, (C,), activation units squared; a variance, accumulated from unbiased ones.
        eps: what it adds to `var`.
        scale: None, or (C,): the layer was folded into the one before it. Then `features` are what it
            returns, `scale` times what it receives but for a constant, and `mean` and `var` belong to that.
    """

    name: str
    features: Tensor
    mean: Tensor
    var: Tensor
    eps: float
    scale: Tensor | None = None

    def mean_variance(self) -> Tensor:
        """Mean over channels of the stored variances of what the layer receives, units squared; a scalar."""
        var = self.var if self.scale is None else self.var / self.scale.square()
        return var.mean().clamp(min=SMALLEST_VARIANCE)


@dataclass(frozen=True)
class ForwardPass:
    """All that an image loss may look at.

    Attributes:
        images: (N, C, H, W), normalised as the teacher expects them, float32.
        norms: inputs of the BatchNorm layers, in order of the graph; a layer that runs twice is there twice.
        logits: what the teacher returns; None if no loss asked for it.
        embedding: what its last layer receives, (N, ...); None if no loss asked for it.
        patches: what its attentions return, in order of the graph, see `patch_cosines`; empty if no loss
            asked for it.
    """

    images: Tensor
    norms: tuple[NormInput, ...]
    logits: Tensor | None
    embedding: Tensor | None = None
    patches: tuple[Tensor, ...] = ()


class Observer:
    """The teacher as a function images -> ForwardPass; made by `observe`, shares the teacher's tensors."""

    def __init__(self, graph_module: fx.GraphModule, layers: Sequence[_Layer]) -> None:
        self._graph_module = graph_module
        self._layers = tuple(layers)

    def __call__(self, images: Tensor, *extra: object) -> ForwardPass:
        """Run the teacher on images (N, C, H, W); `extra` goes to the further placeholders of a view."""
        features, logits, embedding, patches = self._graph_module(images, *extra)
        norms = tuple(
            NormInput(name, x, mean, var, eps, scale)
            for x, (name, mean, var, eps, scale) in zip(features, self._layers, strict=True)
        )
        return ForwardPass(images=images, norms=norms, logits=logits, embedding=embedding, patches=patches)


def batch_norms(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The BatchNorm nodes of a graph that normalise with stored statistics, in order."""
    return tuple(node for node in graph.nodes if node.op == "call_function" and _has_statistics(node))


def resolved_units(graph_module: fx.GraphModule, units: Units) -> Units:
    """What "auto" stands for, see `Units`: "deviations" where one layer would count for all.

    That is a network one of whose BatchNorms stored a variance of more than 300 times that of the middle one.
    Those that take pixels as 0..255 have 1900 and 9100 in their first layer (cifar10_resnet8k,
    imagenet_etinynet_1.0), 11 other networks 3 to 100 in one or another.

    Args:
        graph_module: captured network.
        units: as in the settings.
    """
    if units != "auto":
        return units
    norms = batch_norms(graph_module.graph)
    if not norms:
        return "activations"
    stored = torch.stack([_layer(graph_module, node)[2].float().mean() for node in norms])
    far = bool(stored.max() > LARGEST_VARIANCE * stored.median())
    return "deviations" if far else "activations"


def observe(
    graph_module: fx.GraphModule,
    *,
    logits: bool = False,
    embedding: bool = False,
    fold: bool = False,
    statistics: bool = True,
    patches: bool = False,
) -> Observer:
    """A copy of the captured network that returns what its BatchNorm layers receive.

    What no loss looks at is not computed: without `logits` the copy ends before the last BatchNorm. Gradients
    flow to the images only.

    With `fold`, a BatchNorm that directly follows a convolution or linear layer, and alone, is folded into
    it, and its `NormInput` tells of its output: a BatchNorm with stored statistics maps each channel by
    y = scale x + shift, so the statistics of y determine those of x, and no pass over x is needed. Layers
    with a channel whose scale is 0, or so small beside its shift that x could not be told from y, stay.

    Args:
        graph_module: from `capture`, or a view of it (`swing`); left as it is.
        logits: whether `ForwardPass.logits` is wanted; the first output of the network.
        embedding: whether `ForwardPass.embedding` is wanted: the input of the last layer with a weight on the
            way to the first output.
        fold: as above; losses then are the same up to rounding.
        statistics: whether `ForwardPass.norms` is wanted.
        patches: whether `ForwardPass.patches` is wanted.

    Raises:
        UsageError: `statistics` of a network that has no BatchNorm with stored ones.
    """
    norms = batch_norms(graph_module.graph) if statistics else ()
    if statistics and not norms:
        raise UsageError(
            "This model has no BatchNorm layer with stored statistics (there is none, it was folded into the "
            "convolutions, or it is another kind of normalisation), and this recipe makes images from such "
            "statistics. Take --recipe psaq_vit, which makes images without them, or give images of your own "
            "with --images."
        )
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    first: Any = result[0] if isinstance(result, (tuple, list)) else result
    features = tuple(copies[_node(node, 0)] for node in norms)
    last = _node(_last_layer(first), 0) if embedding else None
    seen = tuple(copies[n] for n in attention_patches(graph_module.graph)) if patches else ()
    returned = graph.output((features, first if logits else None, last, seen))
    graph.eliminate_dead_code()
    module = fx.GraphModule(graph_module, graph, "Observed")
    layers = [_layer(graph_module, node) for node in norms]
    if fold:
        alive = set(module.graph.nodes)
        for position, norm in enumerate(copies[node] for node in norms):
            if norm in alive and norm.target is BATCH_NORM:
                layers[position] = _fold(module, norm, returned, layers[position])
    freeze_batch_norms(module.graph)
    freeze_convolutions(module.graph)
    module.graph.lint()
    module.recompile()
    return Observer(module, layers)


def _last_layer(output: fx.Node) -> fx.Node:
    """The layer with a weight that is the nearest before a node; the node itself if there is none."""
    pending, seen = [output], {output}
    while pending:
        node = pending.pop(0)
        if weight_node(node) is not None:
            return node
        before = [n for n in node.all_input_nodes if n not in seen]
        pending.extend(before)
        seen.update(before)
    return output


def _node(node: fx.Node, position: int) -> fx.Node:
    argument = node.args[position]
    if not isinstance(argument, fx.Node):
        raise ValueError(f"argument {position} of {node.name} is not a tensor: {argument}")
    return argument


def _has_statistics(node: fx.Node) -> bool:
    if node.target not in BATCH_NORMS:
        return False
    _, mean, var, training, _ = BATCH_NORMS[node.target]
    stored = all(isinstance(a, fx.Node) and a.op == "get_attr" for a in (node.args[mean], node.args[var]))
    return stored and (training is None or node.args[training] is False)


def _layer(graph_module: fx.GraphModule, node: fx.Node) -> _Layer:
    _, mean, var, _, eps = BATCH_NORMS[node.target]
    mean_name, var_name = str(_node(node, mean).target), str(_node(node, var).target)
    epsilon = node.args[eps]
    if not isinstance(epsilon, (int, float)):
        raise ValueError(f"eps of {node.name} is not a number: {epsilon}")
    name = mean_name.rpartition(".")[0] or node.name
    return name, get_tensor(graph_module, mean_name), get_tensor(graph_module, var_name), float(epsilon), None


def _fold(module: fx.GraphModule, norm: fx.Node, returned: fx.Node, layer: _Layer) -> _Layer:
    """Fold a BatchNorm of the observer's graph if that is exact; what it is compared with afterwards."""
    before = _node(norm, 0)
    name, mean, var, eps, _ = layer
    gamma, beta = (
        get_tensor(module, str(a.target)).detach() if isinstance(a, fx.Node) else None for a in norm.args[1:3]
    )
    gamma = torch.ones_like(var) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    if not foldable(before, norm, besides=(returned,)):
        return layer
    if bool((gamma.abs() * LARGEST_SHIFT < beta.abs()).any() or (gamma == 0).any()):
        return layer
    scale = gamma * torch.rsqrt(var + eps)
    fold_into(module, before, norm)
    return name, beta, var * scale.square(), eps, scale
