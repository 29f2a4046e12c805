"""Labelled real images for evaluation: a folder by class, an npz, a zip with labels.csv, or a Hugging Face dataset."""

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zsq.errors import UsageError, import_extra
from zsq.teacher import ModelSpec

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_TABLE_BYTES = 64 * 2**20  # of labels.csv
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Dataset:
    """Images that are read when they are needed.

    Attributes:
        name: where they come from, for messages.
        spec: how they are prepared.
        labels: int64 (N,), or None if there are none.
        read: index -> picture.
        classes: names of the classes, if known.
    """

    name: str
    spec: ModelSpec
    labels: Tensor | None
    read: Callable[[int], Image.Image]
    count: int
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.count

    def images(self, indices: Sequence[int]) -> Tensor:
        """Images float32 (N, C, H, W), normalised.

        Raises:
            UsageError: one of them is not a picture.
        """
        return torch.stack([prepare(self._picture(i), self.spec) for i in indices])

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of normalised images (N, C, H, W) and labels (N,), in order; the last batch may be smaller."""
        if self.labels is None:
            raise UsageError(f"{self.name} has no labels, which are needed to measure accuracy.")
        total = len(self) if limit is None else min(limit, len(self))
        for start in range(0, total, batch_size):
            indices = range(start, min(start + batch_size, total))
            yield self.images(indices), self.labels[indices.start : indices.stop]

    def _picture(self, index: int) -> Image.Image:
        try:
            return self.read(index)
        except Image.DecompressionBombError as error:
            raise UsageError(f"Picture {index} of {self.name} is refused: {error}") from error
        except (UnidentifiedImageError, zipfile.BadZipFile, OSError, SyntaxError, EOFError) as error:
            raise UsageError(f"Picture {index} of {self.name} cannot be read as a picture: {error}") from error


def prepare(picture: Image.Image, spec: ModelSpec) -> Tensor:
    """A picture as the model expects it: (C, H, W), float32, normalised.

    Converted to RGB (C = 3) or grey (C = 1). A picture of exactly (H, W) is used as it is; any other is resized so
    that its shorter side is round(side / crop_fraction), unless it is that already, and its centre is cut out.

    Raises:
        UsageError: the model takes neither 1 nor 3 channels.
    """
    channels, height, width = spec.input_size
    if channels not in (1, 3):
        raise UsageError(f"Pictures have 1 or 3 channels, the model takes {channels}.")
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (width, height):
        picture = _resize_and_crop(picture, height, width, spec)
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return _normalise(pixels.reshape(height, width, channels).permute(2, 0, 1), spec)


def _resize_and_crop(picture: Image.Image, height: int, width: int, spec: ModelSpec) -> Image.Image:
    wanted_height, wanted_width = (max(n, round(n / spec.crop_fraction)) for n in (height, width))
    scale = max(wanted_height / picture.height, wanted_width / picture.width)
    if scale != 1:
        size = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(size, RESAMPLING[spec.interpolation])
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _normalise(pixels: Tensor, spec: ModelSpec) -> Tensor:
    """uint8 (..., C, H, W) -> float32, ((x / 255) - mean) / std."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return (pixels.float() / 255 - mean) / std


def open_dataset(source: str | Path, spec: ModelSpec, *, labels_needed: bool = True) -> Dataset:
    """Open images by path or name; `hf:NAME[@SPLIT]` names a Hugging Face dataset.

    Raises:
        UsageError: nothing there, an unknown kind, or content that is not as expected.
    """
    text, path = str(source), Path(source).expanduser()
    if text.startswith("hf:"):
        return _hugging_face(text.removeprefix("hf:"), spec)
    if path.is_dir():
        dataset = _folder(path, spec)
    elif path.suffix == ".npz" and path.is_file():
        dataset = _npz(path, spec)
    elif path.suffix == ".zip" and path.is_file():
        dataset = _zip(path, spec)
    elif path.exists():
        raise UsageError(
            f"{path} is not a kind of image set that zsq reads. Expected a folder with a sub-folder a class, an .npz with "
            "images and labels, or a .zip of pictures with labels.csv."
        )
    elif path.suffix in (".npz", ".zip") or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise UsageError(f"The image set {path} does not exist.")
    else:
        dataset = _hugging_face(text, spec)
    if len(dataset) == 0:
        raise UsageError(f"{source} holds no pictures.")
    if labels_needed and dataset.labels is None:
        raise UsageError(
            f"{source} has no labels. Expected a sub-folder a class, an array `labels` in the npz, or labels.csv in the zip."
        )
    return dataset


def load_images(source: str | Path, spec: ModelSpec, num_images: int | None = None) -> Tensor:
    """Images only, (N, C, H, W), normalised; labels may be absent. The first `num_images`, or all.

    Raises:
        UsageError: as for `open_dataset`.
    """
    dataset = open_dataset(source, spec, labels_needed=False)
    count = len(dataset) if num_images is None else min(num_images, len(dataset))
    return dataset.images(range(count))


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Refuse labels that the model has no output for.

    Raises:
        UsageError: a label is negative or not below `num_classes`.
    """
    if dataset.labels is None or len(dataset.labels) == 0:
        return
    lowest, highest = int(dataset.labels.min()), int(dataset.labels.max())
    if lowest < 0 or highest >= num_classes:
        raise UsageError(
            f"{dataset.name} has labels {lowest} to {highest}, but the model has {num_classes} outputs (0 to "
            f"{num_classes - 1}). Evaluate on the classes that the model was trained for, in its order."
        )


def _folder(path: Path, spec: ModelSpec) -> Dataset:
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if classes:
        pairs = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in PICTURES
        ]
    else:
        pairs = [(file, -1) for file in sorted(path.iterdir()) if file.suffix.lower() in PICTURES]
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64) if classes else None
    files = [file for file, _ in pairs]
    return Dataset(str(path), spec, labels, lambda i: Image.open(files[i]), len(files), tuple(classes) or None)


def _npz(path: Path, spec: ModelSpec) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive.files}
            found = ", ".join(archive.files) or "none"
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path} cannot be read as an npz of plain arrays: {error}") from error
    if "images" not in arrays:
        raise UsageError(f"{path} has no array `images`; its arrays are: {found}.")
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise UsageError(
            f"`images` in {path} is {images.dtype} of shape {images.shape}. Expected uint8 (N, H, W, 3), (N, H, W, 1) or "
            "(N, H, W)."
        )
    images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    if labels is not None and (not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),)):
        raise UsageError(
            f"`labels` in {path} is {labels.dtype} of shape {labels.shape}. Expected integers of shape ({len(images)},)."
        )
    found_labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return Dataset(str(path), spec, found_labels, lambda i: Image.fromarray(images[i]), len(images))


def _zip(path: Path, spec: ModelSpec) -> Dataset:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as a zip: {error}") from error
    members = {info.filename: info for info in archive.infolist()}
    table = next((n for n in sorted(members) if n == "labels.csv" or n.endswith("/labels.csv")), None)

    def read_member(name: str) -> Image.Image:
        return Image.open(io.BytesIO(archive.read(name)))

    if table is None:
        names = [n for n in sorted(members) if Path(n).suffix.lower() in PICTURES]
        return Dataset(str(path), spec, None, lambda i: read_member(names[i]), len(names))
    rows = _label_rows(path, archive, members[table])
    base = table.removesuffix("labels.csv")
    files, labels = [], []
    for number, (file, label) in enumerate(rows, start=2):
        name = file if file in members else base + file
        if name not in members:
            raise UsageError(f"labels.csv in {path}, line {number}, names {file!r}, which is not in the zip.")
        try:
            labels.append(int(label))
        except ValueError as error:
            raise UsageError(
                f"labels.csv in {path}, line {number}, has the label {label!r}. Expected a whole number."
            ) from error
        files.append(name)
    return Dataset(
        str(path), spec, torch.tensor(labels, dtype=torch.int64), lambda i: read_member(files[i]), len(files)
    )


def _label_rows(path: Path, archive: zipfile.ZipFile, table: zipfile.ZipInfo) -> list[tuple[str, str]]:
    if table.file_size > MAX_TABLE_BYTES:
        raise UsageError(f"labels.csv in {path} has {table.file_size} bytes, more than {MAX_TABLE_BYTES}.")
    try:
        text = archive.read(table).decode("utf-8-sig")
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError, RuntimeError) as error:
        raise UsageError(f"labels.csv in {path} cannot be read: {error}") from error
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    if "file" not in columns or "label" not in columns:
        raise UsageError(
            f"labels.csv in {path} has the columns {', '.join(columns) or 'none'}. Expected `file` and `label`."
        )
    return [(row["file"] or "", row["label"] or "") for row in reader]


def _hugging_face(text: str, spec: ModelSpec) -> Dataset:
    name, _, split = text.partition("@")
    datasets = import_extra("datasets", "hf")
    try:
        loaded: Any = datasets.load_dataset(name)
    except Exception as error:  # the library raises its own, requests' and OSErrors alike
        raise UsageError(
            f"The image set {name!r} is no path that exists, and Hugging Face gives no dataset of this name: {error}"
        ) from error
    splits = list(loaded)
    chosen = split or next((s for s in ("test", "validation", "val") if s in splits), "")
    if chosen not in splits:
        raise UsageError(
            f"The dataset {name!r} has the splits {', '.join(splits)}. Name one, for example hf:{name}@{splits[0]}."
        )
    rows = loaded[chosen]
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    image = _column(kinds, "Image", ("image", "img", "picture"), name)
    label = _column(kinds, "ClassLabel", ("label", "labels", "fine_label", "class"), name)
    return Dataset(
        f"{name}@{chosen}",
        spec,
        torch.tensor([int(v) for v in rows[label]], dtype=torch.int64),
        lambda i: rows[int(i)][image],
        len(rows),
    )


def _column(kinds: dict[str, str], kind: str, names: tuple[str, ...], dataset: str) -> str:
    typed = [column for column, found in kinds.items() if found == kind]
    named = [column for column in names if column in kinds]
    found = [c for c in named if c in typed] or typed or named
    if not found:
        raise UsageError(
            f"The dataset {dataset!r} has no {'image' if kind == 'Image' else 'label'} column; its columns are: "
            f"{', '.join(kinds)}."
        )
    return found[0]
