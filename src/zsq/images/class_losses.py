"""Losses of images that are to be of a class: functions of logits, labels and features."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.tensors import device_of
from zsq.images.class_settings import ClassGuide
from zsq.images.forward import ForwardPass
from zsq.rng import rng_for


def number_of_classes(graph_module: fx.GraphModule) -> int:
    """K, from the shape (N, K) of what a captured network returns first.

    Raises:
        UsageError: it returns something else, or fewer than two classes.
    """
    output: Any = next(n for n in graph_module.graph.nodes if n.op == "output").args[0]
    first = output[0] if isinstance(output, (tuple, list)) else output
    shape = tuple(first.meta["val"].shape)
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        text = ", ".join(("N", *map(str, shape[1:])))
        raise UsageError(
            f"This recipe asks for images of classes, but the model returns a tensor of shape ({text}). "
            "Expected logits of shape (N, classes) with at least 2 classes. Take a recipe whose images have "
            "no class (zeroq, genie), or give --set synthesis.classes=none."
        )
    return int(shape[1])


def balanced_labels(num_images: int, num_classes: int, rng: torch.Generator) -> Tensor:
    """Labels (N,), int64: all classes in turn, in one random order.

    So every stretch of the list, hence every batch, has each class equally often (but for one), and with
    fewer images than classes no class twice.

    Args:
        num_images: N.
        num_classes: K.
        rng: on the CPU; draws the order.
    """
    order = torch.randperm(num_classes, generator=rng)
    return order.repeat(-(-num_images // num_classes))[:num_images]


def labels_for(
    teacher: fx.GraphModule, classes: ClassGuide | None, num_images: int, seed: int
) -> Tensor | None:
    """The labels (N,), int64, of the images of a seed, in their order; None if they have no class.

    Raises:
        UsageError: the teacher returns no classes.
    """
    if classes is None:
        return None
    return balanced_labels(num_images, number_of_classes(teacher), rng_for(seed, "labels"))


def classes_by_batch(
    teacher: fx.GraphModule, classes: ClassGuide | None, sizes: Sequence[int], seed: int
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The labels of the images of a seed, and their second classes, for batches of such sizes.

    Each (size,), int64; None for every batch where the settings ask for none.

    Raises:
        UsageError: the teacher returns no classes, or fewer than three where there are to be second ones.
    """
    nothing = [None] * len(sizes)
    labels = labels_for(teacher, classes, sum(sizes), seed)
    if labels is None or classes is None:
        return nothing, nothing
    first = labels.split(list(sizes))
    if classes.second_share == 0:
        return first, nothing
    second = second_labels(labels, number_of_classes(teacher), rng_for(seed, "second labels"))
    return first, second.split(list(sizes))


@dataclass(frozen=True)
class SecondClass:
    """Of each image.

    Attributes:
        labels: (N,), int64, none of them that of the image's first class.
        share: probability that it is to have; the first has the rest.
    """

    labels: Tensor
    share: float

    def mixed(self, table: Tensor, labels: Tensor) -> Tensor:
        """Rows of a table, (K, ...), of the first classes `labels` and the second ones, in their shares."""
        return (1 - self.share) * table[labels] + self.share * table[self.labels]


def second_labels(labels: Tensor, num_classes: int, rng: torch.Generator) -> Tensor:
    """A second class for each image of (N,) `balanced_labels`: as balanced, and never the first.

    Args:
        labels: (N,), int64, on the CPU.
        num_classes: K.
        rng: on the CPU; draws how far the second class is from the first, for every K images.

    Raises:
        UsageError: fewer than three classes, of which two would leave none that an image is not.
    """
    if num_classes < 3:
        raise UsageError(
            f"second_share asks for images of two classes, which need a model with at least 3; this one has "
            f"{num_classes}. Give second_share=0."
        )
    rounds = -(-len(labels) // num_classes)
    distance = torch.randint(1, num_classes, (rounds,), generator=rng).repeat_interleave(num_classes)
    return (labels + distance[: len(labels)]) % num_classes


def hard_sample_loss(
    logits: Tensor, labels: Tensor, hardness: float, second: SecondClass | None = None
) -> Tensor:
    """Cross-entropy that counts an image by (1 - p)^g: mean over images of (1 - p)^g (-log p).

    With a second class of share s, -log p is the divergence of the class probabilities from (1 - s, s), and
    in the factor p is the probability of both.

    The factor is part of what is differentiated. log(1 - p) comes from the logits of the other classes, so
    that the loss and its gradient are finite for every p; for p near 1 both go to 0.

    Args:
        logits: (N, K), K >= 2.
        labels: (N,), int64; p is the softmax's probability of them.
        hardness: g >= 0; 0 is the plain cross-entropy.
        second: None: images are of one class.

    Returns:
        Scalar >= 0, float32, nats.

    Source: HAST (arXiv:2303.13826), hard sample synthesis, as in its code.
    """
    logits = logits.float()
    total = logits.logsumexp(1)
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)
    entropy = total - logits.gather(1, labels[:, None]).squeeze(1)
    if second is not None:
        own = own.scatter_(1, second.labels[:, None], True)
        s = second.share
        of_second = total - logits.gather(1, second.labels[:, None]).squeeze(1)
        entropy = (1 - s) * entropy + s * of_second + (1 - s) * math.log(1 - s) + s * math.log(s)
    if hardness == 0:
        return entropy.mean()
    log_others = logits.masked_fill(own, -torch.inf).logsumexp(1) - total
    return ((hardness * log_others).exp() * entropy).mean()


def probability_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean over images of the squared distance between the probability of the label and its target.

    Args:
        logits: (N, K).
        labels: (N,), int64.
        targets: (N,), probabilities.

    Returns:
        Scalar >= 0, float32.

    Source: soft inception loss, IntraQ (arXiv:2111.09136), as in its code.
    """
    probability = logits.float().softmax(1).gather(1, labels[:, None]).squeeze(1)
    return (probability - targets).square().mean()


def soft_targets(num_images: int, *, share: float, lowest: float, rng: torch.Generator) -> Tensor:
    """Targets of `probability_loss`, (N,): 1, and for a random share of the images uniform in [lowest, 1].

    Args:
        num_images: N.
        share: probability that an image's target is drawn.
        lowest: smallest target.
        rng: on the CPU.

    Source: IntraQ (arXiv:2111.09136), as in its code.
    """
    drawn = lowest + (1 - lowest) * torch.rand(num_images, generator=rng)
    return torch.where(torch.rand(num_images, generator=rng) < share, drawn, 1.0)


def class_distance_loss(
    features: Tensor, labels: Tensor, *, lowest: float, highest: float, num_classes: int
) -> Tensor:
    """Keeps images of a class neither too close to one another nor too far apart.

    d is the cosine distance between an image's features and the mean of those of the other images of its
    class (a constant); the loss is the mean of max(lowest - d, 0) + max(d - highest, 0) over the images that
    are not alone in their class, 0 if all are.

    Args:
        features: (N, ...), what the classifier reads; flattened.
        labels: (N,), int64.
        lowest, highest: cosine distances, 0..2, that cost nothing.
        num_classes: K.

    Returns:
        Scalar >= 0, float32.

    Source: marginal distance constraint, IntraQ (arXiv:2111.09136). In its code the mean is that of the
    images of earlier batches; here it is that of the same batch, so that batches need not wait for one
    another.
    """
    features = features.float().flatten(1)
    others = features.detach()
    members = torch.zeros(len(labels), num_classes, device=labels.device)
    members.scatter_(1, labels[:, None], 1.0)
    rest = members.sum(0)[labels] - 1
    means = ((members.t() @ others)[labels] - others) / rest.clamp(min=1)[:, None]
    distance = 1 - torch.cosine_similarity(features, means, dim=1, eps=1e-6)
    cost = (lowest - distance).clamp(min=0) + (distance - highest).clamp(min=0)
    counted = (rest > 0).float()
    return (cost * counted).sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class ClassLosses:
    """What the settings ask of the classes of a batch.

    Attributes:
        settings: which losses, and their weights.
        labels: (N,), int64.
        targets: (N,), of `probability_loss`.
        num_classes: K.
        second: None: images are of one class.
    """

    settings: ClassGuide
    labels: Tensor
    targets: Tensor
    num_classes: int
    second: SecondClass | None = None

    def __call__(self, forward: ForwardPass) -> dict[str, Tensor]:
        """Weighted losses, by name, of a pass with logits (and embedding, where a distance has a weight)."""
        settings, logits = self.settings, forward.logits
        assert logits is not None
        if settings.loss == "cross_entropy":
            own = hard_sample_loss(logits, self.labels, settings.hardness, self.second)
        else:
            own = probability_loss(logits, self.labels, self.targets)
        losses = {"class": settings.weight * own}
        if settings.distance_weight > 0:
            assert forward.embedding is not None
            distance = class_distance_loss(
                forward.embedding,
                self.labels,
                lowest=settings.distance_min,
                highest=settings.distance_max,
                num_classes=self.num_classes,
            )
            losses["distance"] = settings.distance_weight * distance
        return losses


def class_losses(
    teacher: fx.GraphModule,
    settings: ClassGuide,
    labels: Tensor,
    second: Tensor | None,
    rng: torch.Generator,
    *,
    views: int = 1,
) -> ClassLosses:
    """The losses of a batch whose classes are known.

    Args:
        teacher: captured network, on the device to compute on.
        settings: which losses.
        labels: (N,), int64.
        second: (N,), int64; None: images are of one class.
        rng: on the CPU; draws the targets of probabilities.
        views: of each image that a pass has, one set after the other.

    Raises:
        UsageError: the teacher returns no classes.
    """
    targets = soft_targets(len(labels), share=settings.soft_share, lowest=settings.soft_lowest, rng=rng)
    device = device_of(teacher)
    own, targets = (values.to(device).repeat(views) for values in (labels, targets))
    both = None if second is None else SecondClass(second.to(device).repeat(views), settings.second_share)
    return ClassLosses(settings, own, targets, number_of_classes(teacher), both)
