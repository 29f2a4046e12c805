"""How many points of accuracy a student lost, estimated without data by a curve fitted where it is known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsq.out_of_memory import in_chunks

CHUNK = 64
NOISE = 0.2  # of the images' deviation, in the noisy view
SHIFT = 8  # the shifted view moves by this part of the height and of the width
LEAST = 0.01  # shares are cut to LEAST .. 1 - LEAST before their log-odds are taken
DECIBELS = (-10.0, 40.0)  # to which the signal-to-noise of a unit is cut

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # view -> logits of teacher and student, (N, K)


@dataclass(frozen=True)
class Predictors:
    """What synthetic images that nothing was learned on say of a student.

    Attributes:
        disagreement: share of the images for which the two networks name different classes, mean over views.
        flips: how often Gaussian noise as large as the error of the student's logits would change the
            teacher's class, mean over images and views; at most 0.5.
        confidence: the teacher's largest probability, mean over the images as they are.
        weakest_unit: lowest signal-to-noise of a unit, decibels.
    """

    disagreement: float
    flips: float
    confidence: float
    weakest_unit: float


def views(images: Tensor) -> dict[str, Tensor]:
    """Images (N, C, H, W) as they are, mirrored, shifted with wrap-around, and with noise."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    height, width = images.shape[-2:]
    return {
        "plain": images,
        "mirrored": images.flip(-1),
        "shifted": torch.roll(images, (height // SHIFT, width // SHIFT), (-2, -1)),
        "noisy": images + NOISE * images.std() * noise,
    }


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a network returns for images (N, C, H, W), a few at a time."""
    found = in_chunks(lambda rows: model(images[rows]), len(images), CHUNK, "estimation")
    return torch.cat([output for _, output in found])


def predictors(
    teacher: nn.Module, student: nn.Module, images: Tensor, unit_snr: Mapping[str, float]
) -> Predictors | None:
    """`Predictors` of a student; None for networks that are no classifiers, or whose logits are not finite.

    Args:
        teacher, student: images (N, C, H, W), normalised -> logits (N, K).
        images: synthetic, of which neither has learned.
        unit_snr: on them, see `zsq.evaluate.unit_signal_to_noise`.
    """
    pairs = {}
    for name, seen in views(images).items():
        pairs[name] = logits_of(teacher, seen), logits_of(student, seen)
        if pairs[name][0].ndim != 2 or pairs[name][0].shape[1] < 2:
            return None
        if not all(bool(logits.isfinite().all()) for logits in pairs[name]):
            return None
    return predictors_from_logits(pairs, unit_snr)


def predictors_from_logits(pairs: Pairs, unit_snr: Mapping[str, float]) -> Predictors:
    """`Predictors` from what both networks say of each view."""
    found = [_of_view(teacher.double(), student.double()) for teacher, student in pairs.values()]
    return Predictors(
        disagreement=sum(disagreement for disagreement, _ in found) / len(found),
        flips=sum(flips for _, flips in found) / len(found),
        confidence=float(pairs["plain"][0].double().softmax(1).amax(1).mean()),
        weakest_unit=min(unit_snr.values(), default=DECIBELS[1]),
    )


def _of_view(teacher: Tensor, student: Tensor) -> tuple[float, float]:
    disagreement = float((teacher.argmax(1) != student.argmax(1)).double().mean())
    error = student - teacher
    deviation = float((error - error.mean(1, keepdim=True)).std())  # a shift of all logits changes no class
    best = teacher.topk(2, dim=1).values
    margin = best[:, 0] - best[:, 1]
    # Noise on both logits: their difference has sqrt(2) times the deviation.
    return disagreement, float(torch.special.erfc(margin / max(2 * deviation, 1e-30)).mean()) / 2


@dataclass(frozen=True)
class Fit:
    """A curve for the drop, how wide its interval is, and how wrong it was on networks that it did not see.

    drop = 100 / (1 + exp(-z)), z = coefficients[0] + coefficients[1:] . features; the interval is the drop
    plus and minus width * spread(drop), cut to 0 .. 100.

    Attributes:
        features: names, see `feature`.
        coefficients: of the constant and of each feature.
        width: see above.
        error: mean absolute error in points, each network predicted by a fit to the others.
        error_of_small: that of the rows whose measured drop is below 15 points.
        covered: share of those rows in percent that lie in the interval, which is set by the others too.
        networks, rows: how many.
    """

    features: tuple[str, ...]
    coefficients: tuple[float, ...]
    width: float
    error: float
    error_of_small: float
    covered: float
    networks: int
    rows: int


def feature(name: str, found: Predictors) -> float:
    """What the curve takes of a predictor: log-odds of shares, bels of the weakest unit."""
    if name == "weakest_unit":
        return min(max(found.weakest_unit, DECIBELS[0]), DECIBELS[1]) / 10
    if name == "confidence":
        return found.confidence
    share = {"disagreement": found.disagreement, "flips": 2 * found.flips}[name]
    share = min(max(share, LEAST), 1 - LEAST)
    return math.log(share / (1 - share))


def spread(drop: float) -> float:
    """How the error grows with the drop, in points."""
    return 1 + drop / 4


def estimated_drop(found: Predictors, fit: Fit) -> dict[str, Any]:
    """The drop of top-1 in points, with its interval and the known error of such estimates; JSON."""
    terms = [1.0, *(feature(name, found) for name in fit.features)]
    z = sum(c * term for c, term in zip(fit.coefficients, terms, strict=True))
    drop = 100 / (1 + math.exp(-z))
    half = fit.width * spread(drop)
    return {
        "points": round(drop, 2),
        "low": round(max(0.0, drop - half), 2),
        "high": round(min(100.0, drop + half), 2),
        "known_error": {
            "mean_absolute_error": fit.error,
            "of_drops_below_15": fit.error_of_small,
            "interval_covered": fit.covered,
            "networks": fit.networks,
            "rows": fit.rows,
        },
    }


# python benchmarks/estimate.py fit --rows benchmarks/results/estimate.jsonl
FIT = Fit(
    features=("disagreement", "weakest_unit"),
    coefficients=(-1.3388, 0.6185, -1.6033),
    width=1.871,
    error=5.42,
    error_of_small=1.89,
    covered=89.4,
    networks=9,
    rows=66,
)
