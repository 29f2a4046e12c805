"""Sharpness and alignment: against finite differences, dense Hessians and the theory on a quadratic."""

import pytest
import torch
from image_networks import SIZE, Residual, photographs
from student_networks import bits_of, calibrated
from torch import Tensor

from zsq.errors import UsageError
from zsq.graph.blocks import extract
from zsq.sharpness import (
    ReconstructionLoss,
    gradient_alignment,
    largest_eigenvalue,
    sharpness,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_that_of_the_student() -> None:
    teacher, student, units = calibrated(Residual)
    x = photographs(40, SIZE)  # more than one chunk
    loss = ReconstructionLoss(teacher, student, units, x)
    outputs = [name for unit in units for name in unit.outputs]
    pairs = zip(extract(teacher, ["x"], outputs)(x), extract(student, ["x"], outputs)(x), strict=True)
    wanted = sum(float((t - y).double().square().sum()) for t, y in pairs) / 80
    assert loss(loss.weights) == pytest.approx(wanted, rel=1e-5)


def test_gradient_and_hessian_against_finite_differences() -> None:
    """In float64 and with float activations, where the loss is smooth but for the ReLUs."""
    teacher, student, units = (m.double() if hasattr(m, "double") else m for m in calibrated(Residual, "W3"))
    loss = ReconstructionLoss(teacher, student, units, photographs(5, SIZE).double())
    vector = [torch.randn(w.shape, generator=rng(), dtype=torch.float64) for w in loss.weights]
    eps = 1e-6
    ahead, behind = (
        [w + sign * eps * v for w, v in zip(loss.weights, vector, strict=True)] for sign in (1, -1)
    )
    slope = sum(float((g * v).sum()) for g, v in zip(loss.gradient(loss.weights), vector, strict=True))
    assert slope == pytest.approx((loss(ahead) - loss(behind)) / (2 * eps), rel=1e-5)
    for product, a, b in zip(
        loss.hessian_product(loss.weights, vector), loss.gradient(ahead), loss.gradient(behind), strict=True
    ):
        torch.testing.assert_close(product, (a - b) / (2 * eps), rtol=1e-4, atol=1e-5)


def test_hessian_is_symmetric_with_quantized_activations() -> None:
    networks = calibrated(Residual, "W3A3")
    teacher, student, units = (m.double() if hasattr(m, "double") else m for m in networks)
    loss = ReconstructionLoss(teacher, student, units, photographs(4, SIZE).double())
    u, v = (
        [torch.randn(w.shape, generator=rng(seed), dtype=torch.float64) for w in loss.weights]
        for seed in (0, 1)
    )

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))

    forth = dot(u, loss.hessian_product(loss.weights, v))
    assert forth == pytest.approx(dot(v, loss.hessian_product(loss.weights, u)), rel=1e-9)


def test_largest_eigenvalue_of_a_known_matrix() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=rng(), dtype=torch.float64))[0].float()
    for values in ([5.0, 2.0, 1.0, 0.5, 0.1, 0.0], [-5.0, 2.0, 1.0, 0.5, 0.1, 0.0]):
        matrix = basis @ torch.diag(torch.tensor(values)) @ basis.T

        def product(vector: list[Tensor], matrix: Tensor = matrix) -> list[Tensor]:
            whole = matrix @ torch.cat([v.flatten() for v in vector])
            return [whole[:2], whole[2:].reshape(2, 2)]

        found = largest_eigenvalue(product, [torch.Size([2]), torch.Size([2, 2])], steps=40, rng=rng())
        assert found == pytest.approx(values[0], rel=1e-4)
    assert largest_eigenvalue(lambda v: [0 * v[0]], [torch.Size([3])], steps=3, rng=rng()) == 0.0


def test_sharpness_of_a_student() -> None:
    teacher, student, units = calibrated(Residual, "W2A3")
    before = bits_of(student)
    x = photographs(24, SIZE)
    found = sharpness(teacher, student, units, x, relative_radius=0.05, power_steps=20)
    assert found.sharpness == found.perturbed_loss - found.loss > 0 and found.num_images == 24
    assert found.eigenvalue is not None and found.eigenvalue > 0
    wider = sharpness(teacher, student, units, x, relative_radius=0.1)
    assert wider.sharpness > found.sharpness and wider.eigenvalue is None
    assert wider.radius == pytest.approx(2 * found.radius)
    assert sharpness(teacher, student, units, x, relative_radius=0.05, power_steps=20) == found
    assert set(found.to_json()) >= {"loss", "sharpness", "eigenvalue"}
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in before)
    with pytest.raises(UsageError, match="at least one image"):
        sharpness(teacher, student, units, x[:0])


@pytest.mark.parametrize("scope", ["last_layer", "last_unit", "all_units"])
def test_alignment(scope: str) -> None:
    teacher, student, units = calibrated(Residual)
    x, y = photographs(16, SIZE), torch.randn(16, *SIZE, generator=rng())
    same = gradient_alignment(teacher, student, units, x, x, gradients=scope)  # type: ignore[arg-type]
    assert same.of_means == pytest.approx(1, abs=1e-4) and same.nearest == pytest.approx(1, abs=1e-4)
    other = gradient_alignment(teacher, student, units, x, y, gradients=scope)  # type: ignore[arg-type]
    assert other.of_means < 1 and other.pairwise <= other.nearest < 1
    again = gradient_alignment(teacher, student, units, photographs(16, SIZE, seed=9), x, gradients=scope)  # type: ignore[arg-type]
    assert again.of_means > other.of_means  # images of the same kind pull the same way
    with pytest.raises(UsageError, match="got 16 and 0"):
        gradient_alignment(teacher, student, units, x, x[:0])


def test_theory_on_a_quadratic() -> None:
    """Section (f), test 11: with H = c I, the better gradients agree, the lower SAM's loss after a step.

    L_V(w) = g_V w + c/2 w^2 around the student (w = 0); one step of eta along a gradient of fixed length.
    """
    c, eta, rho = 0.7, 0.1, 0.05
    own = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)

    def value(w: Tensor) -> float:
        return float(own @ w + c / 2 * w @ w)

    losses = []
    for angle in torch.linspace(0, torch.pi, 20, dtype=torch.float64):
        w = -eta * torch.stack([angle.cos(), angle.sin(), 0 * angle])
        slope = own + c * w
        losses.append(value(w + rho * slope / slope.norm()))
    assert all(closer < further for closer, further in zip(losses, losses[1:], strict=False))
