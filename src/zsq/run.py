"""The run folder: what a run leaves behind, written and read."""

import io
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, fx

from zsq.errors import JobError, UsageError
from zsq.files import write_atomic
from zsq.images.contact_sheet import contact_sheet
from zsq.models import ModelSpec
from zsq.paths import check_output
from zsq.run_record import check_record
from zsq.student import student_from_file, student_to_bytes

FORMAT = 1
RECORD, STUDENT, IMAGES, SHEET, PROMPTS, METRICS, INSPECTION, STATE = (
    "run.json",
    "student.safetensors",
    "images.safetensors",
    "images.png",
    "prompts.jsonl",
    "metrics.jsonl",
    "inspection.json",
    "state",
)

REPORT, LATENCIES = "report.html", "latency.jsonl"  # what other commands add to a finished run
# All files of a run. The record is last: a folder without it is no run, with it one that can be replaced.
FILES = (STUDENT, IMAGES, SHEET, PROMPTS, METRICS, INSPECTION, REPORT, LATENCIES, RECORD)


@dataclass
class Run:
    """A quantized model and the account of how it came about.

    Attributes:
        student: the quantized network, images (N, C, H, W) normalised -> logits; a plain module.
        record: what run.json holds.
        images: the synthetic images as the optimiser saw them, (N, C, H, W), normalised.
        metrics: logged steps.
        spec: how images must be prepared.
        labels: the classes that the images were asked for, (N,), int64; None if for none.
        prompts: of each image, in order, if they came from text; see `zsq.images.prompts.Prompt`.
        inspection: what `zsq.inspection.inspect` found for the report; None in runs made before it was.
    """

    student: fx.GraphModule
    record: dict[str, Any]
    images: Tensor
    spec: ModelSpec
    metrics: list[dict[str, Any]] = field(default_factory=list)
    labels: Tensor | None = None
    prompts: list[dict[str, Any]] = field(default_factory=list)
    inspection: dict[str, Any] | None = None

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the run folder.

        Raises:
            UsageError: `path` holds something already and `force` is False.
            JobError: it cannot be written.
        """
        folder = Path(path)
        claim_folder(folder, force=force)
        self.write(folder)
        return folder

    def write(self, folder: Path) -> None:
        """Write all files; the record comes last, so that a folder with a finished record is complete."""
        write_atomic(folder / STUDENT, student_to_bytes(self.student))
        write_images(folder, self.images, self.spec, self.labels, self.prompts)
        write_atomic(folder / METRICS, _json_lines(self.metrics))
        if self.inspection is not None:
            text = json.dumps(self.inspection, separators=(",", ":"), allow_nan=False)
            write_atomic(folder / INSPECTION, text.encode())
        write_record(folder, self.record)


def write_images(
    folder: Path,
    images: Tensor,
    spec: ModelSpec,
    labels: Tensor | None = None,
    prompts: Sequence[dict[str, Any]] = (),
) -> None:
    """Write images.safetensors (with `labels` if there are any), the contact sheet and any prompts."""
    tensors = {"images": images, **({} if labels is None else {"labels": labels})}
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomic(folder / IMAGES, save_safetensors(plain, {"spec": json.dumps(asdict(spec))}))
    if len(images):
        picture = io.BytesIO()
        contact_sheet(images, spec).save(picture, format="PNG")
        write_atomic(folder / SHEET, picture.getvalue())
    if prompts:
        write_atomic(folder / PROMPTS, _json_lines(prompts))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    write_atomic(folder / RECORD, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def read_record(folder: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        UsageError: it is missing, damaged or of another version.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is not a run folder: it has no {RECORD}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}). The run has to be made again.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UsageError(f"{path} has format {found!r}; this version of zsq reads format {FORMAT}.")
    check_record(record, str(path))
    return record


def load_run(path: str | Path) -> Run:
    """Read a finished run folder back; the student gives the same logits, bit for bit.

    Raises:
        UsageError: not a run folder, not finished, damaged.
    """
    folder = Path(path)
    record = read_record(folder)
    if record.get("status") != "done":
        command = f" ({record['command']})" if record.get("command") else ""
        raise UsageError(
            f"The run in {folder} is not finished. The call that began it{command} continues it."
        )
    try:
        spec = spec_from_json(record["model"]["spec"])
        tensors = load_safetensors((folder / IMAGES).read_bytes())
        images, labels = tensors["images"], tensors.get("labels")
        metrics = _read_json_lines(folder / METRICS)
        prompts = _read_json_lines(folder / PROMPTS) if (folder / PROMPTS).exists() else []
        found = folder / INSPECTION
        inspection = json.loads(found.read_text(encoding="utf-8")) if found.exists() else None
        _check_images(images, labels, spec)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise UsageError(f"The run folder {folder} is incomplete or damaged: {error}.") from error
    student = student_from_file(folder / STUDENT, spec.input_size)
    return Run(student, record, images, spec, metrics, labels, prompts, inspection)


def _check_images(images: Tensor, labels: Tensor | None, spec: ModelSpec) -> None:
    if tuple(images.shape[1:]) != spec.input_size or not images.is_floating_point():
        raise ValueError(f"its images are {images.dtype} of shape {tuple(images.shape)}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64):
        raise ValueError(f"its labels are {labels.dtype} of shape {tuple(labels.shape)}")


def is_run_folder(path: str | Path) -> bool:
    """Whether a folder holds a run.json."""
    return os.path.isfile(Path(path) / RECORD)


def claim_folder(folder: Path, *, force: bool) -> None:
    """Make an output folder, refusing to touch what is there; with `force` an earlier run in it is removed.

    What a killed write left behind (temporary files) does not count as being there.

    Raises:
        UsageError: the folder holds something, or is a file, or (with `force`) something that is not ours.
        JobError: it cannot be made or emptied.
    """
    check_output(folder, "output folder")
    if folder.is_file():
        raise UsageError(f"The output folder {folder} is a file. Choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leftovers = temporary_files(folder)
        found = {path.name for path in folder.iterdir() if path not in leftovers}
        if found and not force:
            raise UsageError(
                f"{folder} exists and is not empty; nothing in it was changed. Choose another --out, or give "
                "--force to replace the run in it."
            )
        if found and RECORD not in found and not found <= {IMAGES, SHEET, PROMPTS}:
            raise UsageError(
                f"{folder} is not a run folder, so --force does not replace it. Choose another --out."
            )
        if STATE in found:
            shutil.rmtree(folder / STATE)
        for path in (*leftovers, *(folder / name for name in FILES)):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise JobError(
            f"The output folder {folder} cannot be used: {error.strerror or error}. Choose another --out."
        ) from error


def temporary_files(folder: Path) -> list[Path]:
    """The temporary files that killed writes left in a run folder."""
    return [path for name in FILES for path in folder.glob(f".{name}.????????")]


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _json_lines(records: Sequence[dict[str, Any]]) -> bytes:
    """One line a record; what JSON has no number for (NaN, infinity) becomes null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    lines = [{key: plain(value) for key, value in line.items()} for line in records]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def spec_from_json(values: dict[str, Any]) -> ModelSpec:
    """How images must be prepared, as a record or an exported file says it.

    Raises:
        KeyError, TypeError, ValueError: something is missing or wrong.
    """
    channels, height, width = values["input_size"]
    return ModelSpec(
        input_size=(channels, height, width),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        crop_fraction=values["crop_fraction"],
        interpolation=values["interpolation"],
    )
