"""Losses of fine-tuning: values and gradients by hand, masks, normalisers, class activation maps."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.recover.student_losses import (
    channel_attention,
    class_activation_map,
    difficulty,
    disagreement,
    easy_cross_entropy,
    map_distance,
    softened_divergence,
)

N, K = 6, 5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value(scalar: Tensor) -> float:
    return float(scalar.detach())


def test_divergence_by_hand_and_its_gradient() -> None:
    student, teacher = normal(N, K).requires_grad_(), normal(N, K, seed=1)
    temperature = 4.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum() / N
    found = softened_divergence(student, teacher, temperature=temperature)
    assert value(found) == pytest.approx(value(by_hand))
    (grad,) = torch.autograd.grad(found, student)
    assert torch.allclose(grad, temperature * (q - p) / N)
    # The mean over elements, which GDFQ takes, is smaller by the number of classes.
    elements = temperature**2 * (p * (p.log() - q.log())).mean()
    assert value(found) / K == pytest.approx(value(elements))


def test_divergence_ignores_a_constant_per_image() -> None:
    teacher = normal(N, K)
    student = (teacher + normal(N, 1, seed=1)).requires_grad_()
    found = softened_divergence(student, teacher, temperature=20.0)
    (grad,) = torch.autograd.grad(found, student)
    assert value(found) == pytest.approx(0, abs=1e-9) and float(grad.abs().max()) < 1e-9


def test_disagreement_is_lowest_where_logits_differ_by_a_constant() -> None:
    teacher, temperature = normal(N, K), 20.0
    lowest = -(temperature**2) * math.log(K)
    same = disagreement(teacher + 3, teacher, temperature=temperature)
    assert value(same) == pytest.approx(lowest)
    student = (teacher + normal(N, K, seed=1)).requires_grad_()
    found = disagreement(student, teacher, temperature=temperature)
    assert value(found) > lowest
    p = ((teacher - student) / temperature).softmax(1)
    assert value(found) == pytest.approx(value(temperature**2 * (p * p.log()).sum(1).mean()))
    # A step down the slope brings them together.
    (grad,) = torch.autograd.grad(found, student)
    closer = disagreement(student - 0.1 * grad, teacher, temperature=temperature)
    assert value(closer) < value(found)
    assert torch.autograd.gradcheck(lambda s: disagreement(s, teacher, temperature=2.0), student)


def teacher_of(probabilities: list[float], labels: Tensor) -> Tensor:
    """Logits that give each image's label this probability, the rest in equal parts."""
    rows = torch.full((len(labels), K), 0.0, dtype=torch.float64)
    for row, (p, label) in enumerate(zip(probabilities, labels.tolist(), strict=True)):
        rows[row] = (1 - p) / (K - 1)
        rows[row, label] = p
    return rows.log()


def test_hard_labels_of_easy_images_only() -> None:
    """Section (f), test 5: zero gradient above the threshold, (softmax - onehot) / B below it."""
    labels = torch.tensor([0, 1, 2, 3])
    teacher = teacher_of([0.9, 0.51, 0.49, 0.1], labels)
    assert difficulty(teacher, labels).tolist() == pytest.approx([0.1, 0.49, 0.51, 0.9])
    student = normal(4, K).requires_grad_()

    def gradient(threshold: float) -> Tensor:
        loss = easy_cross_entropy(student, teacher, labels, threshold=threshold)
        (grad,) = torch.autograd.grad(loss, student)
        return grad

    expected = (student.softmax(1) - F.one_hot(labels, K)) / 4
    grad = gradient(0.5)
    assert torch.equal(grad[2:], torch.zeros(2, K, dtype=torch.float64))
    assert torch.allclose(grad[:2], expected[:2])
    assert torch.allclose(gradient(1.0), expected)
    assert not bool(gradient(0.05).any())
    plain = easy_cross_entropy(student, teacher, labels, threshold=1.0)
    assert value(plain) == pytest.approx(value(F.cross_entropy(student, labels)))


def test_channel_attention_by_hand() -> None:
    """Channels 3 and -4 everywhere: mean squares 9 and 16, norm sqrt(81 + 256)."""
    features = torch.tensor([3.0, -4.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    norm = math.sqrt(81 + 256)
    assert channel_attention(features).tolist()[0] == pytest.approx([9 / norm, 16 / norm])
    assert torch.allclose(channel_attention(5 * features), channel_attention(features))
    assert not bool(channel_attention(torch.zeros(2, 3, 4, 4)).any())


class Pooled(nn.Module):
    """A convolution, a global average, a linear layer: the case in which Grad-CAM is CAM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 3, 1, bias=False), nn.Linear(3, K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x)
        return features, self.linear(features.mean((2, 3)))


def pooled() -> Pooled:
    network = Pooled().double()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + index))
    return network


@pytest.mark.parametrize("positive", [False, True])
def test_map_of_a_linear_network_is_its_class_activation_map(positive: bool) -> None:
    """The slope of channel k is the classifier's weight for the class over H W; section (f), test 8."""
    network, x, labels = pooled(), normal(4, 2, 3, 5), torch.tensor([0, 1, 4, 1])
    features, logits = network(x)
    found = class_activation_map(features, logits, labels, positive=positive)
    weight = network.linear.weight[labels] / 15
    if positive:
        weight = weight.clamp(min=0)
    by_hand = torch.einsum("nk,nkhw->nhw", weight, features).relu()
    assert found.shape == (4, 3, 5) and torch.allclose(found, by_hand)
    assert bool((found > 0).any())


def test_slopes_are_constants_and_features_are_not() -> None:
    """Section (f), test 10: no gradient into the classifier, one into the convolution."""
    network, x, labels = pooled(), normal(4, 2, 3, 5), torch.tensor([0, 1, 4, 1])
    features, logits = network(x)
    maps = class_activation_map(features, logits, labels, positive=False)
    map_distance(maps, maps.detach().flip(0), (6, 10)).backward()
    assert network.linear.weight.grad is None
    assert network.conv.weight.grad is not None and bool(network.conv.weight.grad.any())


def test_distance_of_maps() -> None:
    """Section (f), test 7; and by hand: maps [[0, 1]] and [[2, 0]] are [[0, 1]] and [[1, 0]], mean 1."""
    a, b = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[2.0, 0.0]]])
    assert float(map_distance(a, b, (1, 2))) == pytest.approx(1.0)
    # Enlarged to four columns: 0, 1/4, 3/4, 1 against its mirror image: differences 1, 1/2, 1/2, 1.
    assert float(map_distance(a, b, (1, 4))) == pytest.approx((1 + 0.25 + 0.25 + 1) / 4)
    maps = normal(3, 4, 4).abs()
    assert float(map_distance(maps, maps, (8, 8))) == 0.0
    assert float(map_distance(maps, 7 * maps, (8, 8))) == pytest.approx(0.0, abs=1e-12)
    assert float(map_distance(maps, maps + 3, (8, 8))) == pytest.approx(0.0, abs=1e-12)
    assert float(map_distance(maps, maps.roll(1, 2), (8, 8))) > 1e-3


def test_maps_without_contrast_do_no_harm() -> None:
    maps = torch.zeros(2, 3, 3, requires_grad=True)
    loss = map_distance(maps, torch.ones(2, 3, 3), (6, 6))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert maps.grad is not None and bool(maps.grad.isfinite().all())
