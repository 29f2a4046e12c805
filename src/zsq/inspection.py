"""What a finished run tells of itself besides its results; recorded while both networks are at hand."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.nodes import weight_node
from zsq.graph.tensors import device_of, get_tensor
from zsq.images.forward import observe
from zsq.out_of_memory import in_chunks
from zsq.quant.affine import along_axis
from zsq.quant.attach import Quantizers
from zsq.quant.quantizers import ActivationQuantizer

FORMAT = 1
NUM_IMAGES = 64  # the first ones of a run, which inspection looks at
BINS = 64  # of a histogram
MARGIN = 0.125  # of the range of a quantizer, by which its histogram goes beyond it at either end
CHUNK = 16
VARIANCE_FLOOR = 1e-5  # added to stored variances, so that dead channels do not divide by zero


def codes_of(student: fx.GraphModule, quantizers: Quantizers) -> dict[str, Tensor]:
    """Copies of the codes of all weights, by the quantizer's name.

    Args:
        student: from `attach`.
        quantizers: from `attach`.
    """
    return {name: get_tensor(student, f"{name}.codes").clone() for name in quantizers.weights.values()}


@torch.no_grad()
def inspect(
    graph: fx.GraphModule,
    original: fx.GraphModule,
    student: fx.GraphModule,
    quantizers: Quantizers,
    nearest: Mapping[str, Tensor],
    images: Tensor,
) -> dict[str, Any]:
    """Classes, BatchNorm statistics, histograms and changed roundings of a finished run, as JSON can hold it.

    Args:
        graph: captured teacher with its BatchNorm layers.
        original: the same, folded and rewritten: what the student was attached to.
        student: finished; untouched, as are the others.
        quantizers: of the student.
        nearest: from `codes_of`, before anything was learned.
        images: (N, C, H, W), normalised, that the student was made with; the first `NUM_IMAGES` are used.

    Returns:
        "format"; "num_images"; "classes": see `_classes`, None for no classifier; "batch_norm": see
        `_batch_norm`; "weights" and "activations": by the quantizer's name, see `_weight` and `_activations`.
    """
    images = images[:NUM_IMAGES].to(device_of(student))
    weights = {}
    nodes = {node.name: node for node in original.graph.nodes}
    for layer, name in quantizers.weights.items():
        node = weight_node(nodes[layer])
        assert node is not None
        weights[name] = _weight(
            student.get_submodule(name), get_tensor(original, str(node.target)), nearest[name]
        )
    return {
        "format": FORMAT,
        "num_images": len(images),
        "classes": _classes(graph, student, images),
        "batch_norm": _batch_norm(graph, images),
        "weights": weights,
        "activations": _activations(student, images),
    }


def _classes(teacher: fx.GraphModule, student: fx.GraphModule, images: Tensor) -> dict[str, Any] | None:
    """Of every image the class that each network names and its probability; None without classes."""
    logits: list[list[Tensor]] = [[], []]
    for _, both in in_chunks(
        lambda r: (teacher(images[r]), student(images[r])), len(images), CHUNK, "classes"
    ):
        for kept, found in zip(logits, both, strict=True):
            if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] < 2:
                return None
            kept.append(found)
    named = {}
    for who, kept in zip(("teacher", "student"), logits, strict=True):
        probability, index = torch.cat(kept).float().softmax(1).max(1)
        named[who] = {"class": index.tolist(), "probability": [_short(p) for p in probability.tolist()]}
    return named


def _batch_norm(teacher: fx.GraphModule, images: Tensor) -> list[dict[str, Any]]:
    """How far the statistics of what each BatchNorm receives are from those it stored.

    "mean_gap": root mean square over channels of (mu - mean) / deviation; "deviation_gap": that of
    s / deviation - 1; mu and s are the images' mean and unbiased deviation, the deviation is the stored one.
    Empty for a network without BatchNorm.
    """
    try:
        observer = observe(teacher)
    except UsageError:
        return []
    moments: list[tuple[Tensor, Tensor]] = []
    counts: list[int] = []
    stored = []
    for _, seen in in_chunks(lambda r: observer(images[r]), len(images), CHUNK, "BatchNorm statistics"):
        if not moments:
            stored = [(n.name, n.mean.double(), n.var.double()) for n in seen.norms]
            moments = [(torch.zeros_like(m), torch.zeros_like(m)) for _, m, _ in stored]
            counts = [0] * len(stored)
        for k, norm in enumerate(seen.norms):
            x = norm.features.float().transpose(0, 1).flatten(1)
            var, mean = (t.double() for t in torch.var_mean(x, dim=1, correction=0))
            moments[k][0].add_(mean * x.shape[1])
            moments[k][1].add_((var + mean.square()) * x.shape[1])
            counts[k] += x.shape[1]
    found = []
    for (name, mean, var), (first, second), count in zip(stored, moments, counts, strict=True):
        mu = first / count
        spread = ((second / count - mu.square()).clamp(min=0) * (count / max(count - 1, 1))).sqrt()
        deviation = (var + VARIANCE_FLOOR).sqrt()
        gaps = {"mean_gap": (mu - mean) / deviation, "deviation_gap": spread / deviation - 1}
        rms = {key: _short(float(gap.square().mean().sqrt())) for key, gap in gaps.items()}
        found.append({"name": name, "channels": len(mean), **rms})
    return found


def _weight(quantizer: Any, weight: Tensor, nearest: Tensor) -> dict[str, Any]:
    """Where a layer's float weights lie on the grid of its codes.

    "histogram": counts of w / scale + zero point, in steps, over [-0.5, 2^bits - 0.5]; "below" and "above"
    count what is outside; "codes": how often each code is stored; "changed": share of the codes that are
    others than before learning.
    """
    scale = along_axis(quantizer.scale, quantizer.codes, quantizer.axis)
    zero_point = along_axis(quantizer.zero_point, quantizer.codes, quantizer.axis)
    position = weight.detach() / scale + zero_point
    levels = 2**quantizer.bits
    counts, below, above = _histogram(position, -0.5, levels - 0.5)
    return {
        "bits": quantizer.bits,
        "shape": list(quantizer.codes.shape),
        "histogram": counts.tolist(),
        "below": below,
        "above": above,
        "codes": torch.bincount(quantizer.codes.flatten().long(), minlength=levels).tolist(),
        "changed": _short(float((quantizer.codes != nearest).double().mean())),
    }


def _activations(student: fx.GraphModule, images: Tensor) -> dict[str, dict[str, Any]]:
    """What arrives at each activation quantizer, in activation units.

    "histogram": counts over ["low", "high"], which goes `MARGIN` of the quantizer's range beyond it; "below"
    and "above" count what is outside of that; "clipped": share of the values outside of the range itself;
    "lowest" and "highest" value.
    """
    found: dict[str, dict[str, Any]] = {}
    totals: dict[str, list[Any]] = {}
    ends: dict[str, list[float]] = {}
    for name, module in student.named_modules():
        if isinstance(module, ActivationQuantizer) and bool(module.scale.isfinite()):
            scale, zero_point = float(module.scale), float(module.zero_point)
            low, high = -zero_point * scale, (2**module.bits - 1 - zero_point) * scale
            wide = MARGIN * (high - low)
            found[name] = {
                "bits": module.bits,
                "scale": scale,
                "zero_point": zero_point,
                "low": low - wide,
                "high": high + wide,
            }
            totals[name] = [torch.zeros(BINS, dtype=torch.long, device=images.device), 0, 0, 0, 0]
            ends[name] = [math.inf, -math.inf]

    def count(name: str, x: Tensor) -> None:
        about, total = found[name], totals[name]
        half = about["scale"] / 2
        low = -about["zero_point"] * about["scale"] - half
        high = low + 2 ** about["bits"] * about["scale"]
        counts, below, above = _histogram(x, about["low"], about["high"])
        outside = int(((x < low) | (x > high)).sum())
        lowest, highest = map(float, torch.aminmax(x))
        ends[name] = [min(ends[name][0], lowest), max(ends[name][1], highest)]
        totals[name] = [a + b for a, b in zip(total, (counts, below, above, outside, x.numel()), strict=True)]

    with _arriving(student, found, count):
        for _ in in_chunks(lambda r: student(images[r]), len(images), CHUNK, "activations"):
            pass
    for name, (counts, below, above, outside, values) in totals.items():
        found[name] |= {
            "histogram": counts.tolist(),
            "below": below,
            "above": above,
            "clipped": _short(outside / values) if values else None,
            "lowest": _short(ends[name][0]),
            "highest": _short(ends[name][1]),
        }
    return found


@contextmanager
def _arriving(student: fx.GraphModule, names: Mapping[str, Any], count: Any) -> Iterator[None]:
    """Call count(name, x) for tensors that arrive at the named quantizers; once for one that several read."""
    last: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def arrived(_: Any, args: tuple[Tensor, ...]) -> None:
            if last.get(name) is not args[0]:
                last[name] = args[0]
                count(name, args[0])

        return arrived

    handles = [student.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _histogram(x: Tensor, low: float, high: float) -> tuple[Tensor, int, int]:
    """Counts in `BINS` equal bins over [low, high), and how many values are below and above."""
    x = x.detach().float().flatten()
    bins = ((x - low) * (BINS / (high - low))).floor().clamp(-1, BINS).nan_to_num(BINS).long() + 1
    counts = torch.bincount(bins, minlength=BINS + 2)
    return counts[1:-1], int(counts[0]), int(counts[-1])


def _short(value: float) -> float | None:
    """Six significant digits; None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
