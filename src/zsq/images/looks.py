"""Losses of images that need no stored statistics: patches that differ, smoothness, norms, agreeing views."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from zsq.graph.attention import attentions

MIN_PATCHES = 9
MAX_PREFIX = 5  # tokens before the patches: class, distillation, registers
DENSITY_FLOOR = 1e-4  # added to densities before the logarithm, as in PSAQ-ViT's code


def attention_patches(graph: fx.Graph) -> list[fx.Node]:
    """The attentions of a graph that see nine tokens or more, in order."""
    return [n for n in attentions(graph) if int(n.meta["val"].shape[-2]) >= MIN_PATCHES]


def patch_cosines(features: Tensor, num_images: int) -> Tensor:
    """Cosines of all pairs of patches of an image, within each of its windows: (N, pairs).

    Args:
        features: what an attention returns, (N, heads, T, D), averaged over the heads, or (N x windows x
            heads, T, D); with windows the first axis has the windows of each image in turn. Tokens before a
            square of patches are left out.
        num_images: N.
    """
    if features.ndim == 4:
        features = features.mean(1)
    tokens = features.shape[-2]
    prefix = tokens - math.isqrt(tokens) ** 2
    unit = F.normalize(features[:, prefix if prefix <= MAX_PREFIX else 0 :].float(), dim=2)
    return (unit @ unit.mT).reshape(num_images, -1)


def similarity_entropy(cosines: Tensor, *, points: int, bandwidth: float) -> Tensor:
    """Mean over images of the entropy of their cosines, in nats; differentiable in the cosines.

    The density is a Gaussian kernel estimate at evenly spaced points between the lowest and highest cosine of
    the batch (constants); -f log f is integrated over them by the trapezoidal rule.

    Args:
        cosines: (N, pairs).
        points: 2 or more.
        bandwidth: of the kernel.

    Source: PSAQ-ViT (arXiv:2203.02250), as in its code (10 points, bandwidth 0.01, 1e-4 added to the
    density).
    """
    lowest, highest = cosines.detach().aminmax()
    share = torch.linspace(0, 1, points, device=cosines.device)
    grid = lowest + (highest - lowest) * share
    density = checkpoint(_density, cosines, grid, bandwidth, use_reentrant=False, preserve_rng_state=False)
    density = density + DENSITY_FLOOR
    return torch.trapezoid(-density * density.log(), grid.expand(len(cosines), -1), dim=1).mean()


def _density(cosines: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel estimate at the points of a grid, (N, points).

    Its tensors, (N, points, pairs), are computed again for the backward pass: kept for every attention of a
    network, they would be most of the memory.
    """
    distance = (grid[None, :, None] - cosines[:, None]) / bandwidth
    return torch.exp(-distance.square() / 2).mean(2) / (bandwidth * math.sqrt(2 * math.pi))


def variation(images: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels, averaged over four directions; a scalar.

    Args:
        images: (N, C, H, W), in the units of the result.

    Source: total variation of DeepInversion (arXiv:1912.08795) as PSAQ-ViT has it, there sums over all pixels
    of a batch; means do not depend on its size.
    """
    differences = (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return torch.stack([d.square().mean().sqrt() for d in differences]).mean()


def mean_square(images: Tensor) -> Tensor:
    """Mean of the squared pixels of images (N, C, H, W), in the square of their unit; a scalar.

    Source: L2 prior of DeepInversion (arXiv:1912.08795), whose code adds norms of whole images; a mean does
    not depend on their size.
    """
    return images.square().mean()


def disagreement(logits: Tensor, other: Tensor) -> Tensor:
    """Mean over images of half the sum of both Kullback-Leibler divergences between two views, in nats.

    Args:
        logits, other: (N, K).
    """
    a, b = logits.float().log_softmax(1), other.float().log_softmax(1)
    return ((a.exp() - b.exp()) * (a - b)).sum(1).mean() / 2


def moved(images: Tensor, offset: int, *, mirror: bool) -> Tensor:
    """Images (N, C, H, W) rolled by so many pixels down and to the right, perhaps mirrored."""
    rolled = images.roll((offset, offset), (2, 3))
    return rolled.flip(3) if mirror else rolled
