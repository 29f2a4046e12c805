"""Quantizers of training: same bits as the hard ones, identity gradients, ranges that follow or stay."""

import pytest
import torch
from torch import Tensor

from zsq.quant.affine import choose_qparams, fake_quantize
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer, quantize_weight
from zsq.quant.training import FixedRange, MovingRange, TrainedWeight, straight_through_quantize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(
    bits: int = 3, *, keep_range: bool = False, axis: int = 0
) -> tuple[TrainedWeight, WeightQuantizer]:
    weight = normal(4, 5, 3, 3)
    quantizer = quantize_weight(weight, bits=bits, axis=axis)
    return TrainedWeight(weight, quantizer, keep_range=keep_range), quantizer


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_of_min_and_max(bits: int, axis: int) -> None:
    """At most 2^b levels a channel; lowest and highest value within half a step; hard codes the same bits."""
    weight, _ = trained(bits, axis=axis)
    found = weight()
    scale, _ = weight.qparams()
    assert scale.shape == (weight.weight.shape[axis],)
    for channel in range(len(scale)):
        own, original = (x.detach().select(axis, channel) for x in (found, weight.weight))
        assert len(own.unique()) <= 2**bits
        for end in (torch.amin, torch.amax):
            assert abs(float(end(own) - end(original))) <= float(scale[channel]) / 2 * 1.001
    hard = weight.harden()
    assert hard.bits == bits and hard.axis == axis and torch.equal(hard(), found)


def test_gradient_of_a_weight_is_that_of_its_rounded_value() -> None:
    for keep_range in (False, True):
        weight, _ = trained(keep_range=keep_range)
        factor = normal(4, 5, 3, 3, seed=1)
        (weight() * factor).sum().backward()
        assert weight.weight.grad is not None and torch.equal(weight.weight.grad, factor)


def test_ranges_follow_the_weights_unless_they_are_kept() -> None:
    follows, _ = trained()
    stays, quantizer = trained(keep_range=True)
    before = follows.qparams()[0].clone()
    with torch.no_grad():
        follows.weight.mul_(3)
        stays.weight.mul_(3)
    assert torch.allclose(follows.qparams()[0], 3 * before)
    assert torch.equal(stays.qparams()[0], quantizer.scale)
    assert torch.equal(stays.harden().scale, quantizer.scale)
    assert torch.equal(stays.harden().zero_point, quantizer.zero_point)


def test_from_codes_with_kept_ranges_the_codes_come_back() -> None:
    """What a reconstructed student starts from is that student."""
    _, quantizer = trained(bits=3)
    again = TrainedWeight(quantizer(), quantizer, keep_range=True)
    assert torch.equal(again(), quantizer()) and torch.equal(again.harden().codes, quantizer.codes)


def test_constant_and_one_sided_channels() -> None:
    """A constant channel keeps its value (0 is in the range), zeros stay zeros."""
    weight = torch.tensor([[0.0, 0.0], [2.0, 2.0], [-1.0, -1.0], [0.5, 1.0]])
    quantizer = quantize_weight(weight, bits=2, axis=0)
    found = TrainedWeight(weight, quantizer, keep_range=False)()
    # Range 0 .. 1 of the last channel in steps of 1/3: 0.5 -> code 2 (half to even) -> 2/3
    expected = torch.tensor([[0.0, 0.0], [2.0, 2.0], [-1.0, -1.0], [2 / 3, 1.0]])
    assert torch.allclose(found, expected)


def test_straight_through_is_fake_quantize_with_the_identitys_gradient() -> None:
    x = (4 * normal(200)).requires_grad_()
    scale, zero_point = torch.tensor(0.3), torch.tensor(5.0)
    found = straight_through_quantize(x, scale, zero_point, qmin=0, qmax=15)
    assert torch.equal(found, fake_quantize(x, scale, zero_point, qmin=0, qmax=15))
    saturated = (x < -1.5) | (x > 3.0)
    assert bool(saturated.any()) and bool((~saturated).any())
    for passes in (True, False):
        module = FixedRange(scale, zero_point, bits=4, saturated_gradients=passes)
        out = module(x)
        assert torch.equal(out, found)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad[~saturated], torch.ones_like(grad[~saturated]))
        assert bool((grad[saturated] == float(passes)).float().mean() > 0.9)


def test_average_of_a_constant_is_that_constant_at_every_step() -> None:
    """The published average reads 1, 5.3, 17.8, ... (its correction is applied to what it stores)."""
    watching = MovingRange(ActivationQuantizer(bits=4), momentum=0.9)
    for _ in range(50):
        watching(torch.tensor([-0.5, 1.0]))
        lo, hi = watching.range()
        assert float(lo) == pytest.approx(-0.5, rel=1e-5) and float(hi) == pytest.approx(1.0, rel=1e-5)


def test_average_by_hand() -> None:
    """Maxima 1, 2, 4 with momentum 1/2: 1; (1/2 * 1 + 2) / (3/2); (1/4 * 1 + 1/2 * 2 + 4) / (7/4)."""
    watching = MovingRange(ActivationQuantizer(bits=4), momentum=0.5)
    expected = [1.0, 5 / 3, 3.0]
    for value, mean in zip((1.0, 2.0, 4.0), expected, strict=True):
        out = watching(torch.tensor([0.0, value]))
        assert float(watching.range()[1]) == pytest.approx(mean)
        scale, zero_point = watching.qparams()
        wanted = choose_qparams(*watching.range(), qmin=0, qmax=15, symmetric=False)
        assert torch.equal(scale, wanted[0]) and torch.equal(zero_point, wanted[1])
        # What comes after it sees quantized values.
        assert float(out[1]) == pytest.approx(min(value, mean), rel=1e-5) or value < mean
    last = MovingRange(ActivationQuantizer(bits=4), momentum=0.0)
    for value in (1.0, 2.0):
        last(torch.tensor([0.0, value]))
        assert float(last.range()[1]) == value
