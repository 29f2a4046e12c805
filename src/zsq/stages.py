"""From a teacher to a low-bit student: the stages, top to bottom."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from zsq.account import Account
from zsq.class_images import check_generator
from zsq.errors import UsageError
from zsq.estimate import FIT, estimated_drop, predictors
from zsq.evaluate import agreement, unit_signal_to_noise
from zsq.findings import image_findings, network_findings, student_findings, undone
from zsq.graph.blocks import Unit, split
from zsq.graph.capture import capture, moved
from zsq.health import Finding
from zsq.images.class_losses import number_of_classes
from zsq.images.forward import observe
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import MadeInBatches, needs_statistics
from zsq.images.prior import input_prior
from zsq.images.prompts import TextToImage
from zsq.images.settings import Synthesis
from zsq.images.text_to_image import check_pipeline
from zsq.inspection import codes_of, inspect
from zsq.memory import cache_bytes
from zsq.models import Teacher
from zsq.pictures import mode_of
from zsq.quant.attach import Quantizers
from zsq.quant.engine_biases import round_biases
from zsq.recipe import GaussianNoise, Recipe, Reconstruction, StatisticalRanges
from zsq.recipe_images import ImageSet, make_holdout, make_images, shape_images
from zsq.recover.mean_shift import correct_means
from zsq.recover.reconstruct import UnitResult
from zsq.recover.storage import MEMORY, Storage
from zsq.run import Run
from zsq.state import State
from zsq.student import stored_bytes
from zsq.student_fine_tuning import check_losses, fine_tuned
from zsq.student_images import check_shaping
from zsq.student_networks import Networks, attached, learn
from zsq.text_images import class_names
from zsq.without_images import check_statistics

logger = logging.getLogger(__name__)


def captured(teacher: Teacher, device: torch.device) -> fx.GraphModule:
    """The teacher's graph on a device."""
    return moved(capture(teacher.module, teacher.spec.input_size), device)


def check_graph(graph: fx.GraphModule, settings: Recipe, teacher: Teacher) -> None:
    """Refuse a model that the recipe cannot work on, before anything is written.

    Raises:
        UsageError: so.
    """
    try:
        split(graph.graph)
    except ValueError as error:
        raise UsageError(f"There is nothing to quantize in this model: {error}.") from error
    check_shaping(graph, settings)
    check_losses(graph, settings)
    if needs_statistics(settings.synthesis):
        observe(graph)
    if isinstance(settings.synthesis, GeneratorSynthesis):
        check_generator(graph)
    if isinstance(settings.synthesis, MadeInBatches) and settings.synthesis.classes is not None:
        number_of_classes(graph)
    if isinstance(settings.synthesis, TextToImage):
        mode_of(teacher.spec)
        class_names(teacher, settings.synthesis)
        check_pipeline(settings.synthesis)
    check_statistics(graph, settings, input_prior(teacher.spec))


def run_stages(
    teacher: Teacher,
    graph: fx.GraphModule,
    settings: Recipe,
    given: ImageSet | None,
    seed: int,
    device: torch.device,
    state: State,
    account: Account,
    bound: int | None,
    scratch: Path,
) -> Run:
    """Make images, attach quantizers, recover accuracy, inspect.

    Args:
        teacher: the model.
        graph: captured of it, on `device`, and checked.
        settings: the recipe.
        given: what the user brought, in place of synthesis.
        seed: of the run.
        device: where to compute.
        state: finished pieces of an interrupted run are taken over, new ones added.
        account: told of progress, time and findings; its processes share the work.
        bound: bytes that tensors between units may take in memory; None for no bound.
        scratch: folder for them if they would take more.

    Returns:
        The run; its record is what the stages found.

    Raises:
        UsageError: images that the recipe cannot work with.
        JobError: something diverged or found no room.
    """
    account.add(network_findings(graph))
    with account.timed("synthesize"):
        made = make_images(graph, teacher, settings, given, seed, device, state, account)
    with account.timed("quantize"):
        networks = attached(graph, settings, teacher.spec, made.images)
        nearest = codes_of(networks.student, networks.quantizers)
    made = shape_images(networks, made, settings, teacher.spec, seed, state, account)
    learning = None if settings.scheme.is_eight_bit else settings.reconstruction
    with account.timed("reconstruct"):
        own = given is not None and given.labels is not None
        account.add(_image_findings(graph, made, settings, labelled=own))
        storage = _storage(networks.original, networks.units, len(made.images), bound, scratch)
        results = _reconstructed(networks, made.images, settings, learning, seed, state, account, storage)
    tuned, images, labels = fine_tuned(
        networks, made.images, made.labels, settings, teacher.spec, seed, state, account
    )
    if tuned is not None and tuned.lr_factor < 1:
        account.add([undone(tuned.lr_factor)])
    student, quantizers = networks.student, networks.quantizers
    if settings.scheme.placement == "engine":
        round_biases(student)
    with account.timed("holdout"):
        unseen = isinstance(settings.calibration, StatisticalRanges) and learning is None
        holdout = images if unseen else make_holdout(graph, teacher, settings, seed, state, account)
        if holdout is not None:
            holdout = holdout.to(device)
        source = settings.synthesis
        alike = isinstance(source, Synthesis) and source.classes is None and source.variety is None
        estimates = _estimates(networks, None if unseen else images, holdout, alike)
    with account.timed("inspect"):
        inspection = inspect(graph, networks.original, student, quantizers, nearest, images)
        account.add(student_findings(networks.original, student, quantizers, inspection["activations"]))
    student = moved(student, "cpu")
    record = {
        "measured": {},
        "estimated_without_data": estimates,
        "findings": [asdict(finding) for finding in account.findings],
        "units": [asdict(result) for result in results],
        **({"fine_tuning": asdict(tuned)} if tuned is not None else {}),
        "bits": _bits(student, quantizers),
        "size": _sizes(teacher, student),
    }
    return Run(
        student,
        record,
        images.cpu(),
        teacher.spec,
        labels=labels,
        prompts=list(made.prompts),
        inspection=inspection,
    )


def _image_findings(
    graph: fx.GraphModule, made: ImageSet, settings: Recipe, *, labelled: bool
) -> list[Finding]:
    noise = isinstance(settings.synthesis, GaussianNoise)
    # Of images from latents a class is one aim of several; unless a loss takes it, nothing hangs on it.
    aim = isinstance(settings.synthesis, Synthesis) and settings.fine_tuning is None
    return image_findings(graph, made.images, None if aim else made.labels, noise=noise, labelled=labelled)


def _reconstructed(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    learning: Reconstruction | None,
    seed: int,
    state: State,
    account: Account,
    storage: Storage,
) -> list[UnitResult]:
    """Calibrate the student on images and, if there is something to learn, reconstruct it unit by unit."""
    student = networks.student
    results = learn(
        networks,
        student,
        images,
        settings,
        learning,
        seed,
        state,
        account,
        group=account.group,
        storage=storage,
    )
    instead = settings.reconstruction if learning is None else None
    if instead is not None and instead.at_8_bits == "correct_biases":
        correct_means(networks.original, student, networks.units, images, finished=state, storage=storage)
    return results


def _storage(
    graph: fx.GraphModule, units: Sequence[Unit], num_images: int, bound: int | None, scratch: Path
) -> Storage:
    """Where tensors between units are kept: in files if they would take more than `bound` bytes."""
    needed = cache_bytes(graph.graph, units, num_images)
    if bound is None or needed <= bound:
        return MEMORY
    logger.info("%.1f GiB of tensors between units are kept in files in %s.", needed / 2**30, scratch)
    return Storage(scratch)


def _estimates(
    networks: Networks, images: Tensor | None, holdout: Tensor | None, alike: bool
) -> dict[str, Any]:
    """What can be said without data: agreement on synthetic images. Never called accuracy.

    `images` are those that the student was made with, None if it was made without any. `alike` says that the
    held-out ones are made as those were from which `FIT` predicts the drop of top-1.
    """
    teacher, student = networks.original, networks.student
    result: dict[str, Any] = {"note": "on synthetic images; this is agreement with the teacher, not accuracy"}
    if holdout is not None:
        result["holdout"] = agreement(student, teacher, holdout)
        result["unit_snr"] = unit_signal_to_noise(teacher, student, networks.units, holdout)
        found = predictors(teacher, student, holdout, result["unit_snr"]) if alike else None
        if found is not None:
            result["drop"] = estimated_drop(found, FIT)
    if images is not None:
        result["calibration_images"] = agreement(student, teacher, images)
    return result


def _bits(student: fx.GraphModule, quantizers: Quantizers) -> dict[str, dict[str, int]]:
    """Bits of weights and of activations, by the name of what is quantized."""

    def of(attached: Mapping[str, str]) -> dict[str, int]:
        return {name: int(student.get_submodule(path).bits) for name, path in attached.items()}  # type: ignore[arg-type]

    return {"weights": of(quantizers.weights), "activations": of(quantizers.activations)}


def _sizes(teacher: Teacher, student: fx.GraphModule) -> dict[str, Any]:
    """Bytes of the teacher, of the student, and of the student's parts."""
    parts = stored_bytes(student)
    return {
        "teacher_bytes": sum(t.numel() * t.element_size() for t in teacher.module.state_dict().values()),
        "student_bytes": sum(parts.values()),
        "student_parts": parts,
    }
