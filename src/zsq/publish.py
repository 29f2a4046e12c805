"""A run made ready for others: a folder with a model card, on disk or in a Hugging Face repository."""

import copy
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from zsq.architectures import error_summary
from zsq.errors import JobError, UsageError, import_extra
from zsq.files import write_atomic
from zsq.model_card import exports_of, model_card
from zsq.run import RECORD, Run, claim_folder, load_run, read_record

EXTRA = "hf"
CARD = "README.md"


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


def checked_repository(name: str) -> str:
    """The name of a Hugging Face repository as it is.

    Raises:
        UsageError: it is not of the form user/name.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"A Hugging Face repository is named like user/name, got {name!r}.")
    return name
