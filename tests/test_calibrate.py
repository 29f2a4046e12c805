import math

import pytest
import torch
from quantization_networks import Residual, attached, images
from torch import Tensor, nn

from zsq.errors import UsageError
from zsq.quant.affine import fake_quantize
from zsq.quant.calibrate import calibrate, choose_activation_range
from zsq.quant.quantizers import ActivationQuantizer
from zsq.recipe import Calibration


def values(seed: int = 0) -> Tensor:
    return torch.randn(4000, generator=torch.Generator().manual_seed(seed))


def test_ranges_by_hand() -> None:
    minmax = Calibration(method="minmax", symmetric=True)
    x = torch.tensor([0.0, 1.0, 6.0])
    scale, zero = choose_activation_range(x, bits=2, settings=minmax)
    assert (float(scale), float(zero)) == (2.0, 0.0)  # [0, 6] by 3 steps
    scale, zero = choose_activation_range(x - 3, bits=2, settings=minmax)
    assert (float(scale), float(zero)) == (3.0, 2.0)  # codes -2..1 of [-3, 3], one step above zero
    asymmetric = Calibration(method="minmax", symmetric=False)
    scale, zero = choose_activation_range(x - 2, bits=2, settings=asymmetric)
    assert (float(scale), float(zero)) == (2.0, 1.0)  # [-2, 4]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["error", "minmax", "percentile"])
def test_sign_decides_the_zero_point(bits: int, signed: bool, symmetric: bool, method: str) -> None:
    x = values() if signed else values().relu()
    scale, zero = choose_activation_range(
        x, bits=bits, settings=Calibration(method=method, symmetric=symmetric)
    )
    assert scale.shape == zero.shape == () and float(scale) > 0
    if symmetric:
        assert float(zero) == (2 ** (bits - 1) if signed else 0)
    else:
        assert 0 <= float(zero) <= 2**bits - 1 and float(zero) == round(float(zero))
    levels = fake_quantize(x, scale, zero, qmin=0, qmax=2**bits - 1).unique()
    assert len(levels) <= 2**bits and bool((levels == 0).any())


def test_least_error_is_no_worse_than_the_whole_range() -> None:
    x = values()

    def error(method: str) -> float:
        scale, zero = choose_activation_range(x, bits=3, settings=Calibration(method=method))
        return float((fake_quantize(x, scale, zero, qmin=0, qmax=7) - x).abs().pow(2.4).mean())

    assert error("error") < error("minmax")


def test_a_tensor_of_zeros_gets_a_range() -> None:
    scale, zero = choose_activation_range(torch.zeros(8), bits=4, settings=Calibration())
    assert float(scale) > 0 and float(zero) == 0


def test_later_quantizers_see_what_earlier_ones_give() -> None:
    first, second = ActivationQuantizer(bits=2), ActivationQuantizer(bits=8)
    part = nn.Sequential(first, second)
    x = values().abs().view(100, 40)
    x[50:] *= 100  # beyond the images that are looked at
    calibrate(part, [x], Calibration(num_images=50))
    expected = choose_activation_range(x[:50], bits=2, settings=Calibration())
    assert torch.equal(first.scale, expected[0])
    quantized = fake_quantize(x[:50], *expected, qmin=0, qmax=3)
    assert torch.equal(second.scale, choose_activation_range(quantized, bits=8, settings=Calibration())[0])
    assert not any(m._forward_pre_hooks for m in part.modules())
    assert not first.scale.requires_grad


def test_settled_quantizers_stay() -> None:
    first, second = ActivationQuantizer(bits=2), ActivationQuantizer(bits=2)
    first.set_range(torch.tensor(7.0), torch.tensor(0.0))
    calibrate(nn.Sequential(first, second), [values().abs()], Calibration(), settled={first})
    assert float(first.scale) == 7.0 and not math.isnan(float(second.scale))


def test_hooks_are_removed_when_the_forward_fails() -> None:
    part = nn.Sequential(ActivationQuantizer(bits=2), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        calibrate(part, [values()], Calibration())
    assert not any(m._forward_pre_hooks for m in part.modules())


def test_a_shared_quantizer_is_set_by_its_first_reader_and_every_one_is_met() -> None:
    _, student, quantizers, _ = attached(Residual, "W4A4")
    calibrate(student, [images(16)], Calibration())
    found = [student.get_submodule(name) for name in quantizers.activations.values()]
    assert found and all(isinstance(q, ActivationQuantizer) and q.scale.isfinite() for q in found)
    assert bool(student(images(4)).isfinite().all())


def test_settings_are_checked() -> None:
    for settings in (
        {"method": "guess"},
        {"num_images": 0},
        {"exponent": 0.0},
        {"percentile": 0.5},
        {"percentile": 1.1},
    ):
        with pytest.raises(UsageError, match=f"calibration.{next(iter(settings))}"):
            Calibration(**settings)
