"""A generator that is told the class of every image."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsq.images.class_losses import SecondClass
from zsq.images.sources import CHANNELS_LAST, EPS, LEAK, centre_crop, normalise, uniform, upsample_conv

WIDTHS = (128, 128, 64)  # channels after the linear layer and after each upsampling
NORM_EPS = (EPS, 0.8, 0.8)  # of the BatchNorm of each width


class ClassGenerator(nn.Module):
    """Latents and classes -> images; one network for all batches.

    linear -> (N, 128, H/4, W/4) -> BN -> up x2, conv 3x3 to 128 -> BN -> leaky ReLU -> up x2, conv 3x3 to 64
    -> BN -> leaky ReLU -> conv 3x3 to C -> tanh -> BN without parameters. Every BN normalises with the
    statistics of the batch, so each image depends on all that are made together, and the images have mean 0
    and variance 1 in every channel over the batch. If H or W is not a multiple of 4, a larger image is made
    and its centre kept.

    Source: GDFQ (arXiv:2003.03603), both generators of its code: CIFAR's ("input") and ImageNet's ("norms");
    sizes and eps are those of the code, where 0.8 may have been meant for a momentum.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        num_classes: int,
        *,
        latent_size: int,
        condition: Literal["input", "norms"],
        rng: torch.Generator,
    ) -> None:
        """Draw the parameters: layers as nn.Linear and nn.Conv2d do, vectors of classes from N(0, 1).

        Args:
            input_size: (C, H, W) of the images.
            num_classes: K.
            latent_size: length of a latent vector.
            condition: see `GeneratorSynthesis`.
            rng: on the CPU; the only randomness that is used.
        """
        super().__init__()
        channels, *self.size = input_size
        self.by_input = condition == "input"
        self.start = (WIDTHS[0], math.ceil(self.size[0] / 4), math.ceil(self.size[1] / 4))
        outputs = math.prod(self.start)
        self.linear_weight = uniform((outputs, latent_size), latent_size, rng)
        self.linear_bias = uniform((outputs,), latent_size, rng)
        convolutions = zip(WIDTHS, (*WIDTHS[1:], channels), strict=True)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in convolutions:
            self.weights.append(uniform((after, before, 3, 3), 9 * before, rng))
            self.biases.append(uniform((after,), 9 * before, rng))
        if self.by_input:
            self.classes = nn.Parameter(torch.randn(num_classes, latent_size, generator=rng))
        rows = () if self.by_input else (num_classes,)
        self.scales = nn.ParameterList(torch.ones(*rows, width) for width in WIDTHS)
        self.shifts = nn.ParameterList(torch.zeros(*rows, width) for width in WIDTHS)

    def forward(self, latents: Tensor, labels: Tensor, second: SecondClass | None = None) -> Tensor:
        """Latents (N, latent_size), labels (N,) int64 -> images (N, C, H, W), float32 also under autocast.

        With a second class, what is learned of the class is that of both in their shares.
        """

        def of_class(table: Tensor) -> Tensor:
            return table[labels] if second is None else second.mixed(table, labels)

        if self.by_input:
            latents = latents * of_class(self.classes)
        x = F.linear(latents, self.linear_weight, self.linear_bias).view(-1, *self.start)
        x = self._norm(x.contiguous(memory_format=CHANNELS_LAST), 0, of_class)
        for index in (0, 1):
            x = upsample_conv(x, self.weights[index], self.biases[index])
            x = F.leaky_relu(self._norm(x, index + 1, of_class), LEAK)
        x = F.conv2d(x, self.weights[2], self.biases[2], padding=1)
        height, width = self.size
        return normalise(centre_crop(x, height, width).float().tanh())

    def _norm(self, x: Tensor, index: int, of_class: Callable[[Tensor], Tensor]) -> Tensor:
        scale, shift, eps = self.scales[index], self.shifts[index], NORM_EPS[index]
        if self.by_input:
            return normalise(x, scale, shift, eps=eps)
        return normalise(x, eps=eps) * of_class(scale)[:, :, None, None] + of_class(shift)[:, :, None, None]
