"""Losses, gradients and the gap against computing them unit by unit."""

import pytest
import torch
from image_networks import SIZE, Residual, photographs
from student_networks import calibrated
from torch import Tensor, nn

from zsq.errors import UsageError
from zsq.generalisation import generalisation
from zsq.graph.blocks import extract
from zsq.quant.plain import plain_part


def test_against_single_units() -> None:
    teacher, student, units = calibrated(Residual, "W2A3")
    x = photographs(70, SIZE, seed=5)
    found = generalisation(teacher, student, units, x, x[:9])
    assert (found.num_images, found.num_others) == (70, 9) and set(found.by_unit) == {u.name for u in units}
    total, norms = 0.0, {}
    for unit in units:
        part = plain_part(student, unit.inputs, unit.outputs)
        given, wanted = extract(student, ["x"], unit.inputs)(x), extract(teacher, ["x"], unit.outputs)(x)

        def loss(*weights: Tensor, part=part, given=given, wanted=wanted) -> Tensor:  # type: ignore[no-untyped-def]
            outputs = part.module(*given, *weights)
            return (
                torch.stack([(a - b).square().sum() for a, b in zip(outputs, wanted, strict=True)]).sum()
                / 140
            )

        weights = [w.detach().requires_grad_() for w in part.weights.values()]
        total += float(loss(*weights).detach())
        slopes = torch.autograd.grad(loss(*weights), weights)
        norms[unit.name] = float(torch.cat([s.flatten() for s in slopes]).norm())
    assert found.loss == pytest.approx(total, rel=1e-4)
    for name, norm in norms.items():
        assert found.by_unit[name][0] == pytest.approx(norm, rel=1e-3)
    assert found.gradient_norm == pytest.approx(sum(norms.values()), rel=1e-3)


def test_the_same_images_have_no_gap() -> None:
    teacher, student, units = calibrated(Residual)
    x = photographs(12, SIZE)
    same = generalisation(teacher, student, units, x, x)
    assert same.gap == 0 and same.gradient_norm == same.other_gradient_norm
    far = generalisation(teacher, student, units, x, 3 * x)
    assert far.other_loss > far.loss > 0 and far.gap == far.other_loss - far.loss
    assert far.to_json()["num_others"] == 12
    with pytest.raises(UsageError, match="got 12 and 0"):
        generalisation(teacher, student, units, x, x[:0])


def test_networks_are_left_alone() -> None:
    teacher, student, units = calibrated(Residual)
    before = {k: v.clone() for m in (teacher, student) for k, v in m.state_dict().items()}
    generalisation(teacher, student, units, photographs(4, SIZE), photographs(4, SIZE, seed=1))
    after: dict[str, Tensor] = {k: v for m in (teacher, student) for k, v in m.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for m in (teacher, student) if isinstance(m, nn.Module) for p in m.parameters())
