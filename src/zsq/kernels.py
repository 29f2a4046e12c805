"""Which kernels a device computes with: those that give the same bits again, in full float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def reproducible(device: torch.device | str, *, rounded: bool = False) -> Iterator[None]:
    """Within it CUDA's convolutions give the same bits every time, and float32 ones are in float32.

    PyTorch lets cuDNN add up in an open order, and round the operands of float32 convolutions to 10 bits
    (TF32): then a rounding of an activation may fall to the other side than in the engine that runs the model
    later. Nothing changes on other devices.

    Args:
        device: where one computes.
        rounded: allow TF32, several times as fast: where no rounding of the student depends on it, in
            gradients and in the synthesis of images.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=rounded):
        yield


def computing_in(precision: str, device: torch.device, *, cache: bool = True) -> torch.autocast:
    """Within it convolutions and matrix products are computed in a precision; enter it again in every step.

    Args:
        precision: "float32", in which nothing changes, or "bfloat16".
        device: where one computes.
        cache: cast each weight once between entering and leaving. Without, where steps are recorded and
            weights change in them.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=cache)
