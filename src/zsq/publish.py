"""A run made ready for others: a folder with a model card, on disk or in a Hugging Face repository."""

import copy
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from zsq.architectures import error_summary
from zsq.errors import JobError, UsageError, import_extra
from zsq.export.account import VERIFIED, account_of
from zsq.files import write_atomic
from zsq.run import RECORD, Run, claim_folder, load_run, read_record

EXTRA = "hf"
CARD = "README.md"
EXPORTS = (".onnx", ".xml", ".pt2", ".pte")
UNKNOWN = "unknown: the teacher's licence was not given, and the quantized model stands under it"


@dataclass(frozen=True)
class Exported:
    """A file for an engine that goes with a run: its path, files beside it, and what its check found."""

    path: Path
    beside: tuple[Path, ...]
    about: Mapping[str, Any]


def save_pretrained(
    run: Run | str | Path,
    path: str | Path,
    *,
    licence: str | None = None,
    name: str | None = None,
    with_images: bool = False,
    force: bool = False,
) -> Path:
    """Write a run for others: student, record without paths, model card, and the exports of its folder.

    Synthetic images go along. Images that were given to the run, and what was recorded of them, do not, as
    they may not be public; without them a loaded run computes the same, but cannot be exported again.

    Args:
        run: a Run, or the folder of one; of a folder, verified exports go along.
        path: folder to write.
        licence: of the teacher, e.g. "apache-2.0"; None is said to be unknown.
        name: the model's name on its card; None is that of the teacher.
        with_images: given images go along too.
        force: replace what an earlier call wrote there.

    Raises:
        UsageError: no finished run, a damaged one, or `path` holds something.
        JobError: it cannot be written.
    """
    loaded = run if isinstance(run, Run) else load_run(run)
    exports = () if isinstance(run, Run) else exports_of(Path(run))
    folder = Path(path)
    if not isinstance(run, Run) and folder.resolve() == Path(run).resolve():
        raise UsageError(f"{folder} is the run's own folder. Choose another one to publish from.")
    record = without_paths(loaded.record)
    private = loaded.record.get("given_images_sha256") is not None and not with_images
    public = replace(loaded, record=record)
    if private:
        public = replace(public, images=loaded.images[:0], labels=None, prompts=[], inspection=None)
    title = name or f"{record['model']['name']} at {record['bits']}"
    card = model_card(record, exports, title=title, licence=licence, images_left_out=private)
    if force and (folder / CARD).is_file() and (folder / RECORD).is_file():
        shutil.rmtree(folder)
    claim_folder(folder, force=False)
    for export in exports:
        for file in (export.path, *export.beside):
            write_atomic(folder / file.name, file.read_bytes())
    write_atomic(folder / CARD, card.encode())
    public.write(folder)  # last: without its record the folder is no run
    return folder


def load_pretrained(name: str | Path) -> Run:
    """A run from a folder or, by "user/name", from a Hugging Face repository.

    Raises:
        UsageError: nothing is there, or it is no run; the extra `hf` is missing.
    """
    if Path(name).exists():
        return load_run(name)
    repository = checked_repository(str(name).removeprefix("hf:"))
    hub: Any = import_extra("huggingface_hub", EXTRA)
    try:
        folder = hub.snapshot_download(repository)
    except Exception as error:  # of the network, of permissions, of a repository that is not there
        raise UsageError(
            f"{name} is no folder here, and as a Hugging Face repository it could not be loaded "
            f"({error_summary(error)}). Check the name, the network, and for a private one the login."
        ) from error
    return load_run(folder)


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload what `save_pretrained` wrote.

    Args:
        folder: of the run, with its card.
        repository: "user/name"; it is made if it is not there.
        private: make it visible to its owner only.

    Returns:
        Where it can be seen.

    Raises:
        UsageError: not such a folder, a name of another form, or the extra `hf` is missing.
        JobError: the upload failed.
    """
    source = Path(folder)
    if not (source / CARD).is_file():
        raise UsageError(f"{source} has no model card. Write the folder with save_pretrained first.")
    read_record(source)
    name = checked_repository(repository)
    hub: Any = import_extra("huggingface_hub", EXTRA)
    try:
        client = hub.HfApi()
        client.create_repo(name, private=private, exist_ok=True)
        found = client.upload_folder(repo_id=name, folder_path=str(source))
    except Exception as error:  # of the network, of permissions
        raise JobError(
            f"The upload to {name} failed ({error_summary(error)}). Log in with `hf auth login`, check the "
            f"name, and push again; {source} is complete."
        ) from error
    return str(found)


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


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record in which the folders of the machine it was made on are left out of command and source."""
    found = copy.deepcopy(dict(record))
    source = found.get("model", {}).get("source", {})
    for key in ("name", "weights"):
        if source.get(key) is not None:
            source[key] = _short(source[key]) if key == "weights" or ".py:" in source[key] else source[key]
    measured = found.get("results", {}).get("measured") or {}
    if measured.get("data"):
        measured["data"] = _short(measured["data"])
    if found.get("command"):
        found["command"] = shlex.join(_short(part) for part in shlex.split(found["command"]))
    return found


def _short(text: str) -> str:
    """A path without its folders; anything else as it is."""
    return PurePath(text).name if text.startswith(("/", "~", ".")) else text


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


def checked_repository(name: str) -> str:
    """The name of a Hugging Face repository as it is.

    Raises:
        UsageError: it is not of the form user/name.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"A Hugging Face repository is named like user/name, got {name!r}.")
    return name
