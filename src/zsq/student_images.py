"""Images that depend on a student: refined against it, or chosen by the gradients that they give it."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit, split
from zsq.graph.fold import fold_batch_norms
from zsq.graph.tensors import device_of
from zsq.images.filters import cover
from zsq.images.gradients import Probe, gradient_probe
from zsq.images.prior import input_prior
from zsq.images.refine import refine, refined_name
from zsq.images.settings import Refinement, Scope, Synthesis
from zsq.images.synthesize import Batch, batch_from_piece, batch_name, batch_sizes
from zsq.models import ModelSpec
from zsq.progress import Callback, Progress
from zsq.quant.attach import Quantizers, attach
from zsq.quant.image_range import set_image_ranges
from zsq.recipe import Recipe, Reconstruction
from zsq.recover.reconstruct import reconstruct, unit_name
from zsq.rng import derived_seed, rng_for
from zsq.run import Prefixed, State


@dataclass(frozen=True)
class Networks:
    """A teacher with the student that it becomes.

    Attributes:
        graph: captured teacher with its BatchNorm layers.
        original: the same, folded if the recipe folds.
        student: attached to `original`, nothing calibrated yet.
        quantizers: of the student.
        units: of `original`.
    """

    graph: fx.GraphModule
    original: fx.GraphModule
    student: fx.GraphModule
    quantizers: Quantizers
    units: tuple[Unit, ...]


def attached(graph: fx.GraphModule, settings: Recipe, spec: ModelSpec) -> Networks:
    """Fold as the recipe says, split, attach quantizers; those of images have their range already."""
    original = fold_batch_norms(graph)[0] if settings.fold_batch_norm else graph
    student, quantizers = attach(original, settings.scheme)
    set_image_ranges(original, student, quantizers, spec)
    return Networks(graph, original, student, quantizers, split(original.graph))


def refines(settings: Recipe) -> bool:
    """Whether the images are moved after synthesis; at 8 bits a student gives no residual worth following."""
    return settings.refinement is not None and not settings.scheme.is_eight_bit


def refined_images(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    spec: ModelSpec,
    seed: int,
    state: State,
    batches: Mapping[str, Mapping[str, Tensor]],
    report: Callback,
) -> Tensor:
    """Learn a student shortly on the images, then refine their batches against it.

    Args:
        networks: not changed; the short student is a copy.
        images: those of synthesis, on the device to compute on.
        settings: a recipe with synthesis and refinement.
        spec: of the model.
        seed: of the run; the short student and the refinement have streams of their own.
        state: finished pieces of the run; units of the short student and refined batches are added.
        batches: finished batches of synthesis with their sources.
        report: called with progress.

    Returns:
        (N, C, H, W) on the device of `images`.
    """
    source, refinement = settings.synthesis, settings.refinement
    assert isinstance(source, Synthesis) and refinement is not None
    student = _short_student(networks, images, settings, refinement, seed, state, report)
    probe = _probe(networks, student, refinement.gradients)
    device = device_of(networks.graph)
    names = [batch_name(k) for k in range(len(batch_sizes(source.num_images, source.batch_size)))]

    def batch(name: str) -> Batch:
        return batch_from_piece(batches[name], device)

    def event(index: int, steps: int, values: dict[str, float], *, resumed: bool = False) -> None:
        item, total = f"batch {index + 1} of {len(names)}", len(names) * refinement.steps
        report(Progress("refine", item, index * refinement.steps + steps, total, values, resumed))

    def log(name: str, step: int, values: dict[str, float]) -> None:
        event([refined_name(k) for k in range(len(names))].index(name), step + 1, values)

    for index in range(len(names)):
        if refined_name(index) in state:
            event(index, refinement.steps, {}, resumed=True)
    refined = refine(
        networks.graph,
        probe,
        [partial(batch, name) for name in names],
        refinement,
        source,
        seed=seed,
        finished=state,
        log=log,
        prior=input_prior(spec),
    )
    return refined.to(device)


def filtered_images(networks: Networks, images: Tensor, settings: Recipe, seed: int) -> Tensor:
    """The images that the recipe's filter keeps, in their order.

    The student that gives the gradients rounds to nearest and is calibrated on all images.
    """
    chosen = settings.filter
    assert chosen is not None
    if chosen.keep >= len(images):
        return images
    if chosen.method == "random":
        index = torch.randperm(len(images), generator=rng_for(seed, "filter"))[: chosen.keep]
    else:
        student = _learned(networks, images, settings, None, seed, {}, lambda *_: None)
        index = cover(_probe(networks, student, chosen.gradients), images, chosen.keep)
    return images[index.sort().values.to(images.device)]


def check_shaping(settings: Recipe) -> None:
    """Refuse a refinement of images that nothing synthesised.

    Raises:
        UsageError: so.
    """
    if settings.refinement is not None and not isinstance(settings.synthesis, Synthesis):
        raise UsageError(
            f"The recipe {settings.name!r} refines images, which needs the generators that made them, but "
            f"its images are {type(settings.synthesis).__name__}. Give refinement=None, or synthesise."
        )


def _probe(networks: Networks, student: fx.GraphModule, scope: Scope) -> Probe:
    return gradient_probe(networks.original, student, networks.units, scope)


def _short_student(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    refinement: Refinement,
    seed: int,
    state: State,
    report: Callback,
) -> fx.GraphModule:
    learning = settings.reconstruction
    if learning is not None:
        steps, rate = refinement.warmup_steps, refinement.warmup_lr_rounding
        learning = replace(learning, steps=steps, lr_rounding=rate)
    finished = Prefixed(state, "warmup-")
    resumed = {unit.name for i, unit in enumerate(networks.units) if unit_name(i) in finished}
    each = learning.steps if learning else 1
    position = {unit.name: i for i, unit in enumerate(networks.units)}

    def log(unit: str, step: int, _: int, values: dict[str, float]) -> None:
        done = position[unit] * each + (step + 1 if step >= 0 else each)
        report(Progress("warm-up", unit, done, len(position) * each, values, unit in resumed))

    return _learned(networks, images, settings, learning, derived_seed(seed, "warmup"), finished, log)


def _learned(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    learning: Reconstruction | None,
    seed: int,
    finished: State,
    log: Callable[[str, int, int, dict[str, float]], None],
) -> fx.GraphModule:
    """A copy of the student, calibrated and (unless `learning` is None) reconstructed."""
    student = copy.deepcopy(networks.student)
    reconstruct(
        networks.original,
        student,
        networks.quantizers,
        networks.units,
        images,
        settings=learning,
        calibration=settings.calibration,
        seed=seed,
        finished=finished,
        log=log,
    )
    return student
