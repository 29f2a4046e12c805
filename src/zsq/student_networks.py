"""A teacher with the student that it becomes: attached, calibrated, learned."""

from dataclasses import dataclass

from torch import Tensor, fx

from zsq.distributed import ALONE, Group
from zsq.graph.blocks import Unit, split
from zsq.graph.equalize_norms import channel_ranges, equalize_norms
from zsq.images.prior import input_prior
from zsq.models import ModelSpec
from zsq.progress import Callback, unit_log
from zsq.quant.attach import Quantizers, attach
from zsq.quant.image_range import set_image_ranges
from zsq.recipe import Recipe, Reconstruction
from zsq.recover.reconstruct import UnitResult, reconstruct, unit_name
from zsq.recover.storage import MEMORY, Storage
from zsq.state import State
from zsq.without_images import rewritten, settle_by_statistics


@dataclass(frozen=True)
class Networks:
    """A teacher with the student that it becomes.

    Attributes:
        graph: captured teacher with its BatchNorm layers.
        original: the same, folded and rewritten as the recipe says.
        student: attached to `original`; ranges are set only if they come from statistics.
        quantizers: of the student.
        units: of `original`.
    """

    graph: fx.GraphModule
    original: fx.GraphModule
    student: fx.GraphModule
    quantizers: Quantizers
    units: tuple[Unit, ...]


def attached(graph: fx.GraphModule, settings: Recipe, spec: ModelSpec, images: Tensor) -> Networks:
    """Fold and rewrite as the recipe says, split, attach quantizers; no quantizer looks at images.

    Args:
        graph: captured teacher with its BatchNorm layers.
        settings: the recipe.
        spec: of the model; quantizers of images have their range from it.
        images: (N, C, H, W), for rewrites around LayerNorms.

    Raises:
        UsageError: the recipe needs statistics that the model does not have.
    """
    original, known = rewritten(graph, settings)
    if settings.norm_equalization is not None:
        seen = images[: settings.norm_equalization.num_images]
        original = equalize_norms(original, channel_ranges(original, seen))
    student, quantizers = attach(original, settings.scheme)
    settle_by_statistics(original, known, student, quantizers, settings, input_prior(spec))
    set_image_ranges(original, student, quantizers, spec)
    return Networks(graph, original, student, quantizers, split(original.graph))


def learn(
    networks: Networks,
    student: fx.GraphModule,
    images: Tensor,
    settings: Recipe,
    learning: Reconstruction | None,
    seed: int,
    finished: State,
    report: Callback,
    *,
    stage: str = "reconstruct",
    group: Group = ALONE,
    storage: Storage = MEMORY,
) -> list[UnitResult]:
    """Calibrate a student in place and (unless `learning` is None) reconstruct it, unit by unit.

    Args:
        networks: that the student, theirs or a copy of it, belongs to.
        student: changed in place.
        images: (N, C, H, W), normalised, on the device to compute on.
        settings: the recipe, for its calibration.
        learning: how, with the steps and rates of this stage.
        seed: of the minibatches and of what is dropped.
        finished: finished units; new ones are added.
        report: called with progress as `stage`; finished units are reported as resumed.
        stage: see `report`.
        group: processes that share every minibatch.
        storage: where tensors between units are kept.
    """
    names = [unit.name for unit in networks.units]
    resumed = {name for index, name in enumerate(names) if unit_name(index) in finished}
    return reconstruct(
        networks.original,
        student,
        networks.quantizers,
        networks.units,
        images,
        settings=learning,
        calibration=settings.calibration,
        seed=seed,
        finished=finished,
        log=unit_log(report, stage, names, learning.steps if learning else 1, resumed),
        group=group,
        storage=storage,
    )
