"""The worst neighbours of latents: where the gradients of their images are the least like their own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zsq.images.gradients import Gradients, similarity
from zsq.images.settings import Refinement

START = 0.1  # length of the random start of a search, relative to the radius
PUBLISHED_OFFSET = 1e-9


def find_neighbours(
    latents: Tensor,
    directions_at: Callable[[Tensor], Gradients],
    own: Gradients,
    settings: Refinement,
    drawn: Tensor,
) -> Tensor:
    """Offsets of length `radius`, one a latent, at which the gradients are the least similar to `own`.

    "searched": from a random offset of a tenth of the radius, each step goes to the edge of the ball against
    the slope of the similarity. At offset 0 the slope is exactly 0, as the similarity is largest there.
    "published": one such step from offset 0, with 1e-9 added to the anchor; its direction is rounding noise.
    "carried" looks for nothing here, see `refine_batch`.

    All offsets are tried at once: the generator normalises by batch, so that images depend on all latents.

    Args:
        latents: (N, L), no gradient.
        directions_at: latents -> directions.
        own: directions at `latents`, without history.
        settings: radius, kind of search and number of steps.
        drawn: (N, L), normal numbers; the directions of the random offsets.

    Returns:
        (N, L), no gradient. Where the similarity has no slope, the offset is the random one at full length.
    """
    start = drawn / drawn.norm(dim=1, keepdim=True)
    published = settings.neighbour == "published"
    if published:
        own = tuple(tuple(factor + PUBLISHED_OFFSET for factor in piece) for piece in own)
    offsets = torch.zeros_like(start) if published else START * settings.radius * start
    for _ in range(1 if published else settings.neighbour_steps):
        offsets.requires_grad_()
        similarities = similarity(directions_at(latents + offsets), own)
        (slope,) = torch.autograd.grad(similarities.sum(), offsets)
        offsets = to_edge(-slope, settings.radius, otherwise=start)
    return offsets


def to_edge(direction: Tensor, radius: float, *, otherwise: Tensor) -> Tensor:
    """Offsets (N, L) of length `radius` in directions (N, L); where one is 0, in that of `otherwise`."""
    length = direction.norm(dim=1, keepdim=True)
    along = torch.where(length > 0, direction / length, F.normalize(otherwise, dim=1))
    return radius * along
