"""Tiny networks with every kind of unit: residual, depthwise, several inputs, linear, tokens."""

import functools

import torch
from torch import Tensor, fx, nn

from zsq.graph.blocks import Unit, split
from zsq.graph.capture import capture
from zsq.models import Teacher
from zsq.quant.attach import Quantizers, attach
from zsq.quant.scheme import parse_bits

SIZE = (3, 8, 8)
CLASSES = 7


class ConvBn(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = ConvBn(inputs, outputs, 3, stride), ConvBn(outputs, outputs)
        self.shortcut = nn.Identity() if stride == 1 else ConvBn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class Residual(nn.Module):
    """Units stem, block1, block2, fc; SiLU after the stem, so that signed activations occur."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 6)
        self.block1, self.block2 = Block(6, 6, 1), Block(6, 10, 2)
        self.fc = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(nn.functional.silu(self.stem(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Summing(nn.Module):
    """Every layer reads the sum of all before it: cut into units that read several tensors."""

    def __init__(self, layers: int = 9) -> None:
        super().__init__()
        self.stem = ConvBn(3, 4)
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = [torch.relu(self.stem(x))]
        for layer in self.layers:
            total: Tensor = layer(found[-1])
            for other in found:
                total = total + other
            found.append(torch.relu(total / len(found)))
        y: Tensor = self.fc(found[-1].mean((2, 3)))
        return y


class Tokens(nn.Module):
    """A patch embedding and residual perceptrons on tokens (N, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, 4)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.down(nn.functional.gelu(self.up(self.norm(tokens))))
        y: Tensor = self.fc(tokens.mean(1))
        return y


class ChannelsLast(nn.Module):
    """A block whose linear layers work on (N, H, W, C) and which returns (N, C, H, W), as ConvNeXt's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.block = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with fixed random weights and BatchNorm statistics that fit normal images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # a plain average
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.uniform_(module.bias, -0.2, 0.2)
        with torch.no_grad():
            network.train()(images(256, seed=99))
    return network.eval()


def teacher(kind: type[nn.Module] = Residual, seed: int = 0) -> Teacher:
    return Teacher(made(kind, seed), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, name=kind.__name__)


def attached(
    kind: type[nn.Module], bits: str, *, ends: str = "8bit"
) -> tuple[fx.GraphModule, fx.GraphModule, Quantizers, tuple[Unit, ...]]:
    """Captured teacher, its student with quantizers that have no range yet, the quantizers and the units."""
    original, units = _captured(kind.__name__)
    student, quantizers = attach(original, parse_bits(bits, ends=ends))
    return original, student, quantizers, units


@functools.cache
def _captured(name: str) -> tuple[fx.GraphModule, tuple[Unit, ...]]:
    """Shared by all tests: nothing may change a teacher."""
    kind: type[nn.Module] = globals()[name]
    original = capture(made(kind).requires_grad_(False), SIZE)
    return original, split(original.graph)
