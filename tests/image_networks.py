"""Small networks that image synthesis is tested on, with BatchNorm statistics of striped images."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from zsq.graph.capture import capture

SIZE = (3, 12, 12)


class Residual(nn.Module):
    """Strided convolutions in the main path and the shortcut, BatchNorm before the ReLU."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.shortcut, self.bn3 = nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.relu(self.bn2(self.conv2(x)) + self.bn3(self.shortcut(x))).mean((2, 3)))


class PreActivation(nn.Module):
    """BatchNorm on the images, before each convolution, and on features (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, (1, 2), 1)
        self.bn1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same")
        self.linear, self.bn2 = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.bn0(x)))
        x = x + self.conv2(F.relu(self.bn1(x)))
        return self.bn2(self.linear(x.mean((2, 3)))).relu()


class AfterReLU(nn.Module):
    """BatchNorm after the ReLU, one of them on (N, C, L), and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, "valid"), nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn1(F.relu(self.conv1(x), inplace=True))
        return x.mean((2, 3)), self.bn2(F.relu(x).flatten(2))


class NoBatchNorm(nn.Module):
    """Only a normalisation that stores nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


def photographs(num_images: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Random grey stripes with a little noise (N, C, H, W), mean 0 and deviation 1 over all images."""
    rng = torch.Generator().manual_seed(seed)
    stripes = torch.randn(num_images, 1, 1, size[2], generator=rng)
    images = stripes + 0.3 * torch.randn(num_images, *size, generator=rng)
    return (images - images.mean()) / images.std()


def trained(network: nn.Module, size: tuple[int, int, int] = SIZE) -> nn.Module:
    """Random parameters and the statistics of `photographs` in every BatchNorm; frozen, in eval mode."""
    rng = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=rng)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng)
            nn.init.normal_(module.bias, 0, 0.3, generator=rng)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(photographs(256, size))
    return network.eval().requires_grad_(False)


def captured(kind: type[nn.Module]) -> fx.GraphModule:
    """A network of this kind with reproducible parameters, captured."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind()
    return capture(trained(network), SIZE)
