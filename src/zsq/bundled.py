"""The network that comes with zsq so that everything runs offline, `digits`, and the images behind it.

`scripts/train_digits.py` trained it on the real handwritten digits of scikit-learn (1797 images of 8 x 8
pixels, `sklearn.datasets.load_digits`) and wrote the weights beside this file.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsq.errors import import_extra

DIGITS_WEIGHTS = Path(__file__).with_name("digits.safetensors")
DIGITS_INPUT_SIZE = (1, 8, 8)
# Mean and (population) standard deviation of all pixels of the training part, in units of 255.
DIGITS_MEAN = (0.3048,)
DIGITS_STD = (0.3757,)

UInt8Array = NDArray[np.uint8]
Int64Array = NDArray[np.int64]


class DigitsBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """A small residual network: images (N, 1, 8, 8), normalised -> logits (N, 10); 56,250 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = DigitsBlock(16, 16, 1)
        self.layer2 = DigitsBlock(16, 32, 2)
        self.layer3 = DigitsBlock(32, 48, 2)
        self.linear = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def digits_split() -> tuple[UInt8Array, Int64Array, UInt8Array, Int64Array]:
    """The handwritten digits in a fixed split: in data order, every third image of a class is for testing.

    Returns:
        (train_images, train_labels, test_images, test_labels): images uint8 (N, 8, 8), the 17 grey levels
        0..16 of the source spread over 0..255; labels int64 (N,), 0..9. 1201 training and 596 test images.
        The writers of the two parts overlap, as the source does not say who wrote which digit.

    Raises:
        UsageError: scikit-learn, which holds the images, is not installed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository (test part).
    """
    data = import_extra("sklearn.datasets", "demo").load_digits()
    images = np.rint(np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(data.target).astype(np.int64)
    rank = np.zeros_like(labels)  # position within the class
    for digit in range(10):
        members = labels == digit
        rank[members] = np.arange(members.sum())
    test = rank % 3 == 2
    return images[~test], labels[~test], images[test], labels[test]
