"""Gaussian low-pass filter of images in the frequency domain."""

import torch
from torch import Tensor

from zsq.images.settings import LowPass


def low_pass_gain(settings: LowPass, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Gain exp(-((v / d_v)^2 + (u / d_u)^2) / 2) at v and u periods an image, down and across.

    d_v and d_u are the cutoff, in periods an image: the same number for "bins", the share of the height and
    of the width for "size". At frequency 0 the gain is exactly 1.

    Returns:
        (height, width // 2 + 1), in the order of `torch.fft.rfft2`: v = 0, 1, ..., -1; u = 0 .. width // 2.

    Source: SynQ (arXiv:2603.18423); frequencies as its code has them, width // 2 in the middle of the grid.
    """
    by_size = settings.unit == "size"
    down = settings.cutoff * (height if by_size else 1)
    across = settings.cutoff * (width if by_size else 1)
    v = torch.fft.fftfreq(height, d=1 / height, device=device) / down
    u = torch.fft.rfftfreq(width, d=1 / width, device=device) / across
    return torch.exp(-(v.square()[:, None] + u.square()) / 2)


def low_pass(images: Tensor, gain: Tensor) -> Tensor:
    """Images whose frequencies are multiplied by their gain, every channel on its own.

    Channel means stay, so it does not matter whether images are normalised before or after. Edges wrap round.

    Args:
        images: (N, C, H, W), float32.
        gain: from `low_pass_gain` for H and W, on their device.

    Returns:
        (N, C, H, W), real.

    Raises:
        ValueError: the gain is that of another size.
    """
    height, width = images.shape[-2:]
    if gain.shape != (height, width // 2 + 1):
        raise ValueError(f"for {height} x {width} pixels the gain must be {height} x {width // 2 + 1}")
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(height, width))
    return filtered
