import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq.quant.affine import (
    MIN_SCALE,
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_learned,
    integer_limits,
    quantize,
)

properties = settings(deadline=None, derandomize=True, max_examples=40)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Zero what lies within 1e-3 steps of a tie: torch multiplies by 1 / scale instead of dividing."""
    v = x / scale
    return torch.where((v - v.floor() - 0.5).abs() < 1e-3, torch.zeros_like(x), x)


def channel_ranges(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return rows.amin(1), rows.amax(1)


@pytest.mark.parametrize(
    ("bits", "signed", "limits"),
    [
        (2, False, (0, 3)),
        (2, True, (-2, 1)),
        (4, True, (-8, 7)),
        (8, False, (0, 255)),
        (8, True, (-128, 127)),
    ],
)
def test_integer_limits(bits: int, signed: bool, limits: tuple[int, int]) -> None:
    assert integer_limits(bits, signed) == limits


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_integer_limits_reject_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match=f"got {bits}"):
        integer_limits(bits, signed=False)


def test_qparams_by_hand() -> None:
    # asymmetric, 4 bits: (2 - -1) / 15 = 0.2; zero point round(1 / 0.2) = 5
    scale, zero_point = choose_qparams(
        torch.tensor(-1.0), torch.tensor(2.0), qmin=0, qmax=15, symmetric=False
    )
    torch.testing.assert_close(scale, torch.tensor(0.2))
    assert zero_point == 5
    # the same on signed codes: zero point -8 + 5
    assert choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), qmin=-8, qmax=7, symmetric=False)[1] == -3
    # symmetric signed: m = 2, codes to 7: 2 / 7; unsigned: 2 / 15
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), qmin=-8, qmax=7, symmetric=True)
    torch.testing.assert_close(scale, torch.tensor(2 / 7))
    assert zero_point == 0
    scale, _ = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), qmin=0, qmax=15, symmetric=True)
    torch.testing.assert_close(scale, torch.tensor(2 / 15))


def test_qparams_widen_the_range_to_zero() -> None:
    lo, hi = torch.tensor([3.0, -6.0]), torch.tensor([6.0, -3.0])
    scale, zero_point = choose_qparams(lo, hi, qmin=0, qmax=3, symmetric=False)
    assert scale.tolist() == [2.0, 2.0]  # [0, 6] and [-6, 0] in three steps
    assert zero_point.tolist() == [0.0, 3.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_constant_zero_is_safe(symmetric: bool, signed: bool) -> None:
    qmin, qmax = integer_limits(4, signed)
    zero = torch.zeros(3)
    scale, zero_point = choose_qparams(zero, zero, qmin=qmin, qmax=qmax, symmetric=symmetric)
    assert torch.equal(scale, torch.full((3,), MIN_SCALE))
    x = torch.zeros(3, 5)
    assert torch.equal(fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=0), x)


@pytest.mark.parametrize(("lo", "hi"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_qparams_reject_bad_ranges(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        choose_qparams(torch.tensor(lo), torch.tensor(hi), qmin=0, qmax=15, symmetric=False)


def test_qparams_reject_limits_without_zero() -> None:
    with pytest.raises(ValueError, match="include 0"):
        choose_qparams(torch.tensor(0.0), torch.tensor(1.0), qmin=1, qmax=15, symmetric=False)


def test_ties_round_to_even_before_the_zero_point_is_added() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])  # at scale 1 all ties: -2, 0, 0, 2, 2
    codes = quantize(x, torch.tensor(1.0), torch.tensor(3.0), qmin=0, qmax=15)
    assert codes.tolist() == [1, 3, 3, 5, 5]  # adding 3 first would give 2, 2, 4, 4, 6
    oracle = torch.fake_quantize_per_tensor_affine(x, 1.0, 3, 0, 15)  # 1 / scale is exact here
    assert torch.equal(fake_quantize(x, torch.tensor(1.0), torch.tensor(3.0), qmin=0, qmax=15), oracle)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_per_tensor_oracle(bits: int, signed: bool) -> None:
    qmin, qmax = integer_limits(bits, signed)
    x = torch.randn(4, 5, 6, 7, generator=rng(bits))
    scale, zero_point = choose_qparams(0.7 * x.min(), 0.7 * x.max(), qmin=qmin, qmax=qmax, symmetric=False)
    x = away_from_ties(x, scale)
    oracle = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), qmin, qmax)
    assert torch.equal(fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax), oracle)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, 3, -2])
def test_per_channel_oracle(bits: int, axis: int) -> None:
    qmin, qmax = integer_limits(bits, signed=False)
    x = torch.randn(4, 5, 6, 7, generator=rng(bits))
    lo, hi = channel_ranges(x, axis)
    scale, zero_point = choose_qparams(0.7 * lo, 0.7 * hi, qmin=qmin, qmax=qmax, symmetric=False)
    shape = [1] * 4
    shape[axis] = -1
    x = away_from_ties(x, scale.view(shape))
    oracle = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis % 4, qmin, qmax)
    assert torch.equal(fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis), oracle)


def test_scale_must_fit_the_axis() -> None:
    x, four, one = torch.zeros(4, 5), torch.ones(4), torch.tensor(1.0)
    for scale, zero_point, axis in ((four, four, 1), (four, four, None), (one, one, 0), (four, one, 0)):
        with pytest.raises(ValueError, match="must have shape"):
            fake_quantize(x, scale, zero_point, qmin=0, qmax=15, axis=axis)


@properties
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
    per_channel=st.booleans(),
    exponent=st.integers(-20, 20),
    shift=st.floats(-3, 3),
    data=st.data(),
)
def test_properties(
    shape: list[int],
    bits: int,
    signed: bool,
    symmetric: bool,
    per_channel: bool,
    exponent: int,
    shift: float,
    data: st.DataObject,
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1)) if per_channel else None
    qmin, qmax = integer_limits(bits, signed)
    x = (torch.randn(shape, generator=rng(bits)) + shift) * 2.0**exponent
    lo, hi = (x.min(), x.max()) if axis is None else channel_ranges(x, axis)
    scale, zero_point = choose_qparams(lo, hi, qmin=qmin, qmax=qmax, symmetric=symmetric)
    limits = {"qmin": qmin, "qmax": qmax, "axis": axis}
    assert bool((scale >= MIN_SCALE).all()) and bool((zero_point == zero_point.round()).all())
    assert bool((zero_point >= qmin).all()) and bool((zero_point <= qmax).all())

    codes = quantize(x, scale, zero_point, **limits)
    assert torch.equal(codes, codes.round()) and int(codes.min()) >= qmin and int(codes.max()) <= qmax
    y = fake_quantize(x, scale, zero_point, **limits)
    assert torch.equal(dequantize(codes, scale, zero_point, axis=axis), y)
    assert torch.equal(dequantize(codes.to(torch.int16), scale, zero_point, axis=axis), y)
    assert torch.equal(quantize(y, scale, zero_point, **limits), codes)
    assert torch.equal(fake_quantize(y, scale, zero_point, **limits), y)

    covered = x.clamp(min=0) if symmetric and not signed else x
    error = (fake_quantize(covered, scale, zero_point, **limits) - covered).abs()
    rows = error.reshape(1, -1) if axis is None else error.movedim(axis, 0).reshape(error.shape[axis], -1)
    # half a step, and float32 rounding of a code up to 255 (2^-24 * 256 * a few operations)
    assert bool((rows <= scale.reshape(-1, 1) * (0.5 + 1e-4)).all())
    rows = y.reshape(1, -1) if axis is None else y.movedim(axis, 0).reshape(y.shape[axis], -1)
    assert all(row.unique().numel() <= 2**bits for row in rows)


@properties
@given(bits=st.integers(2, 8), signed=st.booleans(), zero_share=st.floats(0, 1), scale=st.floats(1e-3, 1e3))
def test_clipping_first_or_rounding_first_is_the_same(
    bits: int, signed: bool, zero_share: float, scale: float
) -> None:
    qmin, qmax = integer_limits(bits, signed)
    zero_point = torch.tensor(float(round(qmin + zero_share * (qmax - qmin))))
    x = torch.cat([torch.randn(200, generator=rng(bits)) * 2**bits, torch.arange(-300, 300) / 2]) * scale
    step = torch.tensor(scale)
    clip_first = ((x / step).clamp(qmin - zero_point, qmax - zero_point).round() * step).add(0.0)
    assert torch.equal(clip_first, fake_quantize(x, step, zero_point, qmin=qmin, qmax=qmax))


def straight_through_reference(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """What LSQ's equations come from: a clip, and a rounding with the gradient of the identity."""
    clipped = (x / scale).clamp(qmin - zero_point, qmax - zero_point)
    return scale * (clipped + (clipped.round() - clipped).detach())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("zero_point", [0.0, 2.0])
@pytest.mark.parametrize("as_number", [False, True])
def test_learned_scale_matches_straight_through_autograd(
    signed: bool, zero_point: float, as_number: bool
) -> None:
    qmin, qmax = integer_limits(3, signed)
    x = torch.randn(6, 5, 4, generator=rng(), dtype=torch.float64).mul_(2).requires_grad_()
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(zero_point, dtype=torch.float64)
    grad = torch.randn(6, 5, 4, generator=rng(1), dtype=torch.float64)
    y = fake_quantize_learned(x, scale, zero_point if as_number else zero, qmin=qmin, qmax=qmax)
    ours = torch.autograd.grad(y, (x, scale), grad)
    reference = torch.autograd.grad(straight_through_reference(x, scale, zero, qmin, qmax), (x, scale), grad)
    assert torch.equal(y, fake_quantize(x.detach(), scale.detach(), zero, qmin=qmin, qmax=qmax))
    torch.testing.assert_close(ours[0], reference[0])
    torch.testing.assert_close(ours[1], reference[1])
    outside = (x / scale < qmin - zero) | (x / scale > qmax - zero)
    assert bool((ours[0][outside] == 0).all()) and torch.equal(ours[0][~outside], grad[~outside])
    assert 0 < int(outside.sum()) < x.numel()


def test_learned_scale_by_hand() -> None:
    x = torch.tensor([-1.0, 0.3, 1.4, 3.2, 9.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize_learned(x, scale, torch.tensor(0.0), qmin=0, qmax=3).sum().backward()
    # below: 0; inside: 0 - 0.3, 1 - 1.4; 3.2 and 9 are above: 3 each
    torch.testing.assert_close(scale.grad, torch.tensor(0 - 0.3 - 0.4 + 3 + 3))
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 0, 0]


@properties
@given(bits=st.integers(2, 8), signed=st.booleans(), zero_share=st.floats(0, 1), scale=st.floats(1e-3, 10))
def test_learned_forward_has_the_same_bits(bits: int, signed: bool, zero_share: float, scale: float) -> None:
    qmin, qmax = integer_limits(bits, signed)
    zero_point = torch.tensor(float(round(qmin + zero_share * (qmax - qmin))))
    x, step = torch.randn(3, 70, generator=rng(bits)), torch.tensor(scale)
    learned = fake_quantize_learned(
        x.clone().requires_grad_(), step.clone().requires_grad_(), zero_point, qmin=qmin, qmax=qmax
    )
    plain = fake_quantize(x, step, zero_point, qmin=qmin, qmax=qmax)
    assert torch.equal(learned.detach().view(torch.int32), plain.view(torch.int32))
    with_number = fake_quantize_learned(x, step, float(zero_point), qmin=qmin, qmax=qmax)
    assert torch.equal(with_number, plain)  # but for the sign of a zero


def test_learned_scale_frozen_and_differentiated_twice() -> None:
    x = torch.randn(20, generator=rng()).mul_(2).requires_grad_()
    y = fake_quantize_learned(x, torch.tensor(0.5), torch.tensor(0.0), qmin=-2, qmax=1)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # 2 y inside
    (second,) = torch.autograd.grad(first.sum(), x)  # 2 inside
    inside = ((x / 0.5 >= -2) & (x / 0.5 <= 1)).float()
    assert torch.equal(first, 2 * y * inside) and torch.equal(second, 2 * inside)
