"""From a teacher to a low-bit student: the stages, top to bottom."""

import copy
import hashlib
import json
import logging
import platform
import shutil
import tempfile
import time
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from zsq._version import __version__
from zsq.budget import with_budget
from zsq.distributed import ALONE, Group
from zsq.errors import UsageError
from zsq.evaluate import agreement, unit_signal_to_noise
from zsq.graph.blocks import Unit, split
from zsq.graph.capture import capture
from zsq.images.forward import observe
from zsq.images.prior import input_prior
from zsq.images.settings import Synthesis
from zsq.images.synthesize import batch_name, batch_sizes, is_complete, synthesize
from zsq.memory import cache_bytes, read_bytes
from zsq.models import ModelSpec, Teacher, load_model
from zsq.progress import Callback, Progress, silent
from zsq.quant.scheme import parse_bits
from zsq.recipe import GaussianNoise, GivenImages, Recipe, describe, with_overrides
from zsq.recipes import get_recipe
from zsq.recover.reconstruct import reconstruct, unit_name
from zsq.recover.storage import MEMORY, Storage
from zsq.rng import derived_seed, rng_for
from zsq.run import (
    FORMAT,
    RECORD,
    STATE,
    Run,
    State,
    StateFolder,
    claim_folder,
    is_run_folder,
    read_record,
    temporary_files,
    write_images,
    write_record,
)
from zsq.student import stored_bytes
from zsq.student_images import Networks, attached, check_shaping, filtered_images, refined_images, refines

logger = logging.getLogger(__name__)
Batches = MutableMapping[str, dict[str, Tensor]]


@dataclass
class _Account:
    """What a run keeps track of on the way: its processes, time by stage and logged steps."""

    progress: Callback
    group: Group = ALONE
    timings: dict[str, float] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - started, 3)

    def __call__(self, event: Progress) -> None:
        if event.values:
            self.metrics.append(
                {"stage": event.stage, "item": event.item, "done": event.done, **event.values}
            )
        self.progress(event)


def compose_recipe(
    recipe: str | Recipe,
    *,
    bits: str | None = None,
    ends: str | None = None,
    budget: str = "paper",
    overrides: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Recipe:
    """A recipe by name with bits, budget (for models of `input_size`) and single settings replaced in turn.

    Raises:
        UsageError: an unknown name, bits, budget or setting.
    """
    found = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if bits is not None or ends is not None:
        scheme = found.scheme
        scheme = parse_bits(scheme.bits if bits is None else bits, ends=scheme.ends if ends is None else ends)
        found = replace(found, scheme=scheme)
    return with_overrides(with_budget(found, budget, input_size=input_size), overrides or {})


def quantize(
    model: Teacher | str | Path,
    *,
    recipe: str | Recipe = "genie",
    bits: str | None = None,
    ends: str | None = None,
    budget: str = "standard",
    overrides: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
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
        budget: "quick", "standard" or "paper".
        overrides: single settings by dotted name, {"synthesis.steps": 500}.
        images: (N, C, H, W), normalised, float; for recipes that use given images, and in place of the
            synthesis of others.
        made: batches that `synthesize_images` put there for the same model, synthesis and seed, so that a
            sweep over bits makes them once; the result is that of a call without it.
        seed: all randomness follows from it.
        device: where to compute.
        out: run folder to write; an interrupted run of the same call in it is continued.
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
        recipe, bits=bits, ends=ends, budget=budget, overrides=overrides, input_size=size
    )
    if images is not None:
        settings = _with_given_images(settings, teacher, images)
        images = images.detach().float().cpu()
    elif isinstance(settings.synthesis, GivenImages):
        raise UsageError(
            f"The recipe {settings.name!r} needs images: give --images PATH (a folder, an npz or a zip), or "
            "take a recipe that makes its own, such as genie."
        )
    target = _device(device)
    bound = None if memory is None else read_bytes(memory)
    account = _Account(progress, group)
    with account.timed("capture"):
        graph = captured(teacher, target)
        _check_graph(graph, settings)
    identity = _identity("quantize", teacher, settings, images, seed, target)
    folder = Path(out) if out is not None else None
    state: State = {}
    if folder is not None:
        state = _open_state(folder, identity, force=force, command=command, group=group)
    _check_made(made or {}, settings, teacher.spec)
    pieces = ChainMap(state, made or {})
    scratch = folder / STATE if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())
    run = _run_stages(teacher, graph, settings, images, seed, target, pieces, account, bound, scratch)
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
    _check_graph(graph, settings)
    state: State = {}
    folder = Path(out) if out is not None else None
    if folder is not None:
        identity = _identity("synthesize", teacher, settings, None, seed, target)
        state = _open_state(folder, identity, force=force, command=None, group=group)
    account, keep = _Account(progress, group), made is not None
    images = _make_images(graph, teacher, settings, None, seed, target, state, account, keep_sources=keep)
    if made is not None:
        made.update({name: state[name] for name in _batch_names(settings)})
    if refines(settings) or settings.filter is not None:
        networks = attached(graph, settings)
        images = _shape_images(networks, images, settings, teacher.spec, seed, state, account)
    if folder is not None:

        def write() -> None:
            write_images(folder, images, teacher.spec)
            shutil.rmtree(folder / STATE, ignore_errors=True)
            (folder / RECORD).unlink(missing_ok=True)

        group.first(write)
    return images.cpu()


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
    module = teacher.module if device.type == "cpu" else copy.deepcopy(teacher.module).to(device)
    return capture(module, teacher.spec.input_size)


def _check_graph(graph: fx.GraphModule, settings: Recipe) -> None:
    """Refuse a model that the recipe cannot work on, before anything is written."""
    try:
        split(graph.graph)
    except ValueError as error:
        raise UsageError(f"There is nothing to quantize in this model: {error}.") from error
    check_shaping(settings)
    if isinstance(settings.synthesis, Synthesis):
        observe(graph)


def _run_stages(
    teacher: Teacher,
    graph: fx.GraphModule,
    settings: Recipe,
    given: Tensor | None,
    seed: int,
    device: torch.device,
    state: State,
    account: _Account,
    bound: int | None,
    scratch: Path,
) -> Run:
    with account.timed("synthesize"):
        images = _make_images(graph, teacher, settings, given, seed, device, state, account)
    with account.timed("quantize"):
        networks = attached(graph, settings)
        original, student, units = networks.original, networks.student, networks.units
        quantizers = networks.quantizers
    images = _shape_images(networks, images, settings, teacher.spec, seed, state, account)
    with account.timed("reconstruct"):
        learning = None if settings.scheme.is_eight_bit else settings.reconstruction
        steps = learning.steps if learning else 1
        position = {unit.name: i for i, unit in enumerate(units)}

        taken_over = set(state)

        def log(unit: str, step: int, _: int, values: dict[str, float]) -> None:
            index = position[unit]
            done = index * steps + (step + 1 if step >= 0 else steps)
            resumed = unit_name(index) in taken_over
            account(Progress("reconstruct", unit, done, len(units) * steps, values, resumed))

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
            log=log,
            group=account.group,
            storage=_storage(original, units, len(images), bound, scratch),
        )
    with account.timed("holdout"):
        holdout = _make_holdout(graph, teacher, settings, seed, state, account)
        if holdout is not None:
            holdout = holdout.to(device)
        estimates = _estimates(original, student, units, images, holdout)
    student = student.cpu()
    sizes = stored_bytes(student)
    record = {
        "measured": {},
        "estimated_without_data": estimates,
        "units": [asdict(result) for result in results],
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
    return Run(student=student, record=record, images=images.cpu(), spec=teacher.spec)


def _storage(
    graph: fx.GraphModule, units: Sequence[Unit], num_images: int, bound: int | None, scratch: Path
) -> Storage:
    """Where tensors between units are kept: in files if they would take more than `bound` bytes."""
    needed = cache_bytes(graph.graph, units, num_images)
    if bound is None or needed <= bound:
        return MEMORY
    logger.info("%.1f GiB of tensors between units are kept in files in %s.", needed / 2**30, scratch)
    return Storage(scratch)


def _make_images(
    graph: fx.GraphModule,
    teacher: Teacher,
    settings: Recipe,
    given: Tensor | None,
    seed: int,
    device: torch.device,
    state: State,
    account: _Account,
    *,
    keep_sources: bool = False,
) -> Tensor:
    source = settings.synthesis
    if isinstance(source, GivenImages):
        assert given is not None
        count = min(source.num_images, len(given)) if source.num_images else len(given)
        chosen = torch.randperm(len(given), generator=rng_for(seed, "given"))[:count]
        return given[chosen].to(device)
    if isinstance(source, GaussianNoise):
        shape = (source.num_images, *teacher.spec.input_size)
        noise = torch.randn(shape, generator=rng_for(seed, "noise"))
        return input_prior(teacher.spec).apply(noise).to(device)
    keep = keep_sources or refines(settings)
    return _synthesize(graph, source, teacher.spec, seed, state, account, keep_sources=keep).to(device)


def _shape_images(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: _Account,
) -> Tensor:
    """What depends on a student: refinement, then the filter; the images as they are without either."""
    if refines(settings):
        with account.timed("refine"):
            images = refined_images(networks, images, settings, spec, seed, state, state, account)
    if settings.filter is not None:
        with account.timed("filter"):
            images = filtered_images(networks, images, settings, seed)
    return images


def _batch_names(settings: Recipe) -> list[str]:
    """Names of the batches of synthesis."""
    source = settings.synthesis
    if not isinstance(source, Synthesis):
        return []
    return [batch_name(k) for k in range(len(batch_sizes(source.num_images, source.batch_size)))]


def _check_made(made: Batches, settings: Recipe, spec: ModelSpec) -> None:
    """Refuse batches that are not those of this recipe's synthesis."""
    source = settings.synthesis
    if not made or not isinstance(source, Synthesis):
        return
    sizes = batch_sizes(source.num_images, source.batch_size)
    expected = {name: (n, *spec.input_size) for name, n in zip(_batch_names(settings), sizes, strict=True)}
    got = {name: tuple(piece["images"].shape) for name, piece in made.items()}
    if got != expected:
        raise UsageError(f"The images made before have the shapes {got}, expected {expected}.")


def _synthesize(
    graph: fx.GraphModule,
    settings: Synthesis,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: _Account,
    *,
    stage: str = "synthesize",
    keep_sources: bool = False,
) -> Tensor:
    sizes = batch_sizes(settings.num_images, settings.batch_size)
    names = [batch_name(index) for index in range(len(sizes))]
    size = account.group.size
    missing = [i for i, name in enumerate(names) if not is_complete(state.get(name), keep_sources)]
    if stage == "synthesize" and len(missing) % size:
        idle = size - len(missing) % size
        logger.info(
            "%d batches of images for %d processes: in the last turn %d of them %s nothing to make. Smaller "
            "batches (--set synthesis.batch_size=...) are more, but then the images are others.",
            len(missing),
            size,
            idle,
            "has" if idle == 1 else "have",
        )

    def report(index: int, steps: int, values: dict[str, float], *, resumed: bool = False) -> None:
        item, total = f"batch {index + 1} of {len(sizes)}", len(sizes) * settings.steps
        account(Progress(stage, item, index * settings.steps + steps, total, values, resumed))

    def log(batch: str, step: int, _: int, values: dict[str, float]) -> None:
        index = names.index(batch)
        if size > 1:  # the other processes are about as far with theirs
            before = missing.index(index) // size * size
            together = min(size, len(missing) - before)
            done = (len(names) - len(missing) + before) * settings.steps + (step + 1) * together
            item = f"batch {index + 1} of {len(sizes)}, {together} at once"
            account(Progress(stage, item, done, len(sizes) * settings.steps, values))
        else:
            report(index, step + 1, values)

    for index, name in enumerate(names):
        if is_complete(state.get(name), keep_sources):
            report(index, settings.steps, {}, resumed=True)
    return synthesize(
        graph,
        settings,
        spec.input_size,
        seed=seed,
        finished=state,
        log=log,
        prior=input_prior(spec),
        group=account.group,
        keep_sources=keep_sources,
    )


def _make_holdout(
    graph: fx.GraphModule, teacher: Teacher, settings: Recipe, seed: int, state: State, account: _Account
) -> Tensor | None:
    """Images of a batch of their own, which nothing is calibrated on; None if the recipe makes no images."""
    source = settings.synthesis
    if not isinstance(source, Synthesis) or settings.num_holdout < 2:
        return None
    if "holdout" not in state:
        alone = replace(source, num_images=settings.num_holdout)
        own_seed = derived_seed(seed, "holdout")
        state["holdout"] = {
            "images": _synthesize(graph, alone, teacher.spec, own_seed, {}, account, stage="holdout")
        }
    return state["holdout"]["images"]


def _estimates(
    teacher: fx.GraphModule, student: fx.GraphModule, units: Any, images: Tensor, holdout: Tensor | None
) -> dict[str, Any]:
    """What can be said without data: agreement on synthetic images. Never called accuracy."""
    result: dict[str, Any] = {"note": "on synthetic images; this is agreement with the teacher, not accuracy"}
    if holdout is not None:
        result["holdout"] = agreement(student, teacher, holdout)
        result["unit_snr"] = unit_signal_to_noise(teacher, student, units, holdout)
    result["calibration_images"] = agreement(student, teacher, images)
    return result


def _with_given_images(settings: Recipe, teacher: Teacher, images: Tensor) -> Recipe:
    if images.ndim != 4 or tuple(images.shape[1:]) != teacher.spec.input_size or len(images) == 0:
        raise UsageError(
            f"The given images have shape {tuple(images.shape)}; the model takes (N, "
            f"{', '.join(map(str, teacher.spec.input_size))})."
        )
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise UsageError(
            f"The given images (of type {str(images.dtype).removeprefix('torch.')}) are integers or hold NaN "
            "or infinity. Expected finite floating-point numbers, normalised as the model's input: "
            "(pixel - mean) / std for pixels in [0, 1]."
        )
    if isinstance(settings.synthesis, GivenImages):
        return settings
    return replace(settings, synthesis=GivenImages(num_images=0), refinement=None)


def _identity(
    job: str, teacher: Teacher, settings: Recipe, images: Tensor | None, seed: int, device: torch.device
) -> dict[str, Any]:
    """Everything that the resulting bits depend on; only a run of the same identity continues a folder."""
    given = None
    if images is not None:
        given = hashlib.sha256(np.ascontiguousarray(images.numpy()).tobytes()).hexdigest()
    identity = {
        "job": job,
        "bits": settings.scheme.bits,
        "seed": seed,
        "device": device.type,
        "model": {
            "name": teacher.name,
            "source": asdict(teacher.source),
            "sha256": teacher.sha256,
            "spec": asdict(teacher.spec),
            "parameters": sum(p.numel() for p in teacher.module.parameters()),
        },
        "given_images_sha256": given,
        "recipe": describe(settings),
        "versions": {
            "zsq": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    result: dict[str, Any] = json.loads(json.dumps(identity))
    return result


def _open_state(
    folder: Path, identity: dict[str, Any], *, force: bool, command: str | None, group: Group
) -> State:
    """The state of the run in `folder`: that of an interrupted run of the same identity, or a fresh one.

    Process 0 keeps it on disk; the others have a copy.
    """
    state = group.first(lambda: _state_on_disk(folder, identity, force=force, command=command))
    return group.pieces_of_first({} if state is None else state)


def _state_on_disk(folder: Path, identity: dict[str, Any], *, force: bool, command: str | None) -> State:
    record: dict[str, Any] = {}
    if is_run_folder(folder):
        try:
            record = read_record(folder)
        except UsageError:
            if not force:
                raise
    if record.get("status") == "running":
        different = [key for key in identity if record.get(key) != identity[key]]
        if not different:  # also with `force`: the command that is continued may have had it
            for path in temporary_files(folder):
                path.unlink(missing_ok=True)
            return StateFolder(folder / STATE)
        if not force:
            own = f" ({record['command']})" if record.get("command") else ""
            raise UsageError(
                f"{folder} holds an unfinished run that differs in: {', '.join(different)}. Nothing was "
                f"changed. Continue it with its own call{own}, choose another --out, or replace it with "
                "--force."
            )
    claim_folder(folder, force=force)
    write_record(folder, {"format": FORMAT, "status": "running", "command": command, **identity})
    return StateFolder(folder / STATE)
