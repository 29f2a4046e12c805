"""Networks whose BatchNorm statistics are those of the images given here, for what works without images."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from zsq.graph.capture import capture

SIZE = (3, 8, 8)


def images(count: int, seed: int = 0) -> Tensor:
    """Normal pixels, (N, *SIZE)."""
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


class Separable(nn.Module):
    """Plain, depthwise, grouped and pointwise convolutions, a pool, a flattened map, a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pointwise, self.bn3 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 6, 1, groups=3, bias=False)
        self.bn4 = nn.BatchNorm2d(6)
        self.hidden, self.bn5, self.linear = nn.Linear(6 * 9, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.leaky_relu(self.bn2(self.depthwise(x)), 0.1)
        x = F.max_pool2d(F.relu(self.bn3(self.pointwise(x))), 2)
        x = F.relu(self.bn4(self.grouped(x))).flatten(1)
        return self.linear(F.relu(self.bn5(self.hidden(x))))


class Shortcut(nn.Module):
    """A residual block with padded channels, ReLU6, and a head on pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        x = F.silu(x)
        x = F.relu6(self.bn3(self.conv3(x)))
        return self.linear(x.mean((2, 3)))


def fitted(kind: type[nn.Module], *, spread: float = 1.0, lift: float = 0.0) -> fx.GraphModule:
    """A captured network with random parameters and the statistics of `images`.

    Args:
        kind: of the network.
        spread: deviation of the logarithm of the output channels' scales.
        lift: added to every beta.
    """
    rng = torch.Generator().manual_seed(1)
    network = kind()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=rng)
            scales = (spread * torch.randn(len(module.weight), generator=rng)).exp()
            module.weight.data *= scales.view(-1, *[1] * (module.weight.ndim - 1))
            if module.bias is not None:
                nn.init.normal_(module.bias, generator=rng)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.3, 1.5, generator=rng)
            nn.init.normal_(module.bias, lift, 0.5, generator=rng)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(512, seed=7))
    return capture(network.eval().requires_grad_(False), SIZE)


def values_at(module: fx.GraphModule, names: Collection[str], x: Tensor) -> dict[str, Tensor]:
    """What some nodes compute, as (C, all values of the channel)."""
    found: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in names:
                found[n.name] = value.transpose(0, 1).flatten(1)
            return value

    Recorder(module).run(x)
    return found
