import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq.quant.affine import along_axis, dequantize, fake_quantize, integer_limits
from zsq.quant.ranges import error_minimising
from zsq.quant.rounding import (
    hard_codes,
    initial_logits,
    inverse_rectified_sigmoid,
    nearest_codes,
    rectified_sigmoid,
    rounding_base,
    rounding_regulariser,
    soft_quantize,
    straight_through_round,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_reference(
    base: Tensor, logits: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    scale, zero_point = along_axis(scale, base, axis), along_axis(zero_point, base, axis)
    return scale * ((base + rectified_sigmoid(logits) + zero_point).clamp(qmin, qmax) - zero_point)


def test_rectified_sigmoid_by_hand() -> None:
    # sigmoid(0) = 1/2: 1.2 / 2 - 0.1 = 0.5; cut from -log(1.2 / 0.1 - 1) = -2.398 and from +2.398 on
    h = rectified_sigmoid(torch.tensor([-9.0, -2.4, 0.0, 2.4, 9.0]))
    torch.testing.assert_close(h, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))
    ends = inverse_rectified_sigmoid(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([-math.log(11), math.log(11)]))


def test_rectified_sigmoid_inverts_on_a_grid() -> None:
    y = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(y)), y)
    y = y.float()
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(y)), y, rtol=0.0, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    per_channel=st.booleans(),
    data=st.data(),
)
def test_start_of_learned_rounding(
    shape: list[int], bits: int, signed: bool, per_channel: bool, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1)) if per_channel else None
    weight = normal(*shape, seed=bits)
    qmin, qmax = integer_limits(bits, signed)
    scale, zero_point = error_minimising(weight, bits=bits, signed=signed, symmetric=False, axis=axis)
    limits = {"qmin": qmin, "qmax": qmax, "axis": axis}
    base = rounding_base(weight, scale, axis)
    logits = initial_logits(weight, scale, base, axis)

    s, z = along_axis(scale, weight, axis), along_axis(zero_point, weight, axis)
    clipped = weight.clamp((qmin - z) * s, (qmax - z) * s)
    # card test 6, to 1e-6: the soft weight is the clipped weight
    torch.testing.assert_close(
        soft_quantize(base, logits, scale, zero_point, **limits), clipped, rtol=0.0, atol=1e-6
    )
    codes = hard_codes(base, logits, zero_point, **limits)
    not_tied = (weight / s - base - 0.5).abs() > 1e-9  # a tie is decided by the last bit of the logit
    assert torch.equal(codes[not_tied], nearest_codes(weight, scale, zero_point, **limits)[not_tied])
    assert torch.equal(codes, codes.round()) and int(codes.min()) >= qmin and int(codes.max()) <= qmax

    trained = hard_codes(base, logits + normal(*shape, seed=9), zero_point, **limits) - z
    floor, ceil = base.clamp(qmin - z, qmax - z), (base + 1).clamp(qmin - z, qmax - z)
    assert bool(((trained == floor) | (trained == ceil)).all())
    hard = dequantize(trained + z, scale, zero_point, axis=axis)
    assert torch.equal(fake_quantize(hard, scale, zero_point, **limits), hard)
    rows = hard.reshape(1, -1) if axis is None else hard.movedim(axis, 0).reshape(hard.shape[axis], -1)
    assert all(row.unique().numel() <= 2**bits for row in rows)


def test_hard_codes_by_hand() -> None:
    base, logits = torch.tensor([-3.0, 0.0, 1.0, 9.0]), torch.tensor([1.0, -0.1, 0.0, 5.0])
    assert hard_codes(base, logits, torch.tensor(2.0), qmin=0, qmax=7).tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_soft_quantize_gradients(axis: int | None) -> None:
    weight = normal(4, 3, 5)
    channels = () if axis is None else (weight.shape[axis],)
    scale = torch.full(channels, 0.3, dtype=torch.float64) + 0.1 * normal(*channels, seed=1).abs()
    zero_point = torch.full(channels, 3.0, dtype=torch.float64)
    base = rounding_base(weight, scale, axis)
    logits = (2 * normal(4, 3, 5, seed=2)).requires_grad_()  # some h cut at 0 or 1, some codes clipped
    scale.requires_grad_()
    y = soft_quantize(base, logits, scale, zero_point, qmin=0, qmax=7, axis=axis)
    reference = soft_reference(base, logits, scale, zero_point, 0, 7, axis)
    torch.testing.assert_close(y, reference)
    grad = normal(4, 3, 5, seed=3)
    ours = torch.autograd.grad(y, (logits, scale), grad)
    expected = torch.autograd.grad(reference, (logits, scale), grad)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])
    assert 0 < int((ours[0] == 0).sum()) < y.numel()
    assert torch.autograd.gradcheck(
        lambda v, s: soft_quantize(base, v, s, zero_point, qmin=0, qmax=7, axis=axis), (logits, scale)
    )


def test_detachment_of_the_base() -> None:
    weight, scale, zero_point = normal(3, 8), torch.full((3,), 0.3).double(), torch.full((3,), 2.0).double()
    base = rounding_base(weight, scale, 0)
    logits = initial_logits(weight, scale, base, 0)
    scale.requires_grad_()
    y = soft_quantize(base, logits, scale, zero_point, qmin=0, qmax=7, axis=0)
    codes = (base + rectified_sigmoid(logits) + 2).clamp(0, 7) - 2
    (gradient,) = torch.autograd.grad(y.sum(), scale)
    torch.testing.assert_close(gradient, codes.sum(1))  # the clipped code, not round(w/s) - w/s
    doubled = soft_quantize(base, logits, 2 * scale.detach(), zero_point, qmin=0, qmax=7, axis=0)
    torch.testing.assert_close(doubled, 2 * y.detach())


def test_soft_quantize_gives_only_what_is_asked() -> None:
    base, scale, zero = torch.zeros(2, 3), torch.ones(2), torch.zeros(2)
    logits = torch.zeros(2, 3, requires_grad=True)
    soft_quantize(base, logits, scale, zero, qmin=0, qmax=3, axis=0).sum().backward()
    # dh/dV at 0: 1.2 / 4
    torch.testing.assert_close(logits.grad, torch.full((2, 3), 0.3))
    with pytest.raises(ValueError, match="must have shape"):
        soft_quantize(base, logits, scale, zero, qmin=0, qmax=3, axis=1)


def test_regulariser_by_hand() -> None:
    logits = inverse_rectified_sigmoid(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    # |2h - 1| = 1, 0.5, 0, 1: 0 + (1 - 0.25) + 1 + 0 at beta 2
    assert rounding_regulariser(logits, 2.0).item() == pytest.approx(1.75)
    assert rounding_regulariser(logits, 20.0).item() == pytest.approx(2 - 0.5**20)
    with pytest.raises(ValueError, match="got 0.5"):
        rounding_regulariser(logits, 0.5)


@pytest.mark.parametrize("beta", [1.5, 2.0, 11.0, 20.0])
def test_regulariser_gradients(beta: float) -> None:
    logits = (2 * normal(50)).requires_grad_()
    value = rounding_regulariser(logits, beta)
    reference = (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).sum()
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(
        *(torch.autograd.grad(3 * each, logits)[0] for each in (value, reference)), rtol=1e-7, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda v: rounding_regulariser(v, beta), (logits,))
    at_half = torch.zeros(1, requires_grad=True)
    rounding_regulariser(at_half, 1.0).backward()
    assert at_half.grad is not None and at_half.grad.item() == 0


def test_gradient_descent_on_the_regulariser_settles_every_rounding() -> None:
    logits = normal(200, seed=4).requires_grad_()
    up = logits.detach() > 0
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        rounding_regulariser(logits, 2.0).backward()
        optimizer.step()
    assert torch.equal(rectified_sigmoid(logits.detach()), up.double())


def test_straight_through_round() -> None:
    x = torch.tensor([-1.5, -0.2, 0.5, 0.7, 2.5], requires_grad=True)
    y = straight_through_round(x)
    assert torch.equal(y, x.detach().round())
    (y * torch.arange(5.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 2, 3, 4]
