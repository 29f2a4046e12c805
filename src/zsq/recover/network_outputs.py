"""One pass of teacher or student as the losses of fine-tuning see it, and the losses of a pair of passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zsq.graph.blocks import Unit, extract
from zsq.graph.frozen import freeze_batch_norms
from zsq.quant.plain import merge_calls
from zsq.recover.feature_nodes import attention_nodes, logits_node, map_node
from zsq.recover.settings import FineTuning
from zsq.recover.student_losses import (
    channel_attention,
    class_activation_map,
    disagreement,
    easy_cross_entropy,
    map_distance,
    softened_divergence,
)


@dataclass(frozen=True)
class Outputs:
    """What one network gives for one batch of N images.

    Attributes:
        logits: (N, K), float32.
        maps: class activation maps (N, h, w) at the resolution of their layer; None if nothing looks at them.
        attentions: channel attentions, (N, C) for every block that is looked at.
    """

    logits: Tensor
    maps: Tensor | None
    attentions: tuple[Tensor, ...]

    def constant(self) -> "Outputs":
        """The same without history."""
        maps = None if self.maps is None else self.maps.detach()
        return Outputs(self.logits.detach(), maps, tuple(a.detach() for a in self.attentions))

    def rows(self, index: Tensor) -> "Outputs":
        """Those of some images."""
        maps = None if self.maps is None else self.maps[index]
        return Outputs(self.logits[index], maps, tuple(a[index] for a in self.attentions))


def joined(pieces: Sequence[Outputs]) -> Outputs:
    """The outputs for the images of all pieces."""
    maps = [piece.maps for piece in pieces if piece.maps is not None]
    attentions = zip(*(piece.attentions for piece in pieces), strict=True)
    return Outputs(
        torch.cat([piece.logits for piece in pieces]),
        torch.cat(maps) if maps else None,
        tuple(torch.cat(parts) for parts in attentions),
    )


def looked_at(teacher: fx.Graph, units: Sequence[Unit], settings: FineTuning) -> tuple[str, ...]:
    """Names of the nodes that the losses look at: logits, then that of the maps, then those of attentions.

    Args:
        teacher: graph of a captured network; its student has nodes of the same names.
        units: of it.
        settings: which losses.

    Raises:
        UsageError: the network has not what they look at.
    """
    names = [logits_node(teacher)]
    if settings.maps is not None:
        names.append(map_node(teacher))
    if settings.features is not None:
        names += attention_nodes(teacher, units)
    return tuple(names)


class Observed:
    """A network as a function (images, labels) -> Outputs; shares all tensors and modules with it.

    Args:
        network: captured teacher or student from `attach`; left as it is.
        names: from `looked_at`.
        settings: which losses.
    """

    def __init__(self, network: fx.GraphModule, names: Sequence[str], settings: FineTuning) -> None:
        image = next(node.name for node in network.graph.nodes if node.op == "placeholder")
        self.part = extract(network, [image], names)
        merge_calls(self.part.graph)
        self._maps = settings.maps
        if self._maps is not None:
            _track(self.part.graph, names[1])
        self.part.recompile()

    def __call__(self, images: Tensor, labels: Tensor, *, maps: bool = True) -> Outputs:
        """Run it; with `maps` gradients have to be enabled."""
        logits, *features = self.part(images)
        found = None
        if self._maps is not None:
            seen = features.pop(0)
            if maps:
                positive = self._maps.channels == "positive"
                found = class_activation_map(seen, logits, labels, positive=positive)
        attentions = tuple(channel_attention(x.float()) for x in features)
        return Outputs(logits.float(), None if found is None else found.float(), attentions)

    def logits(self, images: Tensor) -> Tensor:
        """The logits alone."""
        found: Tensor = self.part(images)[0]
        return found

    def frozen(self) -> "Observed":
        """The same with BatchNorms whose backward pass is cheaper and reaches no parameters."""
        freeze_batch_norms(self.part.graph)
        self.part.recompile()
        return self


def parts_of_loss(
    student: Outputs, teacher: Outputs, labels: Tensor, settings: FineTuning, size: tuple[int, int]
) -> dict[str, Tensor]:
    """Every part of the loss with its weight, by the name of its setting; means over the images.

    Args:
        student, teacher: on the same images; the maps are compared if both have them.
        labels: (N,) int64.
        settings: which parts.
        size: (H, W) of the images.
    """
    parts: dict[str, Tensor] = {}
    logits = student.logits, teacher.logits
    if (soft := settings.distillation) is not None:
        divergence = softened_divergence(*logits, temperature=soft.temperature)
        share = logits[0].shape[1] if soft.mean == "elements" else 1
        parts["distillation"] = soft.weight / share * divergence
    if (agreement := settings.agreement) is not None:
        parts["agreement"] = agreement.weight * disagreement(*logits, temperature=agreement.temperature)
    if (hard := settings.labels) is not None:
        parts["labels"] = hard.weight * easy_cross_entropy(*logits, labels, threshold=hard.threshold)
    if settings.features is not None:
        distances = [
            (a - b).square().mean() for a, b in zip(student.attentions, teacher.attentions, strict=True)
        ]
        parts["features"] = settings.features.weight * torch.stack(distances).sum()
    if settings.maps is not None and student.maps is not None and teacher.maps is not None:
        parts["maps"] = settings.maps.weight * map_distance(student.maps, teacher.maps, size)
    return parts


def tracked(x: Tensor) -> Tensor:
    """`x`, differentiable from here on if gradients are recorded at all; what `Observed` puts into a graph.

    Of a teacher without trained parameters, only what comes after it is then recorded.
    """
    return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()


def _track(graph: fx.Graph, name: str) -> None:
    node = next(node for node in graph.nodes if node.name == name)
    with graph.inserting_after(node):
        call = graph.call_function(tracked, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
