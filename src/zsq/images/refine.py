"""Refine synthetic images against a student: gradients that hold in the neighbourhood of every image."""

from collections.abc import Callable, Iterable, MutableMapping

import torch
from torch import Tensor, fx

from zsq.graph.tensors import device_of
from zsq.images.batches import Batch, is_complete, piece_of
from zsq.images.forward import observe
from zsq.images.gradients import Gradients, Probe, joined
from zsq.images.prior import STANDARD, InputPrior
from zsq.images.refine_batch import refine_batch
from zsq.images.settings import Refinement, Synthesis
from zsq.images.synthesis_loss import needs, synthesis_loss
from zsq.images.variety import looks_of
from zsq.images.views import swing
from zsq.rng import rng_for

Finished = MutableMapping[str, dict[str, Tensor]]
Log = Callable[[str, int, dict[str, float]], None]


def refine(
    teacher: fx.GraphModule,
    probe: Probe,
    batches: Iterable[Callable[[], Batch]],
    settings: Refinement,
    synthesis: Synthesis,
    *,
    seed: int,
    finished: Finished,
    log: Log,
    prior: InputPrior | None = None,
    keep_sources: bool = False,
) -> Tensor:
    """Refine batch after batch; each sees the gradients of the images finished before it.

    Args:
        teacher: captured network with its BatchNorm layers; untouched.
        probe: gradients with respect to a frozen student, from `gradient_probe`.
        batches: what synthesis made, in order; a batch is asked for when it is its turn.
        settings: how.
        synthesis: how the batches were made: precision of the generators, weights of the losses. Teacher and
            student run in float32: in bfloat16 the slope of the match points elsewhere (cosine 0.25 with that
            of float32, cifar100_resnet20s, W2A4).
        seed: batch k draws from the stream ("refinement", k) of it.
        finished: images and directions of finished batches by name; those found there are taken over, others
            added.
        log: called as log(batch name, step, values) a few times a batch.
        prior: as synthesis had it.
        keep_sources: keep latents and generators in `finished` too, for another refinement; a finished batch
            without them is made again.

    Returns:
        (num_images, C, H, W), normalised, float32, on the CPU.

    Raises:
        UsageError: the teacher has no BatchNorm, and the loss of synthesis has a weight.
        JobError: the optimisation diverged.
    """
    images: list[Tensor] = []
    bank: Gradients | None = None
    device = device_of(teacher)
    needed = needs(synthesis)
    observer, num_swinging = observe(teacher, fold=True, **(needed | {"logits": True})), 0
    if settings.swing:
        view, num_swinging = swing(teacher)
        observer = observe(view, fold=True, **needed) if num_swinging else observer
    for index, batch in enumerate(batches):
        name = refined_name(index)
        piece = finished.get(name)
        if piece is None or not is_complete(piece, keep_sources):
            made, rng = batch(), rng_for(seed, "refinement", index)
            expected = prior or STANDARD
            objective = synthesis_loss(
                teacher,
                synthesis,
                expected,
                looks=None if synthesis.variety is None else looks_of(made.images, expected),
                labels=made.labels,
                second=made.second,
                rng=rng,
            )
            result, found = refine_batch(
                observer,
                probe,
                made,
                settings,
                objective,
                bank=bank,
                num_swinging=num_swinging,
                rng=rng,
                log=lambda step, values, name=name: log(name, step, values),  # type: ignore[misc]
                where=f"batch {index + 1}",
            )
            piece = finished[name] = piece_of(result, keep_source=keep_sources) | _named(found)
        images.append(piece["images"])
        bank = _remembered(bank, _gradients(piece, device), settings.bank_size)
    return torch.cat(images)


def refined_name(index: int) -> str:
    """Under which a refined batch is kept once it is finished."""
    return f"refined-{index:03d}"


def _remembered(bank: Gradients | None, new: Gradients, size: int) -> Gradients | None:
    """The bank with the directions of another batch, at most `size` of them; None if it is empty."""
    found = new if bank is None else joined([bank, new])
    if size == 0:
        return None
    return tuple(tuple(factor[-size:].clone() for factor in piece) for piece in found)


def _named(gradients: Gradients) -> dict[str, Tensor]:
    return {
        f"direction.{piece}.{factor}": tensor
        for piece, factors in enumerate(gradients)
        for factor, tensor in enumerate(factors)
    }


def _gradients(piece: dict[str, Tensor], device: torch.device) -> Gradients:
    """What `_named` was given."""
    found: list[list[Tensor]] = []
    keys = (tuple(map(int, key.split(".")[1:])) for key in piece if key.startswith("direction."))
    for index, factor in sorted(keys):
        if factor == 0:
            found.append([])
        found[index].append(piece[f"direction.{index}.{factor}"].to(device))
    return tuple(tuple(factors) for factors in found)
