"""Measure a model: top-1 and top-5 on labelled images, agreement with the teacher, error per unit."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx, nn

from zsq.distributed import ALONE, Group
from zsq.graph.blocks import Unit, extract
from zsq.kernels import reproducible
from zsq.out_of_memory import in_chunks
from zsq.recover.losses import energies, signal_to_noise

CHUNK = 64


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on real labelled images, in percent, with the number of images it rests on."""

    top1: float
    top5: float | None  # None with fewer than 6 classes
    num_images: int

    def to_json(self) -> dict[str, float | int | None]:
        """As a dictionary."""
        return asdict(self)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
    group: Group = ALONE,
) -> Accuracy:
    """Top-1 and top-5 accuracy.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        batches: pairs of normalised images and labels (N,), integers below K.
        device: where the model is.
        progress: called with the number of images done so far.
        group: processes that each bring batches of their own; all get the accuracy on all of them.

    Raises:
        ValueError: there are no images, or the output is not (N, K).
    """
    top1 = torch.zeros((), dtype=torch.int64, device=device)
    top5 = torch.zeros_like(top1)
    total, classes = 0, 0
    for images, labels in batches:

        def forward(rows: slice, x: Tensor = images) -> Tensor:
            found: Tensor = model(x[rows].to(device))
            return found

        with reproducible(device):
            pieces = [piece for _, piece in in_chunks(forward, len(images), len(images), "evaluation")]
        logits, labels = torch.cat(pieces), labels.to(device)
        if logits.ndim != 2:
            raise ValueError(f"accuracy needs logits (N, K), the model returns {tuple(logits.shape)}")
        classes = logits.shape[1]
        best = logits.topk(min(5, classes), dim=1).indices
        hits = best == labels[:, None]
        top1 += hits[:, 0].sum()
        top5 += hits.sum()
        total += len(labels)
        if progress is not None:
            progress(total)
    own = [int(top1), int(top5), total, classes]
    counts = [json.loads(found) for found in group.exchange(json.dumps(own).encode())]
    hits1, hits5, total = (sum(count[i] for count in counts) for i in range(3))
    if total == 0:
        raise ValueError("there are no images to evaluate on")
    several = max(count[3] for count in counts) > 5
    return Accuracy(top1=100 * hits1 / total, top5=100 * hits5 / total if several else None, num_images=total)


@torch.no_grad()
def agreement(student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, float | int]:
    """How far two models agree on unlabelled images. This is not an accuracy.

    Returns:
        "top1_agreement": share of images (positions, for a map of classes), in percent, for which both name
        the same class (axis 1), left out if there are no classes; "snr": signal-to-noise of the student's
        outputs, decibels; "num_images".
    """
    same, positions, signal, noise, classes = 0, 0, 0.0, 0.0, 0
    both = in_chunks(lambda r: (student(images[r]), teacher(images[r])), len(images), CHUNK, "evaluation")
    for _, (a, b) in both:
        classes = a.shape[1] if a.ndim > 1 else 1
        if classes > 1:
            same += int((a.argmax(1) == b.argmax(1)).sum())
            positions += a.numel() // classes
        energy = energies(b, a)
        signal, noise = signal + energy[0], noise + energy[1]
    return {
        **({"top1_agreement": 100 * same / positions} if classes > 1 else {}),
        "snr": signal_to_noise(signal, noise),
        "num_images": len(images),
    }


@torch.no_grad()
def unit_signal_to_noise(
    teacher: fx.GraphModule, student: fx.GraphModule, units: Sequence[Unit], images: Tensor
) -> dict[str, float]:
    """Signal-to-noise in decibels at the output of every unit, both networks run from the images on.

    Args:
        teacher: captured network.
        student: made from it by `attach`.
        units: of the teacher.
        images: (N, C, H, W), normalised.
    """
    image_name = next(n.name for n in teacher.graph.nodes if n.op == "placeholder")
    names = list(dict.fromkeys(name for unit in units for name in unit.outputs))
    parts = [extract(model, [image_name], names) for model in (teacher, student)]
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    found = in_chunks(lambda r: [part(images[r]) for part in parts], len(images), CHUNK, "evaluation")
    for _, both in found:
        for name, wanted, got in zip(names, *both, strict=True):
            energy = energies(wanted, got)
            signal[name] += energy[0]
            noise[name] += energy[1]
    return {
        unit.name: signal_to_noise(sum(signal[n] for n in unit.outputs), sum(noise[n] for n in unit.outputs))
        for unit in units
    }
