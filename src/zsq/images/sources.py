"""Where synthetic images come from: networks latent -> images."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDTHS = (128, 64)  # channels before and between the two upsamplings
LEAK = 0.2
EPS = 1e-5
CHANNELS_LAST = torch.channels_last


class LatentGenerator(nn.Module):
    """A small generator, trained from scratch for one batch of images together with its latents.

    linear -> (N, 128, H/4, W/4) -> BN -> up x2, conv 3x3 to 64 -> BN -> leaky ReLU -> up x2, conv 3x3 to C
    -> tanh -> BN without parameters. Every BN normalises with the statistics of the batch, so the images have
    mean 0 and variance 1 in every channel over the batch, the scale of normalised images, and each image
    depends on all latents. If H or W is not a multiple of 4, a larger image is made and its centre kept.

    Source: Genie (arXiv:2212.04780), sizes as in its code.
    """

    def __init__(
        self, input_size: tuple[int, int, int], *, latent_size: int = 256, rng: torch.Generator
    ) -> None:
        """Draw the parameters as nn.Linear and nn.Conv2d do, from `rng` (on the CPU).

        Args:
            input_size: (C, H, W) of the images.
            latent_size: length of a latent vector.
            rng: the only randomness that is used.
        """
        super().__init__()
        channels, *self.size = input_size
        wide, narrow = WIDTHS
        self.start = (wide, math.ceil(self.size[0] / 4), math.ceil(self.size[1] / 4))
        outputs = math.prod(self.start)
        self.linear_weight = uniform((outputs, latent_size), latent_size, rng)
        self.linear_bias = uniform((outputs,), latent_size, rng)
        self.conv1_weight = uniform((narrow, wide, 3, 3), 9 * wide, rng)
        self.conv1_bias = uniform((narrow,), 9 * wide, rng)
        self.conv2_weight = uniform((channels, narrow, 3, 3), 9 * narrow, rng)
        self.conv2_bias = uniform((channels,), 9 * narrow, rng)
        self.norm1_weight, self.norm1_bias = nn.Parameter(torch.ones(wide)), nn.Parameter(torch.zeros(wide))
        self.norm2_weight, self.norm2_bias = (
            nn.Parameter(torch.ones(narrow)),
            nn.Parameter(torch.zeros(narrow)),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, latent_size) -> images (N, C, H, W), float32 also under autocast."""
        x = F.linear(latents, self.linear_weight, self.linear_bias).view(-1, *self.start)
        x = x.contiguous(memory_format=CHANNELS_LAST)
        x = normalise(x, self.norm1_weight, self.norm1_bias)
        x = upsample_conv(x, self.conv1_weight, self.conv1_bias)
        x = F.leaky_relu(normalise(x, self.norm2_weight, self.norm2_bias), LEAK)
        x = upsample_conv(x, self.conv2_weight, self.conv2_bias)
        return normalise(centre_crop(x, *self.size).float().tanh())


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest upsampling x2 followed by a 3x3 convolution with padding 1, without the upsampled tensor.

    In each direction two of the three taps read the same input pixel; which two depends on whether the output
    pixel is even or odd. So this is four 2x2 convolutions (even and odd rows times even and odd columns) of
    the small input, with sums of taps as weights: 4 multiplications an output instead of 9. They run as one
    convolution with padding 1, whose channels are then interleaved.

    Args:
        x: (N, I, H, W).
        weight: (O, I, 3, 3).
        bias: (O,).

    Returns:
        (N, O, 2H, 2W), equal to the plain form up to the order of summation.
    """
    odd_even = _pair_taps(_pair_taps(weight, 2), 4)  # (O, I, row phase, 2, column phase, 2)
    kernel = odd_even.permute(2, 4, 0, 1, 3, 5).reshape(4 * weight.shape[0], weight.shape[1], 2, 2)
    # Position p of the result lies between input pixels p - 1 and p: output pixels 2p - 1 and 2p.
    between = F.conv2d(x, kernel, bias.repeat(4), padding=1)
    y: Tensor = _Interleave.apply(between)
    return y


def _pair_taps(weight: Tensor, axis: int) -> Tensor:
    """Replace an axis of 3 taps by (phase, 2 taps): (a + b, c) for odd pixels, (a, b + c) for even ones."""
    a, b, c = weight.unbind(axis)
    odd, even = torch.stack((a + b, c), axis), torch.stack((a, b + c), axis)
    return torch.stack((odd, even), axis)


class _Interleave(torch.autograd.Function):
    """(N, 4 O, H + 1, W + 1), channels (row phase, column phase, O), odd before even -> (N, O, 2H, 2W)."""

    @staticmethod
    def forward(ctx: Any, between: Tensor) -> Tensor:
        n, channels, height, width = between.shape
        shape = (n, channels // 4, 2 * (height - 1), 2 * (width - 1))
        result = torch.empty(shape, dtype=between.dtype, device=between.device, memory_format=CHANNELS_LAST)
        for target, source in _phases(result, between):
            target.copy_(source)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        n, channels, height, width = grad.shape
        shape = (n, 4 * channels, height // 2 + 1, width // 2 + 1)
        result = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=CHANNELS_LAST).zero_()
        for source, target in _phases(grad, result):
            target.copy_(source)
        return result


def _phases(image: Tensor, between: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The pixels of one phase in `image`, beside where `between` has them."""
    _, channels, height, width = image.shape
    for row in (0, 1):
        for column in (0, 1):
            start = (2 * row + column) * channels
            rows, columns = slice(1 - row, height // 2 + 1 - row), slice(1 - column, width // 2 + 1 - column)
            yield (
                image[:, :, 1 - row :: 2, 1 - column :: 2],
                between[:, start : start + channels, rows, columns],
            )


def normalise(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = EPS
) -> Tensor:
    """BatchNorm with the statistics of the batch."""
    if weight is None and bias is None and x.device.type == "cuda":
        # Its kernel there has one block of threads a channel, and images have three channels.
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + eps)
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The centre of (N, C, >= height, >= width)."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def uniform(shape: tuple[int, ...], fan_in: int, rng: torch.Generator) -> nn.Parameter:
    """The default of nn.Linear and nn.Conv2d: uniform in +-1 / sqrt(fan_in), weights and biases."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=rng))
