"""One forward pass of the teacher, as image losses see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from zsq.errors import UsageError
from zsq.graph.tensors import get_tensor

aten = torch.ops.aten
# BatchNorm with stored statistics -> positions of input, running_mean, running_var, training (or None), eps.
BATCH_NORMS: dict[Any, tuple[int, int, int, int | None, int]] = {
    aten.batch_norm.default: (0, 3, 4, 5, 7),
    aten.native_batch_norm.default: (0, 3, 4, 5, 7),
    aten.cudnn_batch_norm.default: (0, 3, 4, 5, 7),
    aten._native_batch_norm_legit.default: (0, 3, 4, 5, 7),
    aten._native_batch_norm_legit_no_training.default: (0, 3, 4, None, 6),
    aten._batch_norm_no_update.default: (0, 3, 4, None, 6),
}


@dataclass(frozen=True)
class NormInput:
    """What one BatchNorm receives, beside what it stored in training.

    Attributes:
        name: dotted name of the layer.
        features: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), activation units, float32 or bfloat16.
        mean: its running_mean, (C,), activation units.
        var: its running_var, (C,), activation units squared; a variance, accumulated from unbiased ones.
        eps: what it adds to `var`.
    """

    name: str
    features: Tensor
    mean: Tensor
    var: Tensor
    eps: float


@dataclass(frozen=True)
class ForwardPass:
    """All that an image loss may look at.

    Attributes:
        images: (N, C, H, W), normalised as the teacher expects them, float32.
        norms: inputs of the BatchNorm layers, in order of the graph; a layer that runs twice is there twice.
        logits: what the teacher returns; None if no loss asked for it.
    """

    images: Tensor
    norms: tuple[NormInput, ...]
    logits: Tensor | None


class Observer:
    """The teacher as a function images -> ForwardPass; made by `observe`, shares the teacher's tensors."""

    def __init__(
        self, graph_module: fx.GraphModule, layers: Sequence[tuple[str, Tensor, Tensor, float]]
    ) -> None:
        self._graph_module = graph_module
        self._layers = tuple(layers)  # (name, running_mean, running_var, eps)

    def __call__(self, images: Tensor, *extra: object) -> ForwardPass:
        """Run the teacher on images (N, C, H, W); `extra` goes to the further placeholders of a view."""
        features, logits = self._graph_module(images, *extra)
        norms = tuple(
            NormInput(name, x, mean, var, eps)
            for x, (name, mean, var, eps) in zip(features, self._layers, strict=True)
        )
        return ForwardPass(images=images, norms=norms, logits=logits)


def batch_norms(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The BatchNorm nodes of a graph that normalise with stored statistics, in order."""
    return tuple(node for node in graph.nodes if node.op == "call_function" and _has_statistics(node))


def observe(graph_module: fx.GraphModule, *, logits: bool = False) -> Observer:
    """A copy of the captured network that returns what its BatchNorm layers receive.

    What no loss looks at is not computed: without `logits` the copy ends before the last BatchNorm. Gradients
    flow to the images only.

    Args:
        graph_module: from `capture`, or a view of it (`swing`); left as it is.
        logits: whether `ForwardPass.logits` is wanted; the first output of the network.

    Raises:
        UsageError: the network has no BatchNorm with stored statistics.
    """
    norms = batch_norms(graph_module.graph)
    if not norms:
        raise UsageError(
            "This model has no BatchNorm layer with stored statistics (there is none, it was folded into the "
            "convolutions, or it is another kind of normalisation), and this recipe makes images from such "
            "statistics. Give images of your own with --images, or choose a recipe that needs no BatchNorm; "
            "`zsq recipes` lists them."
        )
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    features = tuple(copies[_node(node, 0)] for node in norms)
    first: Any = result[0] if isinstance(result, (tuple, list)) else result
    freeze_batch_norms(graph)
    graph.output((features, first if logits else None))
    graph.eliminate_dead_code()
    graph.lint()
    return Observer(fx.GraphModule(graph_module, graph, "Observed"), [_layer(graph_module, n) for n in norms])


def freeze_batch_norms(graph: fx.Graph) -> None:
    """Put `frozen_batch_norm` in the place of every BatchNorm node: same values, a cheaper backward pass."""
    for node in graph.nodes:
        if node.target is aten.batch_norm.default and not node.args[5]:
            x, weight, bias, mean, var, _, _, eps, _ = node.args
            node.target, node.args = frozen_batch_norm, (x, weight, bias, mean, var, eps)


def frozen_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """BatchNorm with stored statistics, differentiable in `x` only: its gradient is one scaling a channel.

    Args:
        x: (N, C, ...).
        weight: (C,) or None.
        bias: (C,) or None.
        mean: stored, (C,).
        var: stored, (C,).
        eps: added to `var`.
    """
    y: Tensor = _FrozenBatchNorm.apply(x, weight, bias, mean, var, eps)
    return y


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(scale if weight is None else weight * scale)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        # The kernel of BatchNorm scales channels in one pass, in any layout and with float32 factors.
        scaled = torch.batch_norm(grad, scale, None, zero, one, False, 0.0, 0.0, False)
        return scaled, None, None, None, None, None


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


def _layer(graph_module: fx.GraphModule, node: fx.Node) -> tuple[str, Tensor, Tensor, float]:
    _, mean, var, _, eps = BATCH_NORMS[node.target]
    mean_name, var_name = str(_node(node, mean).target), str(_node(node, var).target)
    epsilon = node.args[eps]
    if not isinstance(epsilon, (int, float)):
        raise ValueError(f"eps of {node.name} is not a number: {epsilon}")
    name = mean_name.rpartition(".")[0] or node.name
    return name, get_tensor(graph_module, mean_name), get_tensor(graph_module, var_name), float(epsilon)
