"""Real images: a folder by class, an npz, a zip with labels.csv, or a Hugging Face dataset."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zsq.data_arrays import open_npz
from zsq.data_files import open_folder, open_zip
from zsq.data_hub import open_hugging_face
from zsq.data_tensors import holds_made_images, open_made_images
from zsq.errors import UsageError
from zsq.paths import user_path
from zsq.pictures import ENDINGS, Reader, Source, mode_of, prepare
from zsq.rng import rng_for
from zsq.teacher import ModelSpec

__all__ = ["Dataset", "check_labels", "load_images", "load_labelled_images", "open_dataset", "prepare"]

logger = logging.getLogger(__name__)

KINDS = (
    "a folder with one sub-folder of pictures a class, an .npz file with `images` and `labels`, a .zip of "
    "pictures with labels.csv, or the name of a Hugging Face dataset (hf:user/name or hf:user/name@split)"
)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, read and prepared for one model when they are needed.

    Attributes:
        name: where they come from.
        labels: the class of every image, (N,), int64, >= 0.
        class_names: one name a class, or () if the source does not name its classes.
        read: images at some positions.
    """

    name: str
    labels: Tensor
    class_names: tuple[str, ...]
    read: Reader

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many classes the source names; if it names none, the largest label + 1."""
        return len(self.class_names) or int(self.labels.max()) + 1

    def batches(
        self, batch_size: int = 64, *, limit: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of images (N, C, H, W), float32, normalised, and labels (N,), int64, in order.

        Args:
            batch_size: images a pair; the last pair may have fewer.
            limit: read at most this many images, drawn once and for all from the whole set, as many sets
                are sorted by class; None reads all.
            start, every: of all pairs only number `start` and every `every`-th after it, for one of several
                processes.

        Raises:
            UsageError: an image cannot be read, or a number is below 1.
        """
        _check_positive(batch_size, "batch size")
        positions = _subset(len(self), len(self) if limit is None else min(limit, len(self)))
        for first in range(start * batch_size, len(positions), every * batch_size):
            chosen = positions[first : first + batch_size]
            yield self.read(chosen), self.labels[chosen]

    def sample(self, limit: int) -> Tensor:
        """At most so many images, (N, C, H, W), drawn and prepared as by `batches`.

        Raises:
            UsageError: as for `batches`.
        """
        return torch.cat([images for images, _ in self.batches(limit=limit)])


def open_dataset(path_or_name: str | Path, spec: ModelSpec) -> Dataset:
    """Labelled images for measuring accuracy, in a fixed order.

    Args:
        path_or_name: one of
            a folder, whose sub-folders sorted by name are the classes 0..K-1 (pictures sorted by name, also
            from folders further down), or with a labels.csv as in a zip;
            an .npz with `images`, uint8, (N, H, W, 3), (N, H, W, 1) or (N, H, W), and integer `labels` (N,);
            a .zip of pictures with labels.csv (columns `file`, `label`; sorted by file), read in place;
            a Hugging Face dataset, `hf:name`, `hf:user/name@split` or without `hf:` if there is no such path;
            the split is by default `test`, else `validation`.
        spec: size and normalisation of the model's input; see `prepare`.

    Raises:
        UsageError: nothing is there, it is of another kind, damaged, or its labels are missing or wrong.
    """
    source = _open(path_or_name, spec, labelled=True)
    assert source.labels is not None
    if int(source.labels.min()) < 0:
        raise UsageError(
            f"{source.name} has the label {int(source.labels.min())}. Expected classes from 0 on. Sets that "
            "keep their labels secret often write -1; take another split or set."
        )
    return Dataset(source.name, source.labels, source.class_names, source.read)


def load_images(path_or_name: str | Path, spec: ModelSpec, num_images: int | None = None) -> Tensor:
    """Images without labels, (N, C, H, W), float32, normalised; for example to calibrate with.

    Args:
        path_or_name: as for `open_dataset`; or a folder that `zsq synthesize` or a run wrote. Labels are not
            needed: a folder may hold pictures directly, `labels` may be missing in an npz, labels.csv in
            a zip.
        spec: size and normalisation of the model's input; see `prepare`.
        num_images: how many, drawn once and for all from the whole set, as many sets are sorted by class, and
            in its order; None reads all.

    Raises:
        UsageError: nothing is there, it is of another kind or damaged, or it holds fewer images.
    """
    return _read(_open(path_or_name, spec, labelled=False), num_images)


def load_labelled_images(
    path_or_name: str | Path, spec: ModelSpec, num_classes: int | None
) -> tuple[Tensor, Tensor | None]:
    """All images as `load_images` gives them, and their labels where they are those of the model.

    Args:
        path_or_name: as for `load_images`.
        spec: size and normalisation of the model's input.
        num_classes: outputs of the model; None if it is no classifier.

    Returns:
        Images (N, C, H, W) and labels (N,), int64, or None: an image has none, a label is no class of the
        model, or the source names more or fewer classes than it has.

    Raises:
        UsageError: as for `load_images`.
    """
    source = _open(path_or_name, spec, labelled=False)
    images = _read(source, None)
    return images, None if num_classes is None else _labels_of_model(source, num_classes)


def _labels_of_model(source: Source, num_classes: int) -> Tensor | None:
    labels, named = source.labels, len(source.class_names)
    if labels is None:
        return None
    lowest, highest = int(labels.min()), int(labels.max())
    if named in (0, num_classes) and lowest >= 0 and highest < num_classes:
        logger.info("%s brings labels along: %d classes.", source.name, len(labels.unique()))
        return labels
    what = f"{named} classes" if named not in (0, num_classes) else f"the labels {lowest} to {highest}"
    logger.info(
        "%s has %s, and the model %d classes; its images are taken without labels.",
        source.name,
        what,
        num_classes,
    )
    return None


def _read(source: Source, num_images: int | None) -> Tensor:
    if num_images is not None and num_images > source.count:
        raise UsageError(
            f"{num_images} images were asked for, but {source.name} holds {source.count}. Ask for fewer, or "
            "for no number to take all."
        )
    return source.read(_subset(source.count, source.count if num_images is None else num_images))


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Check that a model with `num_classes` outputs can be measured on `dataset`.

    Raises:
        UsageError: a label is `num_classes` or more.
    """
    lowest, highest = int(dataset.labels.min()), int(dataset.labels.max())
    if highest >= num_classes:
        raise UsageError(
            f"{dataset.name} has the labels {lowest} to {highest}, but the model has {num_classes} outputs, "
            f"for the classes 0 to {num_classes - 1}. Give images of the classes that the model was trained "
            "for, numbered in its order."
        )


def _subset(count: int, wanted: int) -> list[int]:
    """Rising positions of `wanted` of `count` images; always the same ones, all of them if wanted = count."""
    _check_positive(wanted, "number of images")
    if wanted == count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=rng_for(0, "data", "subset"))[:wanted].tolist())


def _check_positive(value: int, what: str) -> None:
    if value < 1:
        raise UsageError(f"The {what} is {value}. Expected at least 1.")


def _open(path_or_name: str | Path, spec: ModelSpec, *, labelled: bool) -> Source:
    mode_of(spec)
    text = str(path_or_name)
    path = user_path(text, "data path")
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        if not _HUB_NAME.fullmatch(name):
            raise UsageError(
                f"A Hugging Face dataset is named like hf:user/name or hf:user/name@split, got {text}."
            )
        source = open_hugging_face(name, spec, labelled)
    elif path.is_dir() and holds_made_images(path):
        source = open_made_images(path, spec, labelled)
    elif path.is_dir():
        source = open_folder(path, spec, labelled)
    elif not path.exists():
        source = _named(text, spec, labelled)
    elif path.suffix.lower() == ".npz":
        source = open_npz(path, spec, labelled)
    elif path.suffix.lower() == ".zip":
        source = open_zip(path, spec, labelled)
    else:
        raise UsageError(f"The file {path} is no set of images that zsq can read. Expected {KINDS}.")
    if source.count == 0:
        raise UsageError(
            f"{source.name} holds no images. Expected at least one; pictures end in {', '.join(ENDINGS)}."
        )
    return source


def _named(text: str, spec: ModelSpec, labelled: bool) -> Source:
    """What is no path: the name of a Hugging Face dataset if it can be one."""
    if not _HUB_NAME.fullmatch(text) or Path(text).suffix.lower() in (*ENDINGS, ".npz", ".zip"):
        raise UsageError(f"The path {text} does not exist. Expected {KINDS}.")
    try:
        return open_hugging_face(text, spec, labelled)
    except UsageError as error:
        raise UsageError(
            f"The path {text} does not exist; taken as a Hugging Face dataset: {error}"
        ) from error
