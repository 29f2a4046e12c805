"""Genie as it was published, for comparison of speed: eager float32, plain operations, nothing saved.

Written from the description of the algorithm and of what its code does (arXiv:2212.04780): the frozen teacher
still computes gradients of its weights, statistics are reductions, every unit's inputs and outputs come from
forward passes of the whole networks, Adam and learning-rate schedules are torch's, drops and roundings are
left to autograd. Three things are those of zsq, so that both do the same work: the first random numbers, the
units and places of the quantizers (the published code knows a fixed list of networks), and minibatches of
`batch_size` images (the published ones have that many at 1024 images only).

Both loops are generators that yield the losses of a step, so that two programs can take turns.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from zsq.graph.blocks import Unit, extract
from zsq.graph.nodes import LAYERS, weight_node
from zsq.graph.tensors import get_tensor
from zsq.images.settings import Synthesis
from zsq.images.sources import LatentGenerator
from zsq.quant.attach import attach
from zsq.quant.scheme import Scheme
from zsq.recipe import Reconstruction

CACHE_BATCH = 32  # images a forward pass when caching
RATIOS = [ratio / 100 for ratio in range(100, 0, -1)]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
Losses = dict[str, float]


def swung(x: Tensor, rng: torch.Generator) -> Tensor:
    """The input (N, C, H, W) of a swing convolution: padded by reflection, cut back at a random place."""
    height, width = x.shape[-2:]
    top, left = torch.randint(3, (2,), generator=rng).tolist()
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return padded[:, :, top : top + height, left : left + width]


def published_generator(start: LatentGenerator) -> nn.Sequential:
    """The generator as layers, with the parameters of `start`, whose images must be of its full size."""
    (wide, height, width), channels = start.start, start.conv2_bias.numel()
    if list(start.size) != [4 * height, 4 * width]:
        raise ValueError(f"height and width must be multiples of 4, got {start.size}")
    narrow = start.conv1_bias.numel()
    linear = nn.Linear(start.linear_weight.shape[1], wide * height * width)
    convs = nn.Conv2d(wide, narrow, 3, 1, 1), nn.Conv2d(narrow, channels, 3, 1, 1)
    names = ("linear", "conv1", "conv2")
    for layer, name in zip((linear, *convs), names, strict=True):
        layer.weight = nn.Parameter(getattr(start, f"{name}_weight").detach().clone())
        layer.bias = nn.Parameter(getattr(start, f"{name}_bias").detach().clone())
    return nn.Sequential(
        linear,
        nn.Unflatten(1, (wide, height, width)),
        nn.BatchNorm2d(wide),
        nn.Upsample(scale_factor=2),
        convs[0],
        nn.BatchNorm2d(narrow),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Upsample(scale_factor=2),
        convs[1],
        nn.Tanh(),
        nn.BatchNorm2d(channels, affine=False),
    )


def synthesis(
    network: nn.Module,
    settings: Synthesis,
    input_size: tuple[int, int, int],
    num_images: int,
    *,
    rng: torch.Generator,
    device: torch.device,
    made: list[Tensor] | None = None,
) -> Iterator[Losses]:
    """One batch of images; yields {"loss", "bn", "image"} after every step.

    Args:
        network: the full-precision model, its layers nn.Conv2d and nn.BatchNorm1d or 2d; copied.
        settings: steps, sizes and learning rates.
        input_size: (C, H, W), H and W multiples of 4.
        num_images: of this batch.
        rng: draws latents, parameters of the generator and shifts, in this order.
        device: where to compute.
        made: where to put the images, those that the last step began with.
    """
    teacher = copy.deepcopy(network).to(device).eval().requires_grad_(True)
    for module in teacher.modules():
        if settings.swing and isinstance(module, nn.Conv2d) and any(s != 1 for s in module.stride):
            module.register_forward_pre_hook(lambda _, inputs: swung(inputs[0], rng))
    seen: list[tuple[Any, Tensor]] = []
    for module in teacher.modules():
        if isinstance(module, NORMS):
            module.register_forward_pre_hook(lambda layer, inputs: seen.append((layer, inputs[0])))
    latents = torch.randn(num_images, settings.latent_size, generator=rng).to(device).requires_grad_()
    start = LatentGenerator(input_size, latent_size=settings.latent_size, rng=rng)
    generator = published_generator(start).to(device)
    optimizer_z = torch.optim.Adam([latents], lr=settings.lr_latent)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=settings.lr_generator)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer_z,
        factor=settings.plateau_factor,
        patience=settings.plateau_patience,
        min_lr=settings.lr_latent_min,
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer_g, gamma=settings.generator_decay)
    for step in range(settings.steps):
        seen.clear()
        optimizer_z.zero_grad()
        optimizer_g.zero_grad()
        teacher.zero_grad()
        images = generator(latents)
        teacher(images)
        mean, std = images.mean((2, 3)), images.std((2, 3))
        image_loss = (mean.norm() ** 2 + (std - 1).norm() ** 2) / len(images)
        bn_loss = torch.zeros((), device=device)
        for layer, features in seen:
            axes = [axis for axis in range(features.ndim) if axis != 1]
            target_std = torch.sqrt(layer.running_var + 1e-6)
            mean, std = features.mean(axes), features.std(axes)
            bn_loss = bn_loss + (
                (mean - layer.running_mean).norm() ** 2 + (std - target_std).norm() ** 2
            ) / len(mean)
        loss = bn_loss + image_loss
        loss.backward()
        optimizer_z.step()
        optimizer_g.step()
        plateau.step(loss.item())
        if (step + 1) % settings.generator_decay_interval == 0:
            decay.step()
        if made is not None and step == settings.steps - 1:
            made.append(images.detach())
        yield {"loss": loss.item(), "bn": bn_loss.item(), "image": image_loss.item()}


def _search(x: Tensor, quantized: "QuantizeWith", highest: Tensor) -> tuple[Tensor, Tensor]:
    """Of 100 ratios the one with the least 2.4-norm error in each row of (C, K): scale and zero point."""
    best = torch.full(highest.shape, torch.inf, device=x.device)
    scale, zero_point = torch.empty_like(best), torch.empty_like(best)
    for ratio in RATIOS:
        candidate, zero = quantized.range_of(highest * ratio)
        error = (x - quantized(x, candidate, zero)).abs().pow(2.4).mean(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, candidate, scale), torch.where(better, zero, zero_point)
    return scale, zero_point


class QuantizeWith:
    """Codes lowest..highest; `lowest_share` says where a range starts, relative to its upper end or width."""

    def __init__(self, lowest: int, highest: int, share: Tensor | None = None) -> None:
        self.lowest, self.highest, self.share = lowest, highest, share

    def range_of(self, width: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range of this width (weights) or up to this value (activations)."""
        if self.share is None:
            return width / self.highest, torch.zeros_like(width)
        scale = (width / (self.highest - self.lowest)).clamp(min=1e-12)
        return scale, (-self.share * width / scale).round()

    def __call__(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """x rounded to the levels of a range."""
        codes = ((x / scale).round() + zero_point).clamp(self.lowest, self.highest)
        return (codes - zero_point) * scale


class RoundedWeight(nn.Module):
    """A weight with learned rounding: soft while it is learned, else hard."""

    def __init__(self, weight: Tensor, *, bits: int, axis: int) -> None:
        super().__init__()
        rows = weight.detach().transpose(0, axis).flatten(1)
        lo, hi = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        width = (hi - lo).clamp(min=1e-12)
        scale, zero_point = _search(rows, QuantizeWith(0, 2**bits - 1, lo / width), width)
        shape = [1] * weight.ndim
        shape[axis] = -1
        self.highest, self.soft = 2**bits - 1, False
        self.scale, self.zero_point = nn.Parameter(scale.view(shape)), zero_point.view(shape)
        self.base = (weight.detach() / self.scale.detach()).floor()
        rest = weight.detach() / self.scale.detach() - self.base
        self.logits = nn.Parameter(-torch.log(1.2 / (rest + 0.1) - 1))

    def rounding(self) -> Tensor:
        """h(V) in [0, 1]."""
        return (1.2 * torch.sigmoid(self.logits) - 0.1).clamp(0, 1)

    def forward(self) -> Tensor:
        """The weight in float."""
        up = self.rounding() if self.soft else (self.logits >= 0).float()
        codes = (self.base + up + self.zero_point).clamp(0, self.highest)
        return self.scale * (codes - self.zero_point)


class DroppedActivation(nn.Module):
    """Float until it is switched on; its step comes from the first tensor it meets then, and is learned."""

    def __init__(self, *, bits: int, rng: torch.Generator) -> None:
        super().__init__()
        self.bits, self.rng = bits, rng
        self.enabled, self.drop_prob = False, 0.0
        self.limits = 0, 2**bits - 1
        self.scale: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, each element with probability `drop_prob` left as it is."""
        if not self.enabled:
            return x
        if self.scale is None:
            if x.min() < 0:
                self.limits = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
            rows = x.detach().flatten()[None]
            scale, _ = _search(rows, QuantizeWith(*self.limits), rows.abs().amax(1, keepdim=True))
            self.scale = nn.Parameter(scale.view(()).clamp(min=1e-12))
        clipped = (x / self.scale).clamp(*self.limits)
        quantized = self.scale * (clipped + (clipped.round() - clipped).detach())
        if not self.drop_prob:
            return quantized
        return torch.where(_draw(x, self.rng) < self.drop_prob, x, quantized)


def _draw(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=rng, device=x.device)


def published_student(
    teacher: fx.GraphModule, scheme: Scheme, rng: torch.Generator
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The student with these quantizers at the places of the scheme, and layer -> name of its quantizer."""
    student, places = attach(teacher, scheme)
    for node in teacher.graph.nodes:
        weight = weight_node(node)
        if weight is not None:
            name = places.weights[node.name]
            bits = int(student.get_submodule(name).bits)  # type: ignore[arg-type]
            rounded = RoundedWeight(
                get_tensor(teacher, str(weight.target)), bits=bits, axis=LAYERS[node.target]
            )
            student.set_submodule(name, rounded)
    for name in places.activations.values():
        bits = int(student.get_submodule(name).bits)  # type: ignore[arg-type]
        student.set_submodule(name, DroppedActivation(bits=bits, rng=rng))
    return student, places.weights


def tapped(graph_module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The whole network, run to its end, that returns the tensors of these nodes, as hooks would."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(graph_module.graph, copies)
    by_name = {node.name: node for node in graph_module.graph.nodes}
    graph.output(tuple(copies[by_name[name]] for name in names))
    return fx.GraphModule(graph_module, graph, "Tapped")


@torch.no_grad()
def cached(graph_module: fx.GraphModule, names: Sequence[str], images: Tensor) -> list[Tensor]:
    """Tensors of these nodes for all images, from forward passes of the whole network."""
    network = tapped(graph_module, names)
    rows = [network(chunk) for chunk in images.split(CACHE_BATCH)]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def reconstruction(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    weight_quantizers: dict[str, str],
    unit: Unit,
    images: Tensor,
    *,
    settings: Reconstruction,
    channel_axis: int,
    rng: torch.Generator,
) -> Iterator[Losses]:
    """Learn one unit; yields {"loss", "reconstruction"} after every step.

    Args:
        teacher: the captured network.
        student: from `published_student`; units before this one are finished.
        weight_quantizers: from `published_student`.
        unit: from `split`.
        images: (N, C, H, W), on the device to compute on.
        settings: steps, rates, probabilities.
        channel_axis: over which the loss sums.
        rng: on that device; draws minibatches and drops.
    """
    part = extract(student, unit.inputs, unit.outputs)
    activations = [m for m in part.modules() if isinstance(m, DroppedActivation)]
    own = [student.get_submodule(weight_quantizers[name]) for name in unit.layers]
    weights = [w for w in own if isinstance(w, RoundedWeight)]
    for quantizer in activations:
        quantizer.enabled = True
    count = len(unit.inputs)
    tensors = cached(teacher, (*unit.inputs, *unit.outputs), images)
    inputs, targets = tensors[:count], tensors[count:]
    student_inputs = cached(student, unit.inputs, images)
    scales = [q.scale for q in activations if q.scale is not None]
    part.requires_grad_(True)
    optimizers = [
        torch.optim.Adam([w.logits for w in weights], lr=settings.lr_rounding),
        torch.optim.Adam([w.scale for w in weights], lr=settings.lr_weight_scale),
        *([torch.optim.Adam(scales, lr=settings.lr_activation_scale)] if scales else []),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=settings.steps) for o in optimizers[1:]]
    for quantizer in activations:
        quantizer.drop_prob = settings.drop_prob
    for weight in weights:
        weight.soft = True
    order = torch.empty(0, dtype=torch.long)
    size = min(settings.batch_size, len(images))
    for step in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(len(images), generator=rng, device=rng.device)
        index, order = order[:size], order[size:]
        mixed = [
            torch.where(_draw(x[index], rng) < settings.input_mix_prob, x[index], q[index])
            for x, q in zip(inputs, student_inputs, strict=True)
        ]
        distance = torch.zeros((), device=images.device)
        for output, target in zip(part(*mixed), targets, strict=True):
            distance = distance + (output - target[index]).abs().pow(2).sum(channel_axis).mean()
        loss = distance
        warm = settings.warmup * settings.steps
        if step >= warm:
            progress = (step - warm) / (settings.steps - warm)
            beta = settings.beta_start + (settings.beta_end - settings.beta_start) * progress
            for weight in weights:
                h = weight.rounding()
                loss = loss + settings.rounding_weight * (1 - (2 * h - 1).abs().pow(beta)).sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        yield {"loss": loss.item(), "reconstruction": distance.item()}
    for weight in weights:
        weight.soft = False
    for quantizer in activations:
        quantizer.drop_prob = 0.0
    part.requires_grad_(False)
