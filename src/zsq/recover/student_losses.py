"""What a student is fine-tuned on: distances between its outputs and the teacher's. Pure functions.

In all of them `logits` and `teacher_logits` are (N, K); a loss is a scalar, a mean over the N images.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST_SPAN = 1e-10  # of a map before it is stretched to 0 .. 1


def softened_divergence(logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over images.

    Its gradient in the logits is T (softmax(student / T) - softmax(teacher / T)) / N.

    Source: Hinton et al. (arXiv:1503.02531), section 2, for the factor T^2; IntraQ, HAST and SynQ
    (arXiv:2603.18423) average over images. Divided by K, it is the mean over elements of GDFQ
    (arXiv:2003.03603).
    """
    own = F.log_softmax(logits / temperature, dim=1)
    wanted = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def disagreement(logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """-T^2 times the entropy (nats) of softmax((teacher - student) / T), averaged over images.

    Lowest, -T^2 log K, where the logits differ by the same number in all classes.

    Source: AdaSG (arXiv:2302.09572), loss of the student, as in its code; AdaDFQ (arXiv:2303.06869) likewise.
    """
    gap = F.log_softmax((teacher_logits - logits) / temperature, dim=1)
    return (gap.exp() * gap).sum(1).mean() * temperature**2


def relative_agreement(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How much two networks agree on each image, (N,): 0 for the image where they do least, at most 1.

    With h the entropy (nats) of softmax(teacher - student), (h - min h) / (log K - min h); min over the
    images. 1 where the logits differ by the same number in all classes. All 1 if that is so on all images.

    Source: AdaDFQ (arXiv:2303.06869), as in its code.
    """
    gap = F.log_softmax(teacher_logits - logits, dim=1)
    disorder = math.log(logits.shape[1]) + (gap.exp() * gap).sum(1)  # log K - h
    return 1 - disorder / disorder.max().clamp(min=SMALLEST_SPAN)


def adaptability_bounds(agreement: Tensor, *, lowest: float, highest: float) -> Tensor:
    """Mean over images (N,) of max(lowest - a, 0) + max(a - highest, 0): scalar >= 0.

    Source: AdaSG (arXiv:2302.09572), AdaDFQ (arXiv:2303.06869).
    """
    return ((lowest - agreement).clamp(min=0) + (agreement - highest).clamp(min=0)).mean()


def difficulty(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """1 minus the teacher's probability of the label, (N,), in 0 .. 1.

    Source: HAST (arXiv:2303.13826); SynQ (arXiv:2603.18423).
    """
    return 1 - teacher_logits.softmax(1).gather(1, labels[:, None])[:, 0]


def easy_cross_entropy(logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, threshold: float) -> Tensor:
    """Sum of the cross-entropies of images whose `difficulty` is at most the threshold, divided by N.

    Args:
        labels: (N,) int64.
        threshold: at least 1 takes all images.

    Source: SynQ (arXiv:2603.18423), equation 6. Its code sets logits of the others to 0, which adds log K to
    the value for each of them and nothing to the gradient.
    """
    easy = (difficulty(teacher_logits, labels) <= threshold).to(logits.dtype)
    return (F.cross_entropy(logits, labels, reduction="none") * easy).mean()


def channel_attention(features: Tensor) -> Tensor:
    """Mean squares over positions, (N, C), of features (N, C, H, W); each row scaled to Euclidean norm 1.

    Source: HAST (arXiv:2303.13826), feature alignment, as in its code.
    """
    return F.normalize(features.square().mean((2, 3)), dim=1)


def class_activation_map(features: Tensor, logits: Tensor, labels: Tensor, *, positive: bool) -> Tensor:
    """Grad-CAM of the labelled class: sum over channels of slope times feature, where it is positive.

    A channel's slope is the mean over positions of the derivative of the image's labelled logit. Slopes are
    constants: gradients reach the network through the features alone.

    Args:
        features: (N, C, H, W), from which `logits` are computed, with history.
        logits: (N, K).
        labels: (N,) int64.
        positive: drop channels of negative slope.

    Returns:
        (N, H, W) >= 0.

    Source: Selvaraju et al. (arXiv:1610.02391), equations 1 and 2, as SynQ (arXiv:2603.18423) has it; with
    `positive`, as in SynQ's code, where slopes are at least 1e-10.
    """
    score = logits.gather(1, labels[:, None]).sum()
    (derivative,) = torch.autograd.grad(score, features, retain_graph=True)
    slopes = derivative.mean((2, 3), keepdim=True)
    if positive:
        slopes = slopes.clamp(min=0)
    return (slopes * features).sum(1).relu()


def map_distance(maps: Tensor, teacher_maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean squared difference of maps (N, h, w) that are enlarged and stretched: scalar in 0 .. 1.

    Each map is enlarged to `size` (bilinearly), then shifted and scaled to 0 .. 1, so that a positive factor
    does not matter. A map that is the same everywhere becomes 0.

    Args:
        size: (H, W), of the images.

    Source: SynQ (arXiv:2603.18423), whose code averages the squares over images and pixels; the paper has
    their sum.
    """
    return F.mse_loss(_stretched(maps, size), _stretched(teacher_maps, size))


def _stretched(maps: Tensor, size: tuple[int, int]) -> Tensor:
    large = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)
    flat = large.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return (large.flatten(1) - low) / (high - low + SMALLEST_SPAN)
