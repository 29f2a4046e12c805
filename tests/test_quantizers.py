"""Section (f), tests 6 to 11, as far as modules go; the functions below them have their own tests."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq.quant.affine import MIN_SCALE, fake_quantize
from zsq.quant.quantizers import ActivationQuantizer, LearnedRounding, WeightQuantizer, quantize_weight
from zsq.quant.rounding import inverse_rectified_sigmoid, rectified_sigmoid


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_channel(values: Tensor, axis: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[axis] = -1
    return values.view(shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3, 3), 0), ((5, 9), 0), ((4, 6, 2, 2), 1)])
def test_learned_rounding_starts_at_the_clipped_weight_and_hardens_to_nearest(
    bits: int, shape: tuple[int, ...], axis: int
) -> None:
    weight = normal(*shape)
    nearest = quantize_weight(weight, bits=bits, axis=axis)
    learned = LearnedRounding(weight, nearest)
    scale = per_channel(nearest.scale, axis, weight.ndim)
    zero = per_channel(nearest.zero_point.float(), axis, weight.ndim)
    clipped = torch.minimum(torch.maximum(weight, -zero * scale), (2**bits - 1 - zero) * scale)
    # 1e-6 of values of order 1: a sigmoid and its inverse in float32
    torch.testing.assert_close(learned().detach(), clipped, rtol=0, atol=2e-6)
    hard = learned.harden()
    assert torch.equal(hard.codes, nearest.codes)
    assert torch.equal(hard(), nearest())
    assert torch.equal(hard.zero_point, nearest.zero_point) and hard.zero_point.dtype == torch.uint8
    torch.testing.assert_close(
        nearest(), fake_quantize(weight, nearest.scale, zero.flatten(), qmin=0, qmax=2**bits - 1, axis=axis)
    )
    if bits == 2:
        assert bool((clipped != weight).any())  # the case of clipping is in the test


def test_soft_weight_is_linear_in_its_scale_and_the_base_stays() -> None:
    weight = normal(5, 7)
    learned = LearnedRounding(weight, quantize_weight(weight, bits=3, axis=0))
    base, before = learned.base.clone(), learned().detach()
    with torch.no_grad():
        learned.scale.mul_(2)  # a power of two: exact
    assert torch.equal(learned().detach(), 2 * before)
    assert torch.equal(learned.base, base) and not learned.base.requires_grad
    learned().sum().backward()
    codes = before / (learned.scale.detach() / 2)[:, None]  # clipped codes less the zero point
    assert learned.scale.grad is not None
    torch.testing.assert_close(learned.scale.grad, codes.sum(1))
    assert [name for name, _ in learned.named_parameters()] == ["scale", "rounding_logits"]
    assert not torch.equal(learned.harden().codes[0], torch.zeros(7, dtype=torch.uint8))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(bits=st.integers(2, 8), seed=st.integers(0, 1000), spread=st.floats(0.01, 50))
def test_hardening_gives_at_most_two_to_the_bits_levels(bits: int, seed: int, spread: float) -> None:
    weight = normal(3, 200, seed=seed)
    learned = LearnedRounding(weight, quantize_weight(weight, bits=bits, axis=0))
    with torch.no_grad():  # wherever training takes them
        learned.rounding_logits.add_(spread * normal(3, 200, seed=seed + 1))
        learned.scale.mul_(1.7)
    hard = learned.harden()
    values = hard()
    assert all(len(row.unique()) <= 2**bits for row in values)
    assert int(hard.codes.max()) <= 2**bits - 1
    integers = values / hard.scale[:, None]
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
    up = (learned.base + (learned.rounding_logits >= 0) + learned.zero_point[:, None]).clamp(0, 2**bits - 1)
    assert torch.equal(hard.codes.float(), up)


def test_rounding_logits_invert_the_rectified_sigmoid() -> None:
    y = torch.linspace(0, 1, 257)[:-1]
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(y)), y, rtol=0, atol=1e-6)


def test_scales_that_training_made_negative_are_kept_positive() -> None:
    learned = LearnedRounding(normal(2, 3), quantize_weight(normal(2, 3), bits=4, axis=0))
    with torch.no_grad():
        learned.scale[0] = -1.0
    assert learned.harden().scale[0] == torch.tensor(MIN_SCALE)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_channel_of_zeros_and_a_constant_one(bits: int) -> None:
    weight = torch.stack([torch.zeros(5), torch.full((5,), 0.7), torch.full((5,), -0.7)])
    nearest = quantize_weight(weight, bits=bits, axis=0)
    learned = LearnedRounding(weight, nearest)
    for values in (nearest(), learned().detach(), learned.harden()()):
        torch.testing.assert_close(values, weight)


def test_weight_quantizer_owns_plain_contiguous_numbers() -> None:
    weight = normal(4, 3, 3, 3).to(memory_format=torch.channels_last)
    quantizer = quantize_weight(weight.requires_grad_(), bits=4, axis=0)
    assert quantizer.codes.is_contiguous() and quantizer.codes.dtype == torch.uint8
    assert set(quantizer.state_dict()) == {"codes", "scale", "zero_point"}
    assert list(quantizer.parameters()) == []
    assert repr(quantizer) == "WeightQuantizer(bits=4, shape=(4, 3, 3, 3))"
    again = WeightQuantizer(torch.zeros(4, 3, 3, 3), torch.ones(4), torch.zeros(4), bits=4, axis=0)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(), quantizer())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_signed_quantizer_is_one_with_its_zero_point_in_the_middle(bits: int) -> None:
    quantizer = ActivationQuantizer(bits=bits)
    assert math.isnan(float(quantizer.scale))
    quantizer.set_range(torch.tensor(0.25), torch.tensor(float(2 ** (bits - 1))))
    x = torch.linspace(-1, 1, 5000) * 2**bits * 0.25
    y = quantizer(x)
    # -2^(b-1) .. 2^(b-1) - 1 without a zero point
    signed = (x / 0.25).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * 0.25
    assert torch.equal(y, signed)
    assert len(y.unique()) == 2**bits and bool((y < 0).any())
    assert float(quantizer(torch.zeros(1))) == 0.0


def test_activation_quantizer_gradients() -> None:
    quantizer = ActivationQuantizer(bits=2)  # codes 0..3
    quantizer.set_range(torch.tensor(1.0), torch.tensor(0.0))
    quantizer.scale.requires_grad_(True)
    x = torch.tensor([-0.5, 0.4, 1.6, 3.4], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 0]
    # below: 0; inside: round(v) - v = -0.4 and 0.4; above: 3
    assert float(quantizer.scale.grad) == pytest.approx(3.0)  # type: ignore[arg-type]
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}
    assert repr(quantizer) == "ActivationQuantizer(bits=2)"
