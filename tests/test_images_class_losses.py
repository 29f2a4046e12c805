"""Losses of images of a class, against sums by hand, and labels."""

import math

import pytest
import torch
from image_networks import SIZE, AfterReLU, Residual, captured
from torch import fx, nn

from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.images.class_losses import (
    SecondClass,
    balanced_labels,
    class_distance_loss,
    hard_sample_loss,
    number_of_classes,
    probability_loss,
    second_labels,
    soft_targets,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("hardness", [0.0, 0.5, 2.0])
def test_hard_samples_by_hand(hardness: float) -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25]], dtype=torch.float64)
    labels = torch.tensor([0, 2])
    # (1 - 0.7)^g * -log 0.7 and (1 - 0.25)^g * -log 0.25, halved
    expected = (0.3**hardness * -math.log(0.7) + 0.75**hardness * -math.log(0.25)) / 2
    assert float(hard_sample_loss(p.log(), labels, hardness)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("hardness", [0.0, 2.0])
def test_two_classes_by_hand(hardness: float) -> None:
    p = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3]], dtype=torch.float64)
    second = SecondClass(torch.tensor([1, 0]), 0.25)
    # (1 - 0.6 - 0.3)^g (3/4 log(3/4 / 0.6) + 1/4 log(1/4 / 0.3)), and with 0.3 of label 2 and 0.5 of label 0
    first = 0.1**hardness * (0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.3))
    other = 0.2**hardness * (0.75 * math.log(0.75 / 0.3) + 0.25 * math.log(0.25 / 0.5))
    loss = hard_sample_loss(p.log(), torch.tensor([0, 2]), hardness, second)
    assert float(loss) == pytest.approx((first + other) / 2, rel=1e-5)
    met = torch.tensor([[0.75, 0.25, 0.0]]).log().nan_to_num(neginf=-50.0)
    assert float(hard_sample_loss(met, torch.tensor([0]), 0.0, SecondClass(torch.tensor([1]), 0.25))) < 1e-6


@pytest.mark.parametrize(("num_images", "num_classes"), [(30, 10), (7, 10), (12, 3)])
def test_second_labels_are_others_and_balanced(num_images: int, num_classes: int) -> None:
    labels = balanced_labels(num_images, num_classes, rng())
    second = second_labels(labels, num_classes, rng(1))
    assert bool((second != labels).all()) and bool((second < num_classes).all())
    counts = second.bincount(minlength=num_classes)
    assert int(counts.max()) - int(counts.min()) <= 1
    assert torch.equal(second, second_labels(labels, num_classes, rng(1)))
    with pytest.raises(UsageError, match="at least 3"):
        second_labels(torch.tensor([0, 1]), 2, rng())


def test_hardness_zero_is_cross_entropy() -> None:
    logits, labels = torch.randn(6, 4, generator=rng()), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(
        hard_sample_loss(logits, labels, 0.0), nn.functional.cross_entropy(logits, labels)
    )


@pytest.mark.parametrize("hardness", [0.5, 2.0])
@pytest.mark.parametrize("margin", [200.0, 40.0, -200.0])
def test_gradients_are_finite_for_sure_and_hopeless_images(hardness: float, margin: float) -> None:
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    loss = hard_sample_loss(logits, torch.tensor([0]), hardness)
    (slope,) = torch.autograd.grad(loss, logits)
    assert bool(slope.isfinite().all())
    if margin < 0:  # (1 - p)^g is 1: the slope of the plain cross-entropy
        torch.testing.assert_close(slope, torch.tensor([[-1.0, 0.5, 0.5]]))


def test_the_factor_is_differentiated() -> None:
    logits, labels = torch.randn(3, 5, generator=rng()).requires_grad_(), torch.tensor([1, 4, 0])
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    plain = ((1 - p) ** 1.5 * -p.log()).mean()
    ours = hard_sample_loss(logits, labels, 1.5)
    for expected, got in zip(
        torch.autograd.grad(plain, logits), torch.autograd.grad(ours, logits), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_probability_by_hand() -> None:
    p = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    loss = probability_loss(p.log(), torch.tensor([0, 0]), torch.tensor([1.0, 0.9]))
    assert float(loss) == pytest.approx((0.3**2 + 0.5**2) / 2, rel=1e-5)


def test_soft_targets() -> None:
    targets = soft_targets(4000, share=0.5, lowest=0.6, rng=rng())
    drawn = targets[targets < 1]
    assert 0.45 < len(drawn) / 4000 < 0.55
    assert 0.6 <= float(drawn.min()) < 0.61 and float(drawn.mean()) == pytest.approx(0.8, abs=0.01)
    assert bool((soft_targets(50, share=0.5, lowest=1.0, rng=rng()) == 1).all())


def test_class_distance_by_hand() -> None:
    # class 0 at angles 0, 60 and 90 degrees, all of length 1; class 1 has one image and costs nothing
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2, 1.0])
    features = torch.stack((angles.cos(), angles.sin()), 1)
    labels = torch.tensor([0, 0, 0, 1])
    # the mean of the two others lies at 75, 45 and 30 degrees: distances 1 - cos(75, 15, 60 degrees)
    distances = [1 - math.cos(math.radians(d)) for d in (75, 15, 60)]
    for lowest, highest in ((0.1, 0.6), (0.0, 2.0), (0.5, 0.5)):
        expected = sum(max(lowest - d, 0) + max(d - highest, 0) for d in distances) / 3
        loss = class_distance_loss(features, labels, lowest=lowest, highest=highest, num_classes=3)
        assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_class_distance_pushes_and_pulls() -> None:
    features = torch.randn(6, 2, 3, generator=rng()).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    for lowest, highest in ((2.0, 2.0), (0.0, 0.0)):
        loss = class_distance_loss(features, labels, lowest=lowest, highest=highest, num_classes=3)
        (slope,) = torch.autograd.grad(loss, features)
        assert float(slope[5].abs().sum()) == 0 and float(slope[:5].abs().sum()) > 0
        moved = class_distance_loss(
            (features - 0.1 * slope).detach(), labels, lowest=lowest, highest=highest, num_classes=3
        )
        assert float(moved) < float(loss.detach())


@pytest.mark.parametrize(("num_images", "num_classes"), [(10, 10), (23, 5), (7, 100), (64, 3)])
def test_labels_are_balanced(num_images: int, num_classes: int) -> None:
    labels = balanced_labels(num_images, num_classes, rng())
    assert labels.dtype == torch.int64 and labels.shape == (num_images,)
    assert torch.equal(labels, balanced_labels(num_images, num_classes, rng()))
    for size in (num_images, num_images // 2 or 1):
        for part in labels.split(size):
            counts = torch.bincount(part, minlength=num_classes)
            assert int(counts.max() - counts.min()) <= 1
    orders = {tuple(balanced_labels(num_images, num_classes, rng(s)).tolist()) for s in range(5)}
    assert len(orders) > 1


@pytest.fixture(scope="module")
def residual() -> fx.GraphModule:
    return captured(Residual)


class Map(nn.Module):
    """Returns a map of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def test_number_of_classes(residual: fx.GraphModule) -> None:
    assert number_of_classes(residual) == 5
    assert number_of_classes(captured(AfterReLU)) == 8  # the first of two outputs
    with pytest.raises(UsageError, match=r"shape \(N, 4, 10, 10\).*zeroq"):
        number_of_classes(capture(Map().eval(), SIZE))
