"""Small networks of many families that the graph stages are tested on, with random BatchNorm statistics."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from zsq.graph.blocks import Unit, extract
from zsq.graph.capture import capture
from zsq.graph.nodes import output_nodes

SIZE = (3, 16, 16)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Basic(nn.Module):
    """Residual block; where the shape changes, a projection or (option A) every second pixel and zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, project: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu, self.pad = nn.ReLU(inplace=True), (outputs - inputs) // 2
        changes = inputs != outputs
        self.shortcut = (
            nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if changes and project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        out += x
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self, *, project: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pool = conv(3, 8), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16, 2, project=project), Basic(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


class PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return out + (x if self.shortcut is None else self.shortcut(a))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.layer1 = nn.Sequential(PreActivationBlock(8, 8), PreActivationBlock(8, 8))
        self.layer2 = nn.Sequential(PreActivationBlock(8, 16, 2))
        self.bn, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))  # type: ignore[no-any-return]


class SeparableBlock(nn.Module):
    """Reads an attribute of a submodule in its forward, and pads as TensorFlow does."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(inputs, inputs, 3, stride, 2 - stride, groups=inputs, bias=False)
        self.bn1, self.pw, self.bn2 = (
            nn.BatchNorm2d(inputs),
            conv(inputs, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.dw.stride == (2, 2) else x
        return F.relu6(self.bn2(self.pw(F.relu6(self.bn1(self.dw(x))))))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)
        shapes = [(8, 16, 1), (16, 16, 2), (16, 16, 1)]
        self.blocks = nn.Sequential(*(SeparableBlock(*shape) for shape in shapes))
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn1(self.conv1(F.pad(x, (0, 1, 0, 1))))))
        return self.fc(self.drop(x.mean((2, 3))))  # type: ignore[no-any-return]


class TensorFlowBlock(nn.Module):
    """The strided convolution reads padded values, the shortcut convolution the same ones unpadded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.main, self.shortcut = conv(3, 8), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 8, 1, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.main(F.pad(x, (0, 1, 0, 1))) + self.shortcut(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class AfterReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(F.relu(self.conv2(self.bn1(F.relu(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.expand, self.bn1 = conv(channels, expanded, 1), nn.BatchNorm2d(expanded)
        self.dw, self.bn2 = conv(expanded, expanded, 3, 1, expanded), nn.BatchNorm2d(expanded)
        self.reduce, self.widen = nn.Conv2d(expanded, 4, 1), nn.Conv2d(4, expanded, 1)
        self.project, self.bn3 = conv(expanded, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn2(self.dw(F.silu(self.bn1(self.expand(x))))))
        y = y * self.widen(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.bn3(self.project(y))  # type: ignore[no-any-return]


class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(InvertedResidual(8, 16), InvertedResidual(8, 16))
        self.head, self.fc = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.hardswish(self.bn(self.stem(x))))
        return self.fc(F.hardswish(self.head(F.adaptive_avg_pool2d(x, 1))).flatten(1))  # type: ignore[no-any-return]


class DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 8, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), conv(8, 4)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.bn1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.bn2(x)))  # type: ignore[no-any-return]


class Dense(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.stem, self.fc = conv(3, 8), nn.Linear(8 + 4 * layers, 5)
        self.block = nn.ModuleList(DenseLayer(8 + 4 * i) for i in range(layers))
        self.bn = nn.BatchNorm2d(8 + 4 * layers)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block:
            features.append(layer(features))
        return self.fc(F.relu(self.bn(torch.cat(features, 1))).mean((2, 3)))  # type: ignore[no-any-return]


class ShuffleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv(half, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            conv(half, half, 3, 1, half),
            nn.BatchNorm2d(half),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        n, c, h, w = x.shape
        y = torch.cat((a, self.branch(b)), 1)
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.blocks, self.fc = nn.Sequential(ShuffleBlock(8), ShuffleBlock(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Detector(nn.Module):
    """Two scales and three heads, in a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8, 3, 2), conv(8, 16, 3, 2)
        self.lateral, self.bn = conv(24, 8, 1), nn.BatchNorm2d(8)
        self.boxes, self.scores = (
            nn.Conv2d(8, 4, 1),
            nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), conv(8, 6, 1)),
        )
        self.objects = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        fine = F.relu(self.stem(x))
        coarse = F.relu(self.down(fine))
        y = self.lateral(torch.cat((fine, F.interpolate(coarse, scale_factor=2.0)), 1))
        y = F.relu(self.bn(y))
        boxes = self.boxes(y)
        return {
            "boxes": boxes,
            "classes": (self.objects(y).sigmoid(), self.scores(y).softmax(1)),
            "none": None,
        }


class Pyramid(nn.Module):
    """Returns what it goes on from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block1, self.block2 = conv(3, 8), Basic(8, 8), Basic(8, 16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu(self.stem(x))
        b = self.block1(a)
        return a, b, self.block2(b)


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class GatedBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.dw, self.norm = conv(half, half, 3, 1, half), ChannelNorm(channels)
        self.fc1, self.fc2 = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        a, b = self.fc1(self.norm(torch.cat((a, self.dw(b)), 1))).chunk(2, 1)
        return self.fc2(a.tanh() * b) * self.gain + x  # type: ignore[no-any-return]


class Gated(nn.Module):
    """LayerNorm and no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = conv(3, 8), ChannelNorm(8)
        self.l1, self.l2, self.fc = GatedBlock(8), GatedBlock(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.l2(self.l1(self.norm(self.conv1(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        return self.proj(y)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The class token is expanded to the number of images inside."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.blocks = nn.Sequential(TransformerBlock(8), TransformerBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


class LinearAttention(nn.Module):
    """Products without softmax, divided by queries times the sum of the keys, as in EfficientViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = conv(3, 8, 3, 4), nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, 2)
        q, k, v = F.relu(q), F.relu(k), F.pad(v, (0, 1), value=1.0)
        y = q @ (k.transpose(1, 2) @ v)
        y = (y[..., :-1] / (y[..., -1:] + 1e-15)).transpose(1, 2).unflatten(2, x.shape[2:])
        return self.fc((x + self.proj(y)).mean((2, 3)))  # type: ignore[no-any-return]


class EinsumAttention(nn.Module):
    """Attention as many write it: einsum for both products."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).unbind(2)
        weights = torch.einsum("nqhc,nkhc->nhqk", q, k).mul(0.5).softmax(-1)
        return self.head((x + torch.einsum("nhqk,nkhc->nqhc", weights, v).flatten(2)).mean(1))  # type: ignore[no-any-return]


class Positions(nn.Module):
    """A layer embeds positions for every image anew; the class token reads the patches, as in CaiT.

    The positions are written in place into a part of a tensor, within `no_grad`; the attention computes in
    float32 within an autocast that is off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.embed = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(2, 8, 1)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.attn, self.head = nn.LayerNorm(8), Attention(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            positions = torch.zeros(1, 2, 4, 4, device=x.device)
            positions[:, 0] = torch.linspace(0, 1, 4)
            positions[:, 1] = torch.linspace(0, 1, 4)[:, None]
        x = self.patches(x) + self.embed(positions.expand(x.shape[0], -1, -1, -1))
        x, token = x.flatten(2).transpose(1, 2), self.token.expand(x.shape[0], -1, -1)
        with torch.autocast("cpu", enabled=False):
            read = self.attn(self.norm(torch.cat((token, x), 1).to(torch.float32)))
        return self.head((token + read[:, :1])[:, 0])  # type: ignore[no-any-return]


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: the weight that is used depends on parameters only."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) * (var + 1e-5).rsqrt(), self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(StandardisedConv(3, 8, 3, padding=1), nn.ReLU(), StandardisedConv(8, 8, 3))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(x).mean((2, 3)))  # type: ignore[no-any-return]


class Reused(nn.Module):
    """One convolution and one activation called twice, each convolution before a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.act = conv(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv(self.act(self.stem(x)))))
        return self.fc(self.act(self.bn2(self.conv(F.max_pool2d(x, 2)))).mean((2, 3)))  # type: ignore[no-any-return]


class Functional(nn.Module):
    """Parameters of the outermost module, without layers; two layers share their bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.weight2 = (
            nn.Parameter(torch.randn(8, 3, 3, 3)),
            nn.Parameter(torch.randn(8, 8, 1, 1)),
        )
        self.bias, self.classes = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(5, 8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.mean: Tensor
        self.var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.batch_norm(F.conv2d(x, self.weight, self.bias), self.mean, self.var))
        x = F.relu(F.conv2d(x, self.weight2, self.bias))
        return F.linear(x.mean((2, 3)), self.classes)


class Written(nn.Module):
    """Writes in place wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y.relu_()
        z = F.dropout(y, 0.5, self.training, inplace=True)
        z.add_(1).clamp_(max=3)  # writes to y as well
        out = F.dropout2d(self.conv2(z), 0.5, self.training)
        out += y
        out *= 0.5
        return self.fc(F.relu(out, inplace=True).mean((2, 3)))  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """Transposed convolutions, grouped too, and features (N, C), each before a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, 2, padding="valid"), nn.BatchNorm2d(8, affine=False)
        self.up1, self.bn1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6)
        self.up2, self.bn2 = nn.ConvTranspose2d(6, 9, 3, groups=3, bias=False), nn.BatchNorm2d(9)
        self.linear, self.bn3 = nn.Linear(9, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = self.bn2(self.up2(F.relu(self.bn1(self.up1(x)))))
        return self.bn3(self.linear(x.mean((2, 3))))  # type: ignore[no-any-return]


class Linear(nn.Module):
    """A single layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "resnet_a": lambda: ResNet(project=False),
    "preactivation": PreActivation,
    "separable": Separable,
    "tensorflow": TensorFlowBlock,
    "after_relu": AfterReLU,
    "mobilenetv3": MobileNetV3,
    "dense": Dense,
    "shuffle": Shuffle,
    "detector": Detector,
    "pyramid": Pyramid,
    "gated": Gated,
    "transformer": Transformer,
    "linear_attention": LinearAttention,
    "einsum": EinsumAttention,
    "positions": Positions,
    "standardised": Standardised,
    "reused": Reused,
    "functional": Functional,
    "written": Written,
    "transposed": Transposed,
    "linear": Linear,
    "conv": lambda: nn.Conv2d(3, 4, 3),
}


def randomised(network: nn.Module) -> nn.Module:
    """Reproducible random BatchNorm statistics and factors; frozen, in eval mode."""
    rng = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.3, 2, generator=rng)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng)
                nn.init.normal_(module.bias, 0, 0.3, generator=rng)
    return network.eval().requires_grad_(False)


@cache
def network(name: str) -> nn.Module:
    """A network of the table with reproducible random parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomised(NETWORKS[name]())


@cache
def graph_of(name: str) -> fx.GraphModule:
    """The network captured; treat it as read-only."""
    return capture(network(name), SIZE)


def images(count: int, size: tuple[int, int, int] = SIZE) -> Tensor:
    """Reproducible random images (N, C, H, W)."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    """All tensors that a module returns, in order."""
    return [t for t in pytree.tree_leaves(module(x)) if isinstance(t, Tensor)]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def chained(module: fx.GraphModule, units: Sequence[Unit], x: Tensor) -> list[Tensor]:
    """Outputs of a network computed unit by unit; each unit sees nothing but its inputs."""
    values = {next(n.name for n in module.graph.nodes if n.op == "placeholder"): x}
    for unit in units:
        results = extract(module, unit.inputs, unit.outputs)(*(values[name] for name in unit.inputs))
        values.update(zip(unit.outputs, results, strict=True))
    return [values[node.name] for node in output_nodes(module.graph)]


def node_of(graph: fx.Graph, weight: str) -> fx.Node:
    """The layer that reads the weight of this name, `layer1.0.conv1`."""
    readers = []
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == f"{weight}.weight":
            readers.extend(node.users)
    assert len(readers) == 1 and isinstance(readers[0], fx.Node)
    return readers[0]
