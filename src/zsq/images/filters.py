"""Filters: which images of a set are kept."""

import torch
from torch import Tensor

from zsq.images.gradients import Probe, directions, gradients_of, similarity_matrix


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
