"""The teacher: a frozen copy, what is said about it, and what is rejected."""

from typing import Any

import pytest
import torch
from tiny_networks import NORM, SIZE, message
from torch import nn

from zsq.models import ModelSource, Teacher


def test_is_a_frozen_copy(network: nn.Module) -> None:
    network.train()
    teacher = Teacher(network, **NORM, name="mine")
    assert teacher.module is not network and network.training
    assert not teacher.module.training and not any(p.requires_grad for p in teacher.module.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert teacher.output_shape == (5,) and teacher.name == "mine" and teacher.notes == ()
    assert teacher.source == ModelSource(kind="memory", name="mine")


def test_defaults_are_said(network: nn.Module) -> None:
    teacher = Teacher(network, input_size=SIZE)
    assert teacher.spec.mean == (0.0, 0.0, 0.0) and teacher.spec.std == (1.0, 1.0, 1.0)
    assert teacher.notes == ("no mean and std were given: assuming pixels in [0, 1] (mean 0, std 1)",)
    assert Teacher(network, input_size=SIZE, mean=(0.5,) * 3).notes == ("no std was given: assuming 1",)


@pytest.mark.parametrize(("height", "fraction"), [(32, 1.0), (127, 1.0), (128, 0.875), (224, 0.875)])
def test_crop_fraction_follows_the_size(network: nn.Module, height: int, fraction: float) -> None:
    assert Teacher(network, input_size=(3, height, height)).spec.crop_fraction == fraction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_formats_become_float32(network: nn.Module, dtype: torch.dtype) -> None:
    teacher = Teacher(network.to(dtype), **NORM)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    assert "converted to float32" in teacher.notes[0] and str(dtype)[6:] in teacher.notes[0]


def test_sha256_is_of_the_weights(network: nn.Module) -> None:
    before = Teacher(network, **NORM).sha256
    network.get_submodule("bn").register_buffer("num_batches_tracked", torch.tensor(7))
    assert Teacher(network, input_size=SIZE).sha256 == before and len(before) == 64
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    assert Teacher(network, **NORM).sha256 != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rejects_weights_that_are_not_finite(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        network.get_parameter("conv.bias")[1] = value
        network.get_parameter("model.weight")[0, 0] = value
    text = message(lambda: Teacher(network, **NORM))
    assert "in 2 tensors: conv.bias, model.weight" in text


def test_rejects_nan_outputs(network: nn.Module) -> None:
    network.get_buffer("bn.running_var").fill_(-1)
    assert "black image with NaN" in message(lambda: Teacher(network, **NORM))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": (0.5,)}, "The mean is 0.5. Expected 3 finite numbers"),
        ({"std": (1.0, 1.0)}, "The std is 1,1. Expected 3 finite numbers"),
        ({"mean": (0.0, float("nan"), 0.0)}, "The mean is 0,nan,0"),
        ({"std": (1.0, 0.0, 1.0)}, "must be above 0"),
        ({"std": (1.0, -0.5, 1.0)}, "must be above 0"),
        ({"input_size": (3, 8)}, "The input size is 3,8."),
        ({"input_size": (3, 0, 8)}, "three positive whole numbers"),
        ({"input_size": ()}, "three positive whole numbers"),
        ({"crop_fraction": 0.0}, "The crop fraction is 0.0"),
        ({"interpolation": "cubic"}, "one of nearest,"),
    ],
)
def test_rejects_a_wrong_description(network: nn.Module, change: dict[str, Any], words: str) -> None:
    assert words in message(lambda: Teacher(network, **{**NORM, **change}))


def test_rejects_what_cannot_be_copied() -> None:
    module = nn.Conv2d(3, 2, 1)
    module.cache = module.weight * 2  # a result of autograd
    assert "copy.deepcopy(model)" in message(lambda: Teacher(module, input_size=SIZE))
