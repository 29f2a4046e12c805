"""The model card of a run that goes to others."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq.errors import UsageError
from zsq.export.account import VERIFIED, account_of
from zsq.run import RECORD

EXPORTS = (".onnx", ".xml", ".pt2", ".pte")
UNKNOWN = "unknown: the teacher's licence was not given, and the quantized model stands under it"


@dataclass(frozen=True)
class Exported:
    """A file for an engine that goes with a run: its path, files beside it, and what its check found."""

    path: Path
    beside: tuple[Path, ...]
    about: Mapping[str, Any]


def exports_of(folder: Path) -> tuple[Exported, ...]:
    """The exports in a run's folder that have the account of their check beside them."""
    found = []
    for path in sorted(folder.iterdir()):
        settings = account_of(path)
        if path.suffix not in EXPORTS or not (settings.is_file() or path.suffix == ".pt2"):
            continue
        about = _account(settings) if settings.is_file() else {}
        weights = path.with_suffix(".bin")
        beside = [settings] if settings.is_file() else []
        beside += [weights] if path.suffix == ".xml" and weights.is_file() else []
        found.append(Exported(path, tuple(beside), about))
    return tuple(found)


def _account(path: Path) -> dict[str, Any]:
    """What an export's check found, as the file beside it says."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not isinstance(about.get(VERIFIED), dict):
            raise ValueError("it is no table of what was checked")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}, the account of an export, cannot be read ({error}). Export the run again with --force, "
            "or remove it with its export."
        ) from error
    return about


def model_card(
    record: Mapping[str, Any],
    exports: Sequence[Exported] = (),
    *,
    title: str,
    licence: str | None = None,
    images_left_out: bool = False,
) -> str:
    """The model card as Markdown with its YAML head: what was measured and what was only estimated, apart.

    Args:
        record: of the run.
        exports: that go along.
        title: heading.
        licence: of the teacher; None is unknown.
        images_left_out: whether images that were given to the run are not there.
    """
    results, recipe = record["results"], record["recipe"]
    size = results["size"]
    head = ["---", "library_name: zsq", "tags:", "- quantization", "- zero-shot-quantization"]
    head += [f"license: {json.dumps(licence)}"] if licence else ["license: unknown"]
    lines = [*head, "---", "", f"# {_plain(title)}", ""]
    source = "synthetic images, without training data"
    if record.get("given_images_sha256") is not None:
        source = "images that were given to it"
    lines += [
        f"{_plain(record['model']['name'])}, quantized to {record['bits']} by zsq's recipe "
        f"`{recipe['name']}` with {source}.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| bits | float32 | {record['bits']} |",
        f"| bytes | {size['teacher_bytes']} | {size['student_bytes']} |",
        "",
        "## Measured on real labelled images",
        "",
        *_measured(results.get("measured") or {}),
        "",
        "## Estimated without data",
        "",
        *_estimated(results["estimated_without_data"]),
        "",
        "## How to use it",
        "",
        "```python",
        "import zsq",
        "",
        'run = zsq.load_pretrained("PATH_OR_REPOSITORY")',
        "logits = run.student(images)  # (N, C, H, W), normalised as run.spec says",
        "```",
        "",
        f"Images are {_input(record['model']['spec'])}.",
        "",
    ]
    for export in exports:
        lines += [f"* `{export.path.name}`: {_verified(export.path.name, export.about)}"]
    lines += [""] if exports else []
    lines += ["## How it was made", ""]
    lines += [f"    {record['command']}", ""] if record.get("command") else []
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    lines += [
        f"Paper: {recipe.get('paper') or 'none'}. Seed {record['seed']}, {versions}. Weights of the teacher: "
        f"sha256 `{record['model']['sha256']}`. All settings are in `{RECORD}`.",
        "",
        *(["Images that were given to the run are not published.", ""] if images_left_out else []),
        f"Licence: {_plain(licence) if licence else UNKNOWN}.",
    ]
    return "\n".join(lines) + "\n"


def _measured(measured: Mapping[str, Any]) -> list[str]:
    rows = [(who, measured[who]) for who in ("teacher", "student") if measured.get(who)]
    if not rows:
        return ["Nothing was measured. `zsq evaluate` does it, given labelled images."]
    lines = ["| | top-1 | images |", "|---|---|---|"]
    return lines + [f"| {who} | {values['top1']:.2f} % | {values['num_images']} |" for who, values in rows]


def _estimated(estimates: Mapping[str, Any]) -> list[str]:
    kinds = {"holdout": "held-out synthetic images", "calibration_images": "the images it was made with"}
    lines = ["Agreement with the teacher; this is not an accuracy.", ""]
    for key, what in kinds.items():
        if key in estimates:
            values = estimates[key]
            same = values.get("top1_agreement")
            text = "" if same is None else f"the same class for {same:.1f} %, "
            text += f"signal to noise of the outputs {values['snr']:.1f} dB"
            lines.append(f"* {what} ({values['num_images']}): {text}")
    return lines


def _verified(file: str, about: Mapping[str, Any]) -> str:
    if not about:
        return "checked against the student as it was written."
    engine = about.get("engine", "its engine")
    images = about[VERIFIED].get("num_images")
    how = f"`{file}.json` says how to run it"
    return f"checked in {engine} against the student on {images} images; {how}."


def _input(spec: Mapping[str, Any]) -> str:
    size = " x ".join(str(number) for number in spec["input_size"])
    mean, std = (", ".join(f"{number:g}" for number in spec[key]) for key in ("mean", "std"))
    return f"{size} (channels, height, width), from pixels in [0, 1] with mean {mean} and deviation {std}"


def _plain(text: str) -> str:
    """A text without what Markdown or HTML would take for markup."""
    return re.sub(r"[<>|`\[\]\n]", " ", text)
