"""A user's model file, and small checks that the tests of loading share."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from zsq.errors import UsageError
from zsq.models import Teacher

SIZE = (3, 8, 8)
NORM: dict[str, Any] = {"input_size": SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


CODE = """
import torch
from sibling import WIDTH
from torch import nn

CLASSES = 5

class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.model = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.model(self.bn(self.conv(x)).relu().mean((2, 3)))

class TwoInputs(TinyNet):
    def forward(self, x, y):
        return super().forward(x + y)

class TwoOutputs(TinyNet):
    def forward(self, x):
        return super().forward(x), x

class FixedView(TinyNet):
    def forward(self, x):
        return x.view(-1, 3 * 8 * 8)

def tiny():
    return TinyNet()

def two_inputs():
    return TwoInputs()

def two_outputs():
    return TwoOutputs()

def fixed_view():
    return FixedView()

def needs_argument(width):
    return TinyNet()

def broken():
    raise KeyError("stage5")

def leaves():
    raise SystemExit(3)

def no_module():
    return {"model": TinyNet()}

ready = TinyNet()
"""


def message(call: Callable[[], object]) -> str:
    """The text of the UsageError that `call` raises; one paragraph."""
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", ")", "'")) and caught.value.exit_code == 2
    return text


def same_weights(teacher: Teacher, network: nn.Module) -> bool:
    return teacher.sha256 == Teacher(network, input_size=SIZE).sha256
