"""The expected mean and deviation of images, and what synthesis makes of them."""

import pytest
import torch

from zsq.images.forward import ForwardPass
from zsq.images.losses import InputStatistics
from zsq.images.prior import NATURAL_MEAN, NATURAL_STD, STANDARD, InputPrior, input_prior
from zsq.teacher import ModelSpec


def spec(mean: tuple[float, ...], std: tuple[float, ...]) -> ModelSpec:
    return ModelSpec(input_size=(len(mean), 8, 8), mean=mean, std=std, crop_fraction=1.0)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
        ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),  # CIFAR-100
        ((0.3048,), (0.3757,)),  # the bundled digits
    ],
)
def test_statistics_of_data_are_believed(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    prior = input_prior(spec(mean, std))
    assert prior is STANDARD and prior.is_standard
    images = torch.randn(2, len(mean), 8, 8)
    assert prior.apply(images) is images


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.0,) * 3, (1.0,) * 3),  # pixels 0..1
        ((0.0,) * 3, (1 / 255,) * 3),  # 0..255
        ((0.5,) * 3, (0.5,) * 3),  # -1..1
        ((128 / 255,) * 3, (1 / 255,) * 3),  # -128..127
    ],
)
def test_other_normalisations_get_natural_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    given = spec(mean, std)
    images = input_prior(given).apply(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    for channel in range(3):
        pixels = images[:, channel] * std[channel] + mean[channel]  # back to 0..1
        assert float(pixels.mean()) == pytest.approx(NATURAL_MEAN[channel], abs=0.005)
        assert float(pixels.std()) == pytest.approx(NATURAL_STD[channel], abs=0.005)


def test_one_channel_by_hand() -> None:
    prior = input_prior(spec((0.0,), (0.001,)))
    # grey: mean (0.485 + 0.456 + 0.406) / 3 = 0.449, deviation 0.226, both divided by 0.001
    assert prior.mean == pytest.approx((449.0,)) and prior.std == pytest.approx((226.0,))


def test_loss_is_relative_to_the_prior() -> None:
    prior = InputPrior((120.0, 100.0), (60.0, 50.0))
    standard = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    plain = InputStatistics()(ForwardPass(images=standard, norms=(), logits=None))
    moved = InputStatistics(prior)(ForwardPass(images=prior.apply(standard), norms=(), logits=None))
    assert float(moved) == pytest.approx(float(plain), rel=1e-5)
    assert float(plain) > 0
