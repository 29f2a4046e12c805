"""Images as arrays in an npz."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsq.errors import UsageError, one_line
from zsq.pictures import DAMAGED_ARCHIVE, Reader, Source, normalise, prepare
from zsq.teacher import ModelSpec

MAX_SMALL_BYTES = 256 * 2**20  # an array that unpacks to more is refused ...
MAX_FOLD = 200  # ... if that is so many times its size in the file; deflate reaches 1032


def open_npz(path: Path, spec: ModelSpec, labelled: bool) -> Source:
    arrays = _npz_arrays(path, ("images", "labels") if labelled else ("images",))
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
        or 0 in images.shape[1:3]
    ):
        raise UsageError(
            f"The array `images` in {path} is {images.dtype} of shape {arrays['images'].shape}. Expected "
            "uint8, levels 0 to 255, of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W)."
        )
    labels = _labels(arrays["labels"], len(images), path) if labelled else _known_labels(path, len(images))
    return Source(name=f"The file {path}", count=len(images), read=_array_reader(images, spec), labels=labels)


def _labels(labels: np.ndarray[Any, Any], count: int, path: Path) -> Tensor:
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise UsageError(
            f"The array `labels` in {path} is {labels.dtype} of shape {labels.shape}. Expected one "
            f"integer an image, shape ({count},)."
        )
    if len(labels) != count:
        raise UsageError(f"{path} has {count} images but {len(labels)} labels. Expected one label an image.")
    return torch.from_numpy(labels.astype(np.int64))


def _known_labels(path: Path, count: int) -> Tensor | None:
    """Labels that nobody asked for: None if there are none, or they are not one integer an image."""
    try:
        return _labels(_npz_arrays(path, ("labels",))["labels"], count, path)
    except UsageError:
        return None


def _npz_arrays(path: Path, wanted: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The `wanted` arrays; no others are read, and pickled objects never."""
    expected = "Expected what numpy.savez(file, images=images, labels=labels) writes, without pickled objects"
    try:
        with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UsageError(f"The file {path} holds a single array. {expected}.")
            with archive:
                names = archive.files
                found = [name for name in wanted if name in names]
                for name in found:
                    _check_size(archive.zip, name, path)
                arrays = {name: archive[name] for name in found}
    except UsageError:
        raise
    except DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"The file {path} cannot be read as arrays ({one_line(error)}): it is damaged, cut short or of "
            f"another kind. {expected}."
        ) from error
    if missing := [name for name in wanted if name not in arrays]:
        raise UsageError(
            f"The file {path} has no array named {' and none named '.join(missing)}; it has "
            f"{', '.join(sorted(names)) or 'none'}. {expected}."
        )
    return arrays


def _check_size(archive: Any, name: str, path: Path) -> None:
    """Refuse an array before room is made for it, if its bytes are not those of its shape or of real images.

    Raises:
        UsageError, or one of `DAMAGED_ARCHIVE`: so.
    """
    member = next((n for n in (f"{name}.npy", name) if n in archive.namelist()), name)
    info = archive.getinfo(member)
    if info.file_size > max(MAX_SMALL_BYTES, MAX_FOLD * info.compress_size):
        raise UsageError(
            f"The array {name!r} in {path} is refused: its {info.compress_size} bytes unpack to "
            f"{info.file_size}, which no real images do. Save them with numpy.savez."
        )
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has the array format {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{name} of shape {shape} has {info.file_size - file.tell()} bytes")


def _array_reader(images: np.ndarray[Any, Any], spec: ModelSpec) -> Reader:
    """Reader of levels (N, H, W, 1 or 3); those that need no conversion are taken together."""
    channels, height, width = spec.input_size

    def read(positions: Sequence[int]) -> Tensor:
        chosen = images[np.asarray(positions)]
        if images.shape[1:3] == (height, width) and images.shape[3] in (1, channels):
            pixels = torch.from_numpy(chosen).permute(0, 3, 1, 2)
            return normalise(pixels.expand(-1, channels, -1, -1), spec)
        grey = images.shape[3] == 1
        return torch.stack([prepare(Image.fromarray(x[..., 0] if grey else x), spec) for x in chosen])

    return read
