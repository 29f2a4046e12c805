"""Where synthetic images come from: networks latent -> images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (128, 64)  # channels before and between the two upsamplings
LEAK = 0.2
EPS = 1e-5


class LatentGenerator(nn.Module):
    """A small generator, trained from scratch for one batch of images together with its latents.

    linear -> (N, 128, H/4, W/4) -> BN -> up x2, conv 3x3 to 64 -> BN -> leaky ReLU -> up x2, conv 3x3 to C -> tanh -> BN
    without parameters. Every BN normalises with the statistics of the batch, so the images have mean 0 and variance 1
    in every channel over the batch, the scale of normalised images, and each image depends on all latents.
    If H or W is not a multiple of 4, the next larger image is made and its centre kept.

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
        self.linear_weight = _uniform((outputs, latent_size), latent_size, rng)
        self.linear_bias = _uniform((outputs,), latent_size, rng)
        self.conv1_weight = _uniform((narrow, wide, 3, 3), 9 * wide, rng)
        self.conv1_bias = _uniform((narrow,), 9 * wide, rng)
        self.conv2_weight = _uniform((channels, narrow, 3, 3), 9 * narrow, rng)
        self.conv2_bias = _uniform((channels,), 9 * narrow, rng)
        self.norm1_weight, self.norm1_bias = nn.Parameter(torch.ones(wide)), nn.Parameter(torch.zeros(wide))
        self.norm2_weight, self.norm2_bias = (
            nn.Parameter(torch.ones(narrow)),
            nn.Parameter(torch.zeros(narrow)),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, latent_size) -> images (N, C, H, W), float32 also under autocast."""
        x = F.linear(latents, self.linear_weight, self.linear_bias).view(-1, *self.start)
        x = _normalise(x, self.norm1_weight, self.norm1_bias)
        x = upsample_conv(x, self.conv1_weight, self.conv1_bias)
        x = F.leaky_relu(_normalise(x, self.norm2_weight, self.norm2_bias), LEAK)
        x = upsample_conv(x, self.conv2_weight, self.conv2_bias)
        return _normalise(_crop(x, *self.size).float().tanh())


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest upsampling x2 followed by a 3x3 convolution with padding 1, without the upsampled tensor.

    In each direction two of the three taps read the same input pixel, which pair depends on whether the output
    pixel is even or odd. So this is four 2x2 convolutions (one each for even/odd row and column) of the small
    input, with sums of taps as weights: 4 multiplications instead of 9. All four are one convolution with padding
    1, whose outputs interleave.

    Args:
        x: (N, I, H, W).
        weight: (O, I, 3, 3).
        bias: (O,).

    Returns:
        (N, O, 2H, 2W), equal to the plain form up to the order of summation.
    """
    kernel = _pair_taps(_pair_taps(weight, 2), 4)  # (O, I, phase, 2, phase, 2)
    kernel = kernel.permute(0, 2, 4, 1, 3, 5).reshape(4 * weight.shape[0], weight.shape[1], 2, 2)
    # Between two neighbours p - 1 and p of the padded input lie the odd pixel 2p - 1 and the even pixel 2p.
    pairs = F.conv2d(x, kernel, bias.repeat_interleave(4), padding=1)
    return F.pixel_shuffle(pairs, 2)[:, :, 1:-1, 1:-1]


def _pair_taps(weight: Tensor, axis: int) -> Tensor:
    """Replace an axis of 3 taps by (phase, 2 taps): the odd pixel (a + b, c), then the even one (a, b + c)."""
    a, b, c = weight.unbind(axis)
    odd, even = torch.stack((a + b, c), axis), torch.stack((a, b + c), axis)
    return torch.stack((odd, even), axis)


def _normalise(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """BatchNorm with the statistics of the batch."""
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """The centre of (N, C, >= height, >= width)."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def _uniform(shape: tuple[int, ...], fan_in: int, rng: torch.Generator) -> nn.Parameter:
    """The default of nn.Linear and nn.Conv2d: uniform in +-1 / sqrt(fan_in), weights and biases."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=rng))
