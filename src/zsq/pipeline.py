"""The calls: a recipe with its settings, a low-bit student of a model, the images of a recipe alone."""

import shutil
import tempfile
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.account import Account
from zsq.budget import with_budget
from zsq.distributed import ALONE, Group
from zsq.errors import UsageError
from zsq.given_images import with_given_images
from zsq.kernels import reproducible
from zsq.memory import read_bytes
from zsq.models import Teacher, load_model
from zsq.progress import Callback, silent
from zsq.quant.scheme import parse_bits
from zsq.recipe import GivenImages, Recipe
from zsq.recipe_fields import with_overrides
from zsq.recipe_images import Batches, ImageSet, check_made, made_names, make_images, shape_images
from zsq.recipes import get_recipe
from zsq.resume import finished_run, identity_of, open_state
from zsq.run import FORMAT, RECORD, STATE, Run, write_images
from zsq.stages import captured, check_graph, run_stages
from zsq.student_images import refines
from zsq.student_networks import attached
from zsq.text_images import plan_identity


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
        check_graph(graph, settings, teacher)
    identity = identity_of("quantize", teacher, settings, images, seed, target, labels=image_labels)
    identity |= plan_identity(graph, teacher, settings, seed)
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
        run = run_stages(teacher, graph, settings, given, seed, target, pieces, account, bound, scratch)
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
    check_graph(graph, settings, teacher)
    folder = Path(out) if out is not None else None
    identity = identity_of("synthesize", teacher, settings, None, seed, target)
    identity |= plan_identity(graph, teacher, settings, seed)
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
