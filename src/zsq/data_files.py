"""Picture files in a folder or a zip."""

import csv
import io
import logging
import posixpath
import re
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zsq.errors import UsageError, one_line
from zsq.pictures import DAMAGED_ARCHIVE, ENDINGS, Source, picture_reader
from zsq.teacher import ModelSpec

logger = logging.getLogger(__name__)

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
LABELS_FILE = "labels.csv"
MAX_LABELS_BYTES = 64 * 2**20  # of labels.csv in a zip
MAX_PICTURE_BYTES = 512 * 2**20  # of a picture in a zip, unpacked


# Folders


def open_folder(path: Path, spec: ModelSpec, labelled: bool) -> Source:
    if labelled and (path / LABELS_FILE).is_file():
        return _open_listed(path, spec)
    entries = sorted((e for e in path.iterdir() if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry for entry in entries if entry.is_dir()]
    names = tuple(folder.name for folder in folders)
    loose = [entry for entry in entries if entry.suffix.lower() in ENDINGS and entry.is_file()]
    if labelled:
        _check_class_folders(path, names, len(loose))
    found = [(file, label) for label, folder in enumerate(folders) for file in _pictures_below(folder)]
    files = ([] if labelled else loose) + [file for file, _ in found]
    if not labelled and (path / LABELS_FILE).is_file():
        members = [file.relative_to(path).as_posix() for file in files]
        labels, names = _where_known(lambda: _listed(path), members), ()
    elif not labelled and (loose or _are_splits(names) or _are_misnumbered(names)):
        labels, names = None, ()
    else:
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    return Source(
        name=f"The folder {path}",
        count=len(files),
        read=picture_reader(lambda index: files[index], lambda index: str(files[index]), spec),
        labels=labels,
        class_names=names,
    )


def _where_known(rows: Callable[[], Iterable[tuple[str, int]]], files: Sequence[str]) -> Tensor | None:
    """Labels that nobody asked for: None if a file has none, or the table cannot be read."""
    try:
        labels = dict(rows())
    except UsageError:
        return None
    known = all(file in labels for file in files)
    return torch.tensor([labels[file] for file in files], dtype=torch.int64) if known else None


def _listed(path: Path) -> Iterator[tuple[str, int]]:
    """Path below a folder, with slashes, and label for every row of its labels.csv."""
    table = path / LABELS_FILE
    try:
        content = table.read_bytes()
    except OSError as error:
        raise UsageError(f"The file {table} cannot be read ({one_line(error)}).") from error
    members = {file.relative_to(path).as_posix() for file in _pictures_below(path)}
    return _labels(content, str(table), members, ("",), f"below {path}")


def _open_listed(path: Path, spec: ModelSpec) -> Source:
    """The pictures that the labels.csv of a folder names, sorted by their names."""
    rows = sorted(_listed(path))
    return Source(
        name=f"The folder {path}",
        count=len(rows),
        read=picture_reader(
            lambda index: path / rows[index][0], lambda index: str(path / rows[index][0]), spec
        ),
        labels=torch.tensor([label for _, label in rows], dtype=torch.int64),
    )


def _check_class_folders(path: Path, names: tuple[str, ...], num_loose: int) -> None:
    if not names:
        raise UsageError(
            f"The folder {path} has no sub-folders ({num_loose} pictures lie in it directly). Expected one "
            "sub-folder of pictures for every class, sorted by name as the classes 0, 1, 2 ..."
        )
    if _are_splits(names):
        raise UsageError(
            f"The sub-folders of {path} are called {', '.join(names)}: parts of a set, not classes. "
            f"Name one of them, for example {path / names[-1]}."
        )
    if _are_misnumbered(names):
        logger.warning(
            "The sub-folders of %s are numbers, but sorted by name: %s ... are the classes 0, 1, 2 ... "
            "Write 00, 01, 02 ... if the numbers are meant.",
            path,
            ", ".join(names[:3]),
        )


def _are_splits(names: Sequence[str]) -> bool:
    return SPLITS.issuperset(name.lower() for name in names)


def _are_misnumbered(names: Sequence[str]) -> bool:
    """Whether sub-folders, sorted by name, are numbers that come in another order."""
    return all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names)


def _pictures_below(folder: Path) -> list[Path]:
    """All pictures in `folder` and further down, without hidden ones, sorted."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in ENDINGS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


# Zip files


def open_zip(path: Path, spec: ModelSpec, labelled: bool) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"The file {path} cannot be read as a zip ({one_line(error)}): it is damaged, cut short or of "
            "another kind. Fetch or make it again."
        ) from error
    members = {
        info.filename: info
        for info in archive.infolist()
        if not info.is_dir() and not info.filename.startswith("__MACOSX/")
    }
    if labelled:
        rows = sorted(_labels_in_zip(archive, members))
        files = [file for file, _ in rows]
        labels: Tensor | None = torch.tensor([label for _, label in rows], dtype=torch.int64)
    else:
        files = sorted(
            name
            for name in members
            if name.lower().endswith(ENDINGS) and not posixpath.basename(name).startswith(".")
        )
        labels = _where_known(lambda: _labels_in_zip(archive, members), files)
    return Source(
        name=f"The file {path}",
        count=len(files),
        read=picture_reader(
            lambda index: _member(archive, members[files[index]], MAX_PICTURE_BYTES),
            lambda index: f"{files[index]} in {path}",
            spec,
        ),
        labels=labels,
    )


def _labels_in_zip(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> Iterator[tuple[str, int]]:
    """Member and label for every row of the labels.csv that lies least deep."""
    tables = sorted((n for n in members if posixpath.basename(n) == LABELS_FILE), key=lambda n: n.count("/"))
    path = archive.filename
    if not tables:
        raise UsageError(
            f"The file {path} has no {LABELS_FILE}. Expected it beside the pictures, with the columns "
            "file,label."
        )
    if len(tables) > 1 and tables[0].count("/") == tables[1].count("/"):
        raise UsageError(
            f"The file {path} has more than one {LABELS_FILE}: {tables[0]} and {tables[1]}. Expected one."
        )
    content = _member(archive, members[tables[0]], MAX_LABELS_BYTES)
    where = f"{tables[0]} in {path}"
    return _labels(content, where, members, (posixpath.dirname(tables[0]), ""), "in the zip")


def _labels(
    content: bytes, where: str, members: Container[str], bases: Sequence[str], place: str
) -> Iterator[tuple[str, int]]:
    """Member and label for every row of a labels.csv; paths are seen from one of `bases`."""
    seen = set()
    for line, file, label in _rows(content, where):
        relative = file.replace("\\", "/")
        found = (posixpath.normpath(posixpath.join(base, relative)) for base in bases)
        name = next((candidate for candidate in found if candidate in members), None)
        if name is None:
            raise UsageError(
                f"Line {line} of {where} names the file {file!r}, which is not {place}. Expected the "
                f"path of a picture, seen from the folder of {LABELS_FILE}."
            )
        if name in seen:
            raise UsageError(f"Line {line} of {where} names {file!r} again. Expected one label a picture.")
        if not re.fullmatch("[0-9]{1,9}", label):
            raise UsageError(
                f"Line {line} of {where} has the label {label!r}. Expected the number of a class, 0, 1, 2 ..."
            )
        seen.add(name)
        yield name, int(label)


def _rows(content: bytes, where: str) -> Iterator[tuple[int, str, str]]:
    """Line number, file and label of every row of a labels.csv."""
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), skipinitialspace=True)
        columns = [column.strip() for column in reader.fieldnames or ()]
        if not {"file", "label"} <= set(columns):
            raise UsageError(
                f"{where} has the columns {', '.join(columns) or '(none)'}. Expected file "
                "and label, between commas."
            )
        reader.fieldnames = columns
        for row in reader:
            yield reader.line_num, (row["file"] or "").strip(), (row["label"] or "").strip()
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(
            f"{where} cannot be read ({one_line(error)}). Expected a table in UTF-8 with commas."
        ) from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Content of a file in a zip; at most as long as its directory says."""
    where = f"{info.filename} in {archive.filename}"
    if info.file_size > limit:
        raise UsageError(f"{where} is refused: it unpacks to {info.file_size} bytes, more than {limit}.")
    try:
        return archive.read(info)
    except DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"{where} cannot be read ({one_line(error)}): the zip is damaged, encrypted or packed by an "
            "unknown method. Make it again."
        ) from error
