"""What single images are worth: energy, BatchNorm sensitivity, entropy of patch similarities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import extract
from zsq.graph.nodes import aten
from zsq.images.forward import Observer

CHUNK = 64  # images at once
MAX_GRID = 14  # patches a side that are compared; larger maps are averaged down to it
MIN_PATCHES = 9
MAX_PREFIX = 5  # tokens before the patches: class, distillation, registers
BANDWIDTH = 0.01  # of the kernel density estimate of cosines
REACH = 4  # bandwidths after which its Gaussian is cut off


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-T log sum_k exp(logit_k / T): low where a classifier knows what it sees.

    Args:
        logits: (N, K).
        temperature: T.

    Returns:
        (N,).

    Source: energy score of Liu et al. (arXiv:2010.03759), by which GenQ (arXiv:2312.05272) filters.
    """
    return -temperature * torch.logsumexp(logits / temperature, dim=1)


def gives_logits(graph: fx.Graph) -> bool:
    """Whether a captured network is a classifier: its one output has the shape (N, K)."""
    (returned,) = (node.args[0] for node in graph.nodes if node.op == "output")
    return isinstance(returned, fx.Node) and len(getattr(returned.meta.get("val"), "shape", ())) == 2


@torch.no_grad()
def logits_of(classifier: fx.GraphModule, images: Tensor) -> Tensor:
    """Logits (N, K) of images (N, C, H, W), normalised."""
    return torch.cat([classifier(chunk) for chunk in images.split(CHUNK)])


@dataclass(frozen=True)
class NormSums:
    """Sums over the pixels of each image of what one BatchNorm receives, relative to what it stored.

    With z = (x - running_mean) / sqrt(running_var + eps), the stored statistics have mean 0 and deviation
    `deviation` (1 but for eps).

    Attributes:
        first: sum of z over pixels, (N, C), float64.
        second: sum of z squared, (N, C), float64.
        pixels: how many there are in an image.
        deviation: sqrt(running_var / (running_var + eps)), (C,), float64.
    """

    first: Tensor
    second: Tensor
    pixels: int
    deviation: Tensor

    def only(self, rows: Tensor) -> "NormSums":
        """The same for some of the images."""
        return replace(self, first=self.first[rows], second=self.second[rows])


@torch.no_grad()
def norm_sums(observer: Observer, images: Tensor) -> tuple[NormSums, ...]:
    """Per BatchNorm layer, the sums that all statistics of any subset of the images follow from.

    Args:
        observer: of the teacher, nothing folded.
        images: (N, C, H, W), normalised.
    """
    parts = [_sums(observer, chunk) for chunk in images.split(CHUNK)]
    return tuple(
        replace(
            layer[0],
            first=torch.cat([s.first for s in layer]),
            second=torch.cat([s.second for s in layer]),
        )
        for layer in zip(*parts, strict=True)
    )


def _sums(observer: Observer, images: Tensor) -> list[NormSums]:
    found = []
    for norm in observer(images).norms:
        shape = (1, -1, *[1] * (norm.features.ndim - 2))
        spread = (norm.var.double() + norm.eps).sqrt()
        z = (norm.features.double() - norm.mean.double().view(shape)) / spread.view(shape)
        z = z.flatten(2) if z.ndim > 2 else z[..., None]
        found.append(
            NormSums(z.sum(2), z.square().sum(2), z.shape[2], (norm.var.double().sqrt() / spread).detach())
        )
    return found


def bn_distance(sums: Sequence[NormSums]) -> Tensor:
    """D: how far the statistics of a set of images are from those stored; a scalar.

    D = sum over layers and channels of (mean - running_mean)^2 + (deviation - running_deviation)^2, in units
    of the stored deviation, so that no layer counts more for larger activations. Deviations are biased ones.

    Source: GenQ (arXiv:2312.05272), which leaves the norm open.
    """
    return sum(
        (
            _distance(s.first.sum(0), s.second.sum(0), len(s.first) * s.pixels, s.deviation).sum()
            for s in sums
        ),
        torch.zeros((), dtype=torch.float64),
    )


def bn_sensitivity(sums: Sequence[NormSums]) -> Tensor:
    """S_i = D(all) - D(all but i) for every image: (N,); above 0, the set is better without it.

    In closed form from the sums: no further forward pass, N times the number of channels in operations.

    Raises:
        ValueError: fewer than two images.

    Source: GenQ (arXiv:2312.05272).
    """
    if not sums or len(sums[0].first) < 2:
        raise ValueError("sensitivity needs at least two images")
    without = torch.zeros(len(sums[0].first), dtype=torch.float64, device=sums[0].first.device)
    for s in sums:
        first, second = s.first.sum(0) - s.first, s.second.sum(0) - s.second
        without += _distance(first, second, (len(s.first) - 1) * s.pixels, s.deviation).sum(1)
    return bn_distance(sums) - without


def _distance(first: Tensor, second: Tensor, count: int, deviation: Tensor) -> Tensor:
    mean = first / count
    spread = (second / count - mean.square()).clamp(min=0).sqrt()
    return mean.square() + (spread - deviation).square()


def patch_entropy(features: Tensor) -> Tensor:
    """Entropy of the cosines between the patches of each image, in nats; low where all patches are alike.

    The density f of the T (T - 1) / 2 cosines is a Gaussian kernel estimate of bandwidth 0.01 on a grid of
    that spacing over [-1, 1] (cosines are shared between their two neighbours on it); -sum f log f * 0.01.

    Args:
        features: (N, T, D), tokens of patches.

    Returns:
        (N,).

    Source: PSAQ-ViT (arXiv:2203.02250), whose estimate has 10 points; as a filter: GenQ (arXiv:2312.05272).
    """
    unit = F.normalize(features.float(), dim=2)
    rows, columns = torch.triu_indices(unit.shape[1], unit.shape[1], 1, device=unit.device)
    cosines = (unit @ unit.mT)[:, rows, columns].clamp(-1, 1)
    bins = round(2 / BANDWIDTH) + 1
    place = (cosines + 1) / BANDWIDTH
    lower = place.floor().clamp(max=bins - 2)
    share = place - lower
    counts = torch.zeros(len(unit), bins, device=unit.device)
    counts.scatter_add_(1, lower.long(), 1 - share).scatter_add_(1, lower.long() + 1, share)
    offsets = torch.arange(-REACH, REACH + 1, device=unit.device, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / 2)
    density = F.conv1d(counts[:, None], (kernel / kernel.sum())[None, None], padding=REACH)[:, 0]
    density = density / density.sum(1, keepdim=True) / BANDWIDTH
    return -(torch.xlogy(density, density).sum(1) * BANDWIDTH)


@torch.no_grad()
def mean_patch_entropy(graph_module: fx.GraphModule, images: Tensor) -> Tensor:
    """`patch_entropy`, averaged over the inputs of the network's LayerNorm layers: (N,).

    Args:
        graph_module: captured network whose LayerNorms see patches, see `patch_nodes`.
        images: (N, C, H, W), normalised.
    """
    names = patch_nodes(graph_module.graph)
    image_name = next(n.name for n in graph_module.graph.nodes if n.op == "placeholder")
    part = extract(graph_module, [image_name], names)
    return torch.cat(
        [
            torch.stack([patch_entropy(_patches(found)) for found in part(chunk)]).mean(0)
            for chunk in images.split(CHUNK)
        ]
    )


def patch_nodes(graph: fx.Graph) -> list[str]:
    """Inputs of the LayerNorms that see patches, by name: (N, T, D) or (N, H, W, D), nine positions or more.

    Raises:
        UsageError: there is none.
    """
    names: dict[str, None] = {}
    for node in graph.nodes:
        if node.target is not aten.layer_norm.default or len(node.args[1]) != 1:
            continue
        source = node.args[0]
        shape = source.meta["val"].shape
        if len(shape) in (3, 4) and math.prod(int(n) for n in shape[1:-1]) >= MIN_PATCHES:
            names[source.name] = None
    if not names:
        raise UsageError(
            "The filter patch_entropy compares the patches that LayerNorm layers of a network see (vision "
            "transformers, ConvNeXt), and this model has none. Choose energy, or for models with BatchNorm "
            "bn_sensitivity."
        )
    return list(names)


def _patches(features: Tensor) -> Tensor:
    """(N, T, D) tokens without those before the patches, or (N, H, W, D) averaged to 14 x 14 at most."""
    if features.ndim == 3:
        prefix = features.shape[1] - math.isqrt(features.shape[1]) ** 2
        return features[:, prefix if prefix <= MAX_PREFIX else 0 :]
    height, width = (min(n, MAX_GRID) for n in features.shape[1:3])
    return F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), (height, width)).flatten(2).mT
