"""From a teacher to a low-bit student: the stages, top to bottom."""

import logging
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from zsq.account import Account
from zsq.budget import with_budget
from zsq.class_images import check_generator
from zsq.distributed import ALONE, Group
from zsq.errors import UsageError
from zsq.estimate import FIT, estimated_drop, predictors
from zsq.evaluate import agreement, unit_signal_to_noise
from zsq.findings import image_findings, network_findings, student_findings, undone
from zsq.given_images import with_given_images
from zsq.graph.blocks import Unit, split
from zsq.graph.capture import capture, moved
from zsq.images.class_losses import number_of_classes
from zsq.images.forward import observe
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import MadeInBatches, needs_statistics
from zsq.images.prior import input_prior
from zsq.images.prompts import TextToImage
from zsq.images.settings import Synthesis
from zsq.images.text_to_image import check_pipeline
from zsq.inspection import codes_of, inspect
from zsq.kernels import reproducible
from zsq.memory import cache_bytes, read_bytes
from zsq.models import Teacher, load_model
from zsq.pictures import mode_of
from zsq.progress import Callback, silent, unit_log
from zsq.quant.engine_biases import round_biases
from zsq.quant.scheme import parse_bits
from zsq.recipe import GaussianNoise, GivenImages, Recipe, StatisticalRanges, with_overrides
from zsq.recipe_images import (
    Batches,
    ImageSet,
    check_made,
    made_names,
    make_holdout,
    make_images,
    shape_images,
)
from zsq.recipes import get_recipe
from zsq.recover.mean_shift import correct_means
from zsq.recover.reconstruct import reconstruct, unit_name
from zsq.recover.storage import MEMORY, Storage
from zsq.resume import finished_run, identity_of, open_state
from zsq.run import (
    FORMAT,
    RECORD,
    STATE,
    Run,
    State,
    write_images,
)
from zsq.student import stored_bytes
from zsq.student_fine_tuning import check_losses, fine_tuned
from zsq.student_images import attached, check_shaping, refines
from zsq.text_images import class_names, plan_identity, prompts_of
from zsq.without_images import check_statistics

logger = logging.getLogger(__name__)


def compose_recipe(
    recipe: str | Recipe,
    *,
    bits: str | None = None,
    ends: str | None = None,
    placement: str | None = None,
    budget: str = "paper",
    overrides: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Recipe:
    """A recipe by name with bits, budget (for models of `input_size`) and single settings replaced in turn.

    Stages that are put in by "on" have the counts of the budget too.

    Raises:
        UsageError: an unknown name, bits, ends, placement, budget or setting.
    """
    found = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if (bits, ends, placement) != (None, None, None):
        scheme = found.scheme
        given = parse_bits(
            scheme.bits if bits is None else bits,
            ends=scheme.ends if ends is None else ends,
            placement=scheme.placement if placement is None else placement,
        )
        found = replace(found, scheme=replace(given, softmax=scheme.softmax))
    overrides = overrides or {}
    stages = {name: value for name, value in overrides.items() if value == "on" and "." not in name}
    found = with_budget(with_overrides(found, stages), budget, input_size=input_size)
    return with_overrides(found, overrides)


def quantize(
    model: Teacher | str | Path,
    *,
    recipe: str | Recipe = "genie",
    bits: str | None = None,
    ends: str | None = None,
    placement: str | None = None,
    budget: str = "standard",
    overrides: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
    image_labels: Tensor | None = None,
    made: Batches | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
    force: bool = False,
    progress: Callback = silent,
    command: str | None = None,
    memory: int | str | None = None,
    group: Group = ALONE,
) -> Run:
    """Quantize a model without its data.

    Args:
        model: a Teacher, or anything that `load_model` takes.
        recipe: a name from `zsq recipes`, or a Recipe.
        bits: "W4A4", "W4A8", "W2A4", "W8A8", "W4" ...; None keeps the recipe's.
        ends: "8bit" or "same", see `Scheme`; None keeps the recipe's.
        placement: "research" or "engine", see `Scheme`; None keeps the recipe's.
        budget: "quick", "standard" or "paper".
        overrides: single settings by dotted name, {"synthesis.steps": 500}.
        images: (N, C, H, W), normalised, float; for recipes that use given images, and in place of the
            synthesis of others.
        image_labels: (N,) integers, the class of each given image, where that is known: filters keep the same
            share of every class then, and losses of labels take these in place of the teacher's classes.
        made: batches that `synthesize_images` put there for the same model, synthesis and seed, so that a
            sweep over bits makes them once; the result is that of a call without it.
        seed: all randomness follows from it.
        device: where to compute.
        out: run folder to write; an interrupted run of the same call in it is continued, and a finished one
            of the same `command` is returned.
        force: replace a finished run in `out`.
        progress: called with every step that is worth showing.
        command: what to note as the command in run.json.
        memory: bytes, or a text such as "4GiB", that the tensors kept between units may take in each process;
            if they would take more, they are in files in `out` (else in the folder for temporary files). The
            result is the same, bit for bit. None: no bound.
        group: processes that all make this call, see `zsq.distributed`; process 0 writes `out`. The images
            are the same bits whatever their number, the rest agrees within the order of floating-point sums.

    Raises:
        UsageError: the call is wrong (nothing was written).
        JobError: the job failed; what was finished in `out` is kept.
    """
    teacher = load_model(model)
    size = teacher.spec.input_size
    settings = compose_recipe(
        recipe,
        bits=bits,
        ends=ends,
        placement=placement,
        budget=budget,
        overrides=overrides,
        input_size=size,
    )
    if images is not None:
        settings = with_given_images(settings, teacher, images, image_labels)
        images = images.detach().float().cpu()
        image_labels = None if image_labels is None else image_labels.detach().long().cpu()
    elif image_labels is not None:
        raise UsageError("image_labels are the classes of given images, and there are none. Give images too.")
    elif isinstance(settings.synthesis, GivenImages):
        raise UsageError(
            f"The recipe {settings.name!r} needs images: give --images PATH (a folder, an npz or a zip), or "
            "take a recipe that makes its own, such as genie."
        )
    target = _device(device)
    bound = None if memory is None else read_bytes(memory)
    account = Account(progress, group)
    with account.timed("capture"):
        graph = captured(teacher, target)
        _check_graph(graph, settings, teacher)
    identity = identity_of("quantize", teacher, settings, images, seed, target, labels=image_labels)
    identity |= _plan_identity(graph, teacher, settings, seed)
    folder = Path(out) if out is not None else None
    finished = finished_run(folder, identity, force=force, command=command) if group.size == 1 else None
    if finished is not None:
        return finished
    with (
        reproducible(target),
        open_state(folder, identity, force=force, command=command, group=group) as state,
    ):
        check_made(made or {}, settings, teacher.spec)
        pieces = ChainMap(state, made or {})
        scratch = folder / STATE if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())
        given = None if images is None else ImageSet(images, image_labels)
        run = _run_stages(teacher, graph, settings, given, seed, target, pieces, account, bound, scratch)
        run.record = {
            "format": FORMAT,
            "status": "done",
            "command": command,
            "budget": budget,
            "overrides": dict(overrides or {}),
            "processes": group.size,
            **identity,
            "timings": account.timings,
            "results": run.record,
        }
        run.metrics = account.metrics
        if folder is not None:

            def write() -> None:
                run.write(folder)
                shutil.rmtree(folder / STATE, ignore_errors=True)

            group.first(write)
    return run


def synthesize_images(
    model: Teacher | str | Path,
    *,
    recipe: str | Recipe = "genie",
    bits: str | None = None,
    ends: str | None = None,
    budget: str = "standard",
    overrides: Mapping[str, Any] | None = None,
    made: Batches | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
    force: bool = False,
    progress: Callback = silent,
    group: Group = ALONE,
) -> Tensor:
    """Only the images of a recipe: (N, C, H, W), normalised as the model's input; arguments as in `quantize`.

    Bits matter only to recipes that refine or choose images with the help of a student. `made`, where given,
    is filled with the batches of synthesis, before any refinement: "images", "latents" and the generator's
    parameters by the batch's name.

    Raises:
        UsageError: as for `quantize`, or a recipe that makes no images.
    """
    teacher = load_model(model)
    size = teacher.spec.input_size
    settings = compose_recipe(
        recipe, bits=bits, ends=ends, budget=budget, overrides=overrides, input_size=size
    )
    if isinstance(settings.synthesis, GivenImages):
        raise UsageError(f"The recipe {settings.name!r} makes no images.")
    target = _device(device)
    graph = captured(teacher, target)
    _check_graph(graph, settings, teacher)
    folder = Path(out) if out is not None else None
    identity = identity_of("synthesize", teacher, settings, None, seed, target)
    identity |= _plan_identity(graph, teacher, settings, seed)
    with reproducible(target), open_state(folder, identity, force=force, command=None, group=group) as state:
        account, keep = Account(progress, group), made is not None
        found = make_images(graph, teacher, settings, None, seed, target, state, account, keep_sources=keep)
        if made is not None:
            made.update({name: state[name] for name in made_names(settings)})
        if refines(settings) or settings.filter is not None or settings.low_pass is not None:
            networks = attached(graph, settings, teacher.spec, found.images)
            found = shape_images(networks, found, settings, teacher.spec, seed, state, account)
        if folder is not None:

            def write() -> None:
                write_images(folder, found.images, teacher.spec, found.labels, found.prompts)
                shutil.rmtree(folder / STATE, ignore_errors=True)
                (folder / RECORD).unlink(missing_ok=True)

            group.first(write)
    return found.images.cpu()


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"The device {device!r} is unknown. Expected cpu, cuda or cuda:N.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("The device cuda was asked for, but PyTorch finds no CUDA device. Use --device cpu.")
    return found


def captured(teacher: Teacher, device: torch.device) -> fx.GraphModule:
    """The teacher's graph on a device."""
    return moved(capture(teacher.module, teacher.spec.input_size), device)


def _check_graph(graph: fx.GraphModule, settings: Recipe, teacher: Teacher) -> None:
    """Refuse a model that the recipe cannot work on, before anything is written."""
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


def _plan_identity(graph: fx.GraphModule, teacher: Teacher, settings: Recipe, seed: int) -> dict[str, str]:
    """What the images depend on besides the settings: the prompts, which hold the content of a file."""
    source = settings.synthesis
    if not isinstance(source, TextToImage):
        return {}
    return {"prompts_sha256": plan_identity(prompts_of(graph, teacher, source, seed))}


def _run_stages(
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
    account.add(network_findings(graph))
    with account.timed("synthesize"):
        made = make_images(graph, teacher, settings, given, seed, device, state, account)
    with account.timed("quantize"):
        networks = attached(graph, settings, teacher.spec, made.images)
        original, student, units = networks.original, networks.student, networks.units
        quantizers = networks.quantizers
        nearest = codes_of(student, quantizers)
    made = shape_images(networks, made, settings, teacher.spec, seed, state, account)
    images = made.images
    with account.timed("reconstruct"):
        noise = isinstance(settings.synthesis, GaussianNoise)
        own = given is not None and given.labels is not None
        # Of images from latents a class is one aim of several; unless a loss takes it, nothing hangs on it.
        aim = isinstance(settings.synthesis, Synthesis) and settings.fine_tuning is None
        asked = None if aim else made.labels
        account.add(image_findings(graph, images, asked, noise=noise, labelled=own))
        learning = None if settings.scheme.is_eight_bit else settings.reconstruction
        storage = _storage(original, units, len(images), bound, scratch)
        names = [unit.name for unit in units]
        resumed = {name for index, name in enumerate(names) if unit_name(index) in state}
        results = reconstruct(
            original,
            student,
            quantizers,
            units,
            images,
            settings=learning,
            calibration=settings.calibration,
            seed=seed,
            finished=state,
            log=unit_log(account, "reconstruct", names, learning.steps if learning else 1, resumed),
            group=account.group,
            storage=storage,
        )
        instead = settings.reconstruction if learning is None else None
        if instead is not None and instead.at_8_bits == "correct_biases":
            correct_means(original, student, units, images, finished=state, storage=storage)
    tuned, images, labels = fine_tuned(
        networks, images, made.labels, settings, teacher.spec, seed, state, account
    )
    if tuned is not None and tuned.lr_factor < 1:
        account.add([undone(tuned.lr_factor)])
    if settings.scheme.placement == "engine":
        round_biases(student)
    with account.timed("holdout"):
        unseen = isinstance(settings.calibration, StatisticalRanges) and learning is None
        holdout = images if unseen else make_holdout(graph, teacher, settings, seed, state, account)
        if holdout is not None:
            holdout = holdout.to(device)
        source = settings.synthesis
        alike = isinstance(source, Synthesis) and source.classes is None and source.variety is None
        estimates = _estimates(original, student, units, None if unseen else images, holdout, alike)
    with account.timed("inspect"):
        inspection = inspect(graph, original, student, quantizers, nearest, images)
        account.add(student_findings(original, student, quantizers, inspection["activations"]))
    student = moved(student, "cpu")
    sizes = stored_bytes(student)
    record = {
        "measured": {},
        "estimated_without_data": estimates,
        "findings": [asdict(finding) for finding in account.findings],
        "units": [asdict(result) for result in results],
        **({"fine_tuning": asdict(tuned)} if tuned is not None else {}),
        "bits": {
            "weights": {n: int(student.get_submodule(q).bits) for n, q in quantizers.weights.items()},  # type: ignore[arg-type]
            "activations": {n: int(student.get_submodule(q).bits) for n, q in quantizers.activations.items()},  # type: ignore[arg-type]
        },
        "size": {
            "teacher_bytes": sum(t.numel() * t.element_size() for t in teacher.module.state_dict().values()),
            "student_bytes": sum(sizes.values()),
            "student_parts": sizes,
        },
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
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    units: Any,
    images: Tensor | None,
    holdout: Tensor | None,
    alike: bool,
) -> dict[str, Any]:
    """What can be said without data: agreement on synthetic images. Never called accuracy.

    `images` are those that the student was made with, None if it was made without any. `alike` says that the
    held-out ones are made as those were from which `FIT` predicts the drop of top-1.
    """
    result: dict[str, Any] = {"note": "on synthetic images; this is agreement with the teacher, not accuracy"}
    if holdout is not None:
        result["holdout"] = agreement(student, teacher, holdout)
        result["unit_snr"] = unit_signal_to_noise(teacher, student, units, holdout)
        found = predictors(teacher, student, holdout, result["unit_snr"]) if alike else None
        if found is not None:
            result["drop"] = estimated_drop(found, FIT)
    if images is not None:
        result["calibration_images"] = agreement(student, teacher, images)
    return result
