"""Filters: which images of a set are kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zsq.images.gradients import Probe, directions, gradients_of, similarity_matrix
from zsq.images.scores import NormSums, bn_sensitivity


def gradient_cover(similarities: Tensor, count: int) -> Tensor:
    """Choose images greedily so that every image has a similar one among the chosen.

    Facility location: the chosen set S is grown by the image that most raises the sum over all images j of
    max over i in S of M_ij. For similarities that are not negative, the greedy sum is at least 1 - 1/e of the
    best one of that size (Nemhauser, Wolsey, Fisher 1978).

    Args:
        similarities: M, (N, N).
        count: how many, at most N.

    Returns:
        (count,) indices, in the order in which they were chosen; of equals, the first.

    Raises:
        ValueError: `count` is not in 1..N.

    Source: selection by gradient matching of SADAG (arXiv:2510.07018).
    """
    total = len(similarities)
    if not 1 <= count <= total:
        raise ValueError(f"cannot choose {count} of {total} images")
    covered = torch.full_like(similarities[0], float(similarities.min()))
    free = torch.ones(total, dtype=torch.bool, device=similarities.device)
    chosen = []
    for _ in range(count):
        gain = (similarities - covered).clamp(min=0).sum(1)
        best = int(gain.where(free, -1.0).argmax())
        chosen.append(best)
        free[best] = False
        covered = torch.maximum(covered, similarities[best])
    return torch.tensor(chosen)


def cover(probe: Probe, images: Tensor, count: int) -> Tensor:
    """`gradient_cover` of images (N, C, H, W) by the cosines of the gradients that a probe finds."""
    found = directions(gradients_of(probe, images))
    return gradient_cover(similarity_matrix(found, found), count)


def quotas(classes: Tensor, count: int) -> Tensor:
    """How many images of each class to keep so that shares stay as they are.

    Each class keeps count / N of its images, rounded down; what is left over goes to the largest fractions,
    of equals to the first class. So every class is within one image of its share.

    Args:
        classes: (N,) int64, from 0.
        count: of images to keep, at most N.

    Returns:
        (number of classes,) int64, with the sum `count`.
    """
    sizes = torch.bincount(classes)
    kept = sizes * count // len(classes)
    rest = sizes * count % len(classes)
    kept[rest.argsort(descending=True, stable=True)[: count - int(kept.sum())]] += 1
    return kept


def lowest(scores: Tensor, classes: Tensor, count: int) -> Tensor:
    """The images of each class with the lowest scores, as many as its quota.

    Args:
        scores: (N,).
        classes: (N,) int64; all 0 to compare all images with each other.
        count: how many, at most N.

    Returns:
        (count,) indices, in increasing order.
    """
    order = scores.argsort(stable=True)
    order = order[classes[order].argsort(stable=True)]  # by class, within a class by score
    sizes = torch.bincount(classes)
    first = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order), device=order.device) - first[classes[order]]
    return order[rank < quotas(classes, count)[classes[order]]].sort().values


def least_sensitive(sums: Sequence[NormSums], classes: Tensor, count: int) -> Tensor:
    """Leave out, one after another, the image without which the set is nearest to the BatchNorm statistics.

    Sensitivities are computed anew after each; classes that are down to their quota are left alone.

    Args:
        sums: from `norm_sums`, of N images.
        classes: (N,) int64.
        count: how many to keep.

    Returns:
        (count,) indices, in increasing order.
    """
    spare = torch.bincount(classes) - quotas(classes, count)
    kept = torch.arange(len(classes), device=classes.device)
    for _ in range(len(classes) - count):
        found = bn_sensitivity([s.only(kept) for s in sums])
        worst = found.where(spare[classes[kept]] > 0, -torch.inf).argmax()
        spare[classes[kept[worst]]] -= 1
        kept = kept[torch.arange(len(kept), device=kept.device) != worst]
    return kept
