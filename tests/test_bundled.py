"""The bundled network: its weights, its images, and that the one classifies the other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from zsq.bundled import (
    DIGITS_MEAN,
    DIGITS_STD,
    DIGITS_WEIGHTS,
    DigitsBlock,
    DigitsNet,
    UInt8Array,
    digits_split,
)
from zsq.models import Teacher, load_model

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_model("digits")


def as_input(teacher: Teacher, images: UInt8Array) -> torch.Tensor:
    pixels = torch.from_numpy(images).float().div(255).unsqueeze(1)
    return (pixels - teacher.spec.mean[0]) / teacher.spec.std[0]


def test_split_is_the_documented_one() -> None:
    train_images, train_labels, test_images, test_labels = digits_split()
    assert train_images.shape == (1201, 8, 8) and test_images.shape == (596, 8, 8)
    assert train_images.dtype == test_images.dtype == np.uint8
    assert train_images.min() == 0 and train_images.max() == 255
    assert train_labels.shape == (1201,) and test_labels.dtype == np.int64
    counts = np.bincount(test_labels, minlength=10), np.bincount(train_labels, minlength=10)
    assert counts[0].min() >= 58 and np.abs(counts[1] - 2 * counts[0]).max() <= 2  # every third of each class


def test_split_is_the_same_each_time_and_disjoint() -> None:
    first, second = digits_split(), digits_split()
    for k in range(4):
        assert np.array_equal(first[k], second[k])
    train, test = ({image.tobytes() for image in images} for images in (first[0], first[2]))
    assert not train & test  # no image occurs twice in the source


def test_mean_and_std_are_those_of_the_training_part() -> None:
    pixels = digits_split()[0] / 255
    # The constants have four decimals.
    assert DIGITS_MEAN[0] == pytest.approx(pixels.mean(), abs=5e-5)
    assert DIGITS_STD[0] == pytest.approx(pixels.std(), abs=5e-5)


def test_weights_are_small_and_float32() -> None:
    assert DIGITS_WEIGHTS.stat().st_size <= 300_000
    assert {value.dtype for value in load_file(DIGITS_WEIGHTS).values()} == {torch.float32}


def test_network_has_each_kind_of_block() -> None:
    blocks = [module for module in DigitsNet().modules() if isinstance(module, DigitsBlock)]
    assert [block.conv1.stride for block in blocks] == [(1, 1), (2, 2), (2, 2)]
    assert [isinstance(block.shortcut, nn.Identity) for block in blocks] == [True, False, False]


def test_accuracy_on_the_test_part(teacher: Teacher) -> None:
    _, _, images, labels = digits_split()
    with torch.no_grad():
        predicted = teacher.module(as_input(teacher, images)).argmax(1).numpy()
    # scripts/train_digits.py measured 99.83 %; one image is 0.17 %.
    assert 100 * (predicted == labels).mean() >= 98.5


def test_batchnorm_statistics_are_those_of_the_training_images(teacher: Teacher) -> None:
    """The first BatchNorm's, recomputed by hand; the others follow from the same pass."""
    network = teacher.module
    assert isinstance(network, DigitsNet)
    with torch.no_grad():
        features = F.conv2d(as_input(teacher, digits_split()[0]), network.conv1.weight, padding=1)
        var, mean = torch.var_mean(features, dim=(0, 2, 3), correction=1)
    assert network.bn1.running_mean is not None and network.bn1.running_var is not None
    # Another order of summation than when the weights were written.
    torch.testing.assert_close(network.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.bn1.running_var, var, rtol=1e-4, atol=1e-5)
