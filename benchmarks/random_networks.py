"""Networks of timm with random weights, for scripts that look at files and times."""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def import_timm() -> Any:
    """timm, also where torchvision does not fit the installed torch."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    return importlib.import_module("timm_shim").import_timm()


def show_noise(network: nn.Module, images: Tensor) -> nn.Module:
    """The network itself in eval mode, its BatchNorms with the statistics of images (N, C, H, W)."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
    return network.eval()
