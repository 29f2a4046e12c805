"""One row of a benchmark: the images, the quantized network and its accuracy."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from zsq._version import __version__
from zsq.bench_file import existing_path
from zsq.bench_plan import Job, Plan, digest
from zsq.data import load_labelled_images
from zsq.diagnostics import diagnose
from zsq.errors import UsageError
from zsq.evaluate import CHUNK, accuracy
from zsq.files import write_atomic
from zsq.graph.capture import moved
from zsq.images.batches import batch_names, batch_sizes
from zsq.images.pixel_settings import MadeInBatches
from zsq.pipeline import quantize, synthesize_images
from zsq.progress import Callback, Progress
from zsq.recipe import GivenImages, Recipe
from zsq.recipe_fields import describe
from zsq.recipe_images import Batches
from zsq.run import load_run, read_record

WORK, IMAGES = "work", "images"  # folders of a benchmark: unfinished pieces, and finished images
SOURCES = ".sources"  # beside a file of images: latents and generators, where a recipe refines the images
Say = Callable[[str], None]


def fill_row(
    job: Job,
    plan: Plan,
    device: str,
    folder: Path,
    float_accuracy: Mapping[str, Any],
    title: str,
    say: Say,
) -> dict[str, Any]:
    label, bits, seed = job.cell
    images, labels, made, seconds = None, None, None, None
    if isinstance(job.settings.synthesis, MadeInBatches):
        made, seconds = _synthetic_images(job, job.settings.synthesis, plan, device, folder, title, say)
    elif isinstance(job.settings.synthesis, GivenImages):
        images, labels = _given_images(plan)
    work = work_folder(folder, job, plan)
    status = _status(work)
    if status == "done":
        run = load_run(work)
    else:
        run = quantize(
            plan.teacher,
            recipe=job.settings,
            budget="paper",
            images=images,
            image_labels=labels,
            made=made,
            seed=seed,
            device=device,
            out=work,
            progress=_rarely(say, title),
        )
    timings: dict[str, float | None] = dict(run.record["timings"])
    if status == "running":  # the time before the interruption is not known
        timings = dict.fromkeys(timings)
    if isinstance(job.settings.synthesis, MadeInBatches):
        timings["synthesize"] = seconds
    started = time.perf_counter()
    measured = measure(run.student, plan, device)
    timings["evaluate"] = round(time.perf_counter() - started, 3)
    diagnostics = {}
    if plan.diagnostics:
        others = plan.dataset.sample(plan.diagnostics)
        diagnostics = {"diagnostics": diagnose(run, plan.teacher, others, device=device).to_json()}
    estimates = run.record["results"]["estimated_without_data"]
    kind = "holdout" if "holdout" in estimates else "calibration_images"
    return {
        "network": plan.network.name,
        "recipe": label,
        "bits": bits,
        "seed": seed,
        **measured,
        "float": dict(float_accuracy),
        "agreement": {"on": kind, **estimates[kind]},
        **diagnostics,
        "seconds": timings,
        "settings_sha256": digest(job.definition["settings"]),
        "model_sha256": plan.teacher.sha256,
        "data_sha256": job.definition["data"],
        "key": job.key,
        "versions": _versions(),
        "machine": _machine(device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def is_complete(row: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a finished row has all that the benchmark asks for now."""
    if plan.diagnostics == 0:
        return True
    wanted = min(plan.diagnostics, len(plan.dataset))
    return "diagnostics" in row and bool(row["diagnostics"]["others"]["num_images"] == wanted)


def measure(model: nn.Module, plan: Plan, device: str) -> dict[str, Any]:
    """Accuracy on the network's labelled images: "top1", "top5" and "num_images"."""
    return accuracy(moved(model, device), plan.dataset.batches(CHUNK), device=device).to_json()


def _given_images(plan: Plan) -> tuple[Tensor, Tensor | None]:
    """All images of the network's `images`, with labels if known; the recipe says how many are drawn."""
    if plan.given is None:
        path = existing_path(plan.network.images, f"images of {plan.network.name}")
        assert path is not None
        plan.given = load_labelled_images(path, plan.teacher.spec, plan.teacher.output_shape[0])
    return plan.given


def image_files(job: Job, plan: Plan, device: str, folder: Path) -> tuple[Path, Path] | None:
    """Where the row's synthetic images are kept, and what is known of them; None if it needs none.

    The name is a hash of all that the images depend on.
    """
    if not isinstance(job.settings.synthesis, MadeInBatches):
        return None
    described = job.definition["settings"]["synthesis"]
    depends = [job.definition["model"], plan.teacher.spec.input_size, described, job.cell[2]]
    key = digest([*depends, torch.device(device).type])
    return folder / IMAGES / f"{key}.safetensors", folder / IMAGES / f"{key}.json"


def make_images(job: Job, plan: Plan, device: str, folder: Path, title: str, say: Say) -> None:
    """Make the row's synthetic images, unless they are there."""
    if isinstance(job.settings.synthesis, MadeInBatches):
        _synthetic_images(job, job.settings.synthesis, plan, device, folder, title, say)


def _synthetic_images(
    job: Job, settings: MadeInBatches, plan: Plan, device: str, folder: Path, title: str, say: Say
) -> tuple[Batches, float | None]:
    """Images of a network, settings and a seed, made once, then read; and the seconds they took.

    They are those before any refinement, so recipes with and without one share them, for all bits.
    """
    teacher, seed = plan.teacher, job.cell[2]
    files = image_files(job, plan, device, folder)
    assert files is not None
    file, about = files
    sources = file.with_name(f"{file.stem}{SOURCES}.safetensors")
    needed = job.settings.refinement is not None
    try:
        found = load_safetensors(file.read_bytes())
        kept = load_safetensors(sources.read_bytes()) if needed else {}
        return _as_batches(found, kept, settings), json.loads(about.read_text())["seconds"]
    except (OSError, ValueError, KeyError, SafetensorError):
        pass
    work = folder / WORK / f"images-{digest([file.stem, teacher.name, _versions()])}"
    resumed = _status(work) == "running"
    started = time.perf_counter()
    made: Batches = {}
    images = synthesize_images(
        teacher,
        recipe=Recipe(name="images", paper="", synthesis=settings),
        budget="paper",
        made=made,
        seed=seed,
        device=device,
        out=work,
        progress=_rarely(say, title),
    )
    seconds = None if resumed else round(time.perf_counter() - started, 3)
    write_atomic(about, json.dumps({"seconds": seconds, "seed": seed, **asdict(settings)}).encode())
    if any(other.settings.refinement is not None for other in plan.jobs):
        kept = {f"{name}/{key}": t for name, piece in made.items() for key, t in piece.items()}
        write_atomic(sources, save_safetensors({k: t for k, t in kept.items() if not k.endswith("/images")}))
    labels = [piece["labels"] for piece in made.values() if "labels" in piece]
    tensors = {"images": images.contiguous(), **({"labels": torch.cat(labels)} if labels else {})}
    write_atomic(file, save_safetensors(tensors))
    shutil.rmtree(work, ignore_errors=True)
    return made, seconds


def _as_batches(
    found: Mapping[str, Tensor], sources: Mapping[str, Tensor], settings: MadeInBatches
) -> Batches:
    """Images, labels and sources from the files of `_synthetic_images` as the batches that synthesis made."""
    sizes = batch_sizes(settings.num_images, settings.batch_size)
    batches: Batches = {name: {} for name in batch_names(settings)}
    for kind, tensor in found.items():
        for batch, part in zip(batches.values(), tensor.split(sizes), strict=True):
            batch[kind] = part
    for key, tensor in sources.items():
        name, _, leaf = key.partition("/")
        batches[name][leaf] = tensor
    return batches


def work_folder(folder: Path, job: Job, plan: Plan) -> Path:
    """Where a running row keeps its pieces; other versions, which cannot continue it, have another."""
    return folder / WORK / digest([job.definition, describe(job.settings), plan.network.name, _versions()])


def _status(work: Path) -> str | None:
    """ "running", "done", or None, for which whatever is left in the folder is removed."""
    try:
        return str(read_record(work)["status"])
    except (UsageError, KeyError):
        shutil.rmtree(work, ignore_errors=True)
        return None


def _rarely(say: Say, title: str) -> Callback:
    """A line of progress at most twice a minute."""
    last = time.monotonic()

    def progress(event: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= 30:
            last = time.monotonic()
            say(f"{title}: {event.stage} {event.item}, {event.done} of {event.total}")

    return progress


def _versions() -> dict[str, str]:
    return {
        "zsq": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _machine(device: str) -> str:
    """Model of the processor and number of cores, and of the accelerator if it is used; no names of hosts."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    text = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}; {text}" if device.startswith("cuda") else text
