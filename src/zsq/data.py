"""Real images: a folder by class, an npz, a zip with labels.csv, or a Hugging Face dataset."""

import csv
import io
import logging
import posixpath
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsq.architectures import error_summary
from zsq.errors import UsageError, import_extra
from zsq.rng import rng_for
from zsq.teacher import ModelSpec

logger = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not those that start other programs, as EPS
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
LABELS_FILE = "labels.csv"
MAX_LABELS_BYTES = 64 * 2**20  # of labels.csv in a zip
MAX_PICTURE_BYTES = 512 * 2**20  # of a picture in a zip, unpacked
MAX_RESIZED_PIXELS = 2**26  # a very long picture grows when its shorter side is enlarged
KINDS = (
    "a folder with one sub-folder of pictures a class, an .npz file with `images` and `labels`, a .zip of "
    "pictures with labels.csv, or the name of a Hugging Face dataset (hf:user/name or hf:user/name@split)"
)
# What Pillow raises for damaged pictures; zipfile and numpy also for encrypted or otherwise packed archives.
_DAMAGED = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error)
_DAMAGED_ARCHIVE = (*_DAMAGED, RuntimeError, zipfile.BadZipFile)
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w.-]+)?", re.ASCII)
_IMAGE_COLUMNS = ("image", "img", "picture", "pixels")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "digit")

Reader = Callable[[Sequence[int]], Tensor]  # positions -> images (N, C, H, W), prepared


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

    def batches(self, batch_size: int = 64, *, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of images (N, C, H, W), float32, normalised, and labels (N,), int64, in order.

        Args:
            batch_size: images a pair; the last pair may have fewer.
            limit: read at most this many images, drawn once and for all from the whole set, as many sets
                are sorted by class; None reads all.

        Raises:
            UsageError: an image cannot be read, or a number is below 1.
        """
        _check_positive(batch_size, "batch size")
        positions = _subset(len(self), len(self) if limit is None else min(limit, len(self)))
        for start in range(0, len(positions), batch_size):
            chosen = positions[start : start + batch_size]
            yield self.read(chosen), self.labels[chosen]


def open_dataset(path_or_name: str | Path, spec: ModelSpec) -> Dataset:
    """Labelled images for measuring accuracy, in a fixed order.

    Args:
        path_or_name: one of
            a folder, whose sub-folders sorted by name are the classes 0..K-1 (pictures sorted by name, also
            from folders further down);
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
        path_or_name: as for `open_dataset`. Labels are not looked at: a folder may hold pictures directly,
            `labels` may be missing in an npz, labels.csv in a zip.
        spec: size and normalisation of the model's input; see `prepare`.
        num_images: how many, drawn once and for all from the whole set, as many sets are sorted by class, and
            in its order; None reads all.

    Raises:
        UsageError: nothing is there, it is of another kind or damaged, or it holds fewer images.
    """
    source = _open(path_or_name, spec, labelled=False)
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


def prepare(picture: Image.Image, spec: ModelSpec) -> Tensor:
    """A picture as the model expects it, (C, H, W), float32.

    It becomes RGB (C = 3) or grey (C = 1: 0.299 R + 0.587 G + 0.114 B); transparency and orientation tags are
    ignored. A picture of exactly (H, W) is used as it is. Any other is resized with antialiasing so that its
    shorter side is round(H / crop_fraction), half to even, the longer one rounded down; or, if (H, W) does
    not fit into that, which happens only with H < W, so that it just fits. The centre (H, W) is cut out,
    offsets rounded half to even. Levels 0..255 become [0, 1], then (x - mean) / std.

    Raises:
        UsageError: more than 8 bits a channel, a shape so long that resizing would need too much memory, or
            the model takes neither 1 nor 3 channels.

    Source: order and roundings of torchvision's Resize, CenterCrop, ToTensor and Normalize.
    """
    channels, height, width = spec.input_size
    mode = _mode(spec)
    if picture.mode[0] in "IF":
        raise UsageError(
            f"Its pixels have the format {picture.mode}. Expected 8 bits a channel; convert the picture."
        )
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns about the direct way, to the same colours
    picture = picture.convert(mode)
    if picture.size != (width, height):
        size = _resized_size(picture.size, spec)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling[spec.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        picture = picture.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(picture)).view(height, width, channels)
    return _normalise(pixels.permute(2, 0, 1), spec)


def _resized_size(size: tuple[int, int], spec: ModelSpec) -> tuple[int, int]:
    """(width, height) of a picture of `size` (width, height) before the centre is cut out."""
    (old_width, old_height), (_, height, width) = size, spec.input_size
    shorter, old_shorter = round(height / spec.crop_fraction), min(size)
    new_width, new_height = (shorter * side // old_shorter for side in size)
    if new_width < width or new_height < height:
        scale = max(width / old_width, height / old_height)
        new_width, new_height = max(width, round(scale * old_width)), max(height, round(scale * old_height))
    if new_width * new_height > max(MAX_RESIZED_PIXELS, old_width * old_height):
        raise UsageError(
            f"It has {old_width} x {old_height} pixels and would be enlarged to {new_width} x {new_height}. "
            "Expected a less extreme shape; leave it out or cut it."
        )
    return new_width, new_height


def _normalise(pixels: Tensor, spec: ModelSpec) -> Tensor:
    """Levels (..., C, H, W), uint8 -> (level / 255 - mean) / std, float32."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return pixels.contiguous().to(torch.float32).div_(255).sub_(mean).div_(std)


def _mode(spec: ModelSpec) -> str:
    """Pillow's name of what the model takes."""
    channels = spec.input_size[0]
    if channels not in (1, 3):
        raise UsageError(
            f"The model takes images of {channels} channels. Pictures can be read for models with 3 channels "
            "(RGB) or 1 (grey)."
        )
    return "RGB" if channels == 3 else "L"


def _subset(count: int, wanted: int) -> list[int]:
    """Rising positions of `wanted` of `count` images; always the same ones, all of them if wanted = count."""
    _check_positive(wanted, "number of images")
    if wanted == count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=rng_for(0, "data", "subset"))[:wanted].tolist())


def _check_positive(value: int, what: str) -> None:
    if value < 1:
        raise UsageError(f"The {what} is {value}. Expected at least 1.")


@dataclass(frozen=True, eq=False)
class _Source:
    """Images of one kind of source; labels only if they were asked for."""

    name: str
    count: int
    read: Reader
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()


def _open(path_or_name: str | Path, spec: ModelSpec, *, labelled: bool) -> _Source:
    _mode(spec)
    text = str(path_or_name)
    path = Path(text).expanduser()
    if text.startswith("hf:"):
        source = _hugging_face(text.removeprefix("hf:"), spec, labelled)
    elif path.is_dir():
        source = _folder(path, spec, labelled)
    elif not path.exists():
        source = _named(text, spec, labelled)
    elif path.suffix.lower() == ".npz":
        source = _npz(path, spec, labelled)
    elif path.suffix.lower() == ".zip":
        source = _zip(path, spec, labelled)
    else:
        raise UsageError(f"The file {path} is no set of images that zsq can read. Expected {KINDS}.")
    if source.count == 0:
        raise UsageError(
            f"{source.name} holds no images. Expected at least one; pictures end in {', '.join(ENDINGS)}."
        )
    return source


def _named(text: str, spec: ModelSpec, labelled: bool) -> _Source:
    """What is no path: the name of a Hugging Face dataset if it can be one."""
    if not _HUB_NAME.fullmatch(text) or Path(text).suffix.lower() in (*ENDINGS, ".npz", ".zip"):
        raise UsageError(f"The path {text} does not exist. Expected {KINDS}.")
    try:
        return _hugging_face(text, spec, labelled)
    except UsageError as error:
        raise UsageError(
            f"The path {text} does not exist; taken as a Hugging Face dataset: {error}"
        ) from error


# Pictures


def _pictures(
    fetch: Callable[[int], Any], name_of: Callable[[int], str], spec: ModelSpec, *, threads: int | None = None
) -> Reader:
    """Reader of encoded pictures; `fetch` gives a path, the bytes of a file, or a picture."""

    def prepared(index: int) -> Tensor:
        picture = _decode(fetch, index, name_of)
        try:
            return prepare(picture, spec)
        except UsageError as error:
            raise UsageError(f"The picture {name_of(index)} cannot be used. {error}") from error

    def read(positions: Sequence[int]) -> Tensor:
        images = torch.empty(len(positions), *spec.input_size)
        # The filters hold for all threads; they are set here because setting them in these would be a race.
        with warnings.catch_warnings(), ThreadPoolExecutor(threads or torch.get_num_threads()) as pool:
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged tags: not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for image, values in zip(images, pool.map(prepared, positions), strict=True):
                image.copy_(values)
        return images

    return read


def _decode(fetch: Callable[[int], Any], index: int, name_of: Callable[[int], str]) -> Image.Image:
    """The picture at `index`, all its pixels read and its file closed."""
    try:
        file = fetch(index)
        if isinstance(file, Image.Image):
            file.load()
            return file
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as picture:
            picture.load()
            return picture
    except UsageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(
            f"The picture {name_of(index)} is refused: it has more pixels than Pillow takes "
            f"({_one_line(error)}). Leave it out, or make it smaller."
        ) from error
    except _DAMAGED as error:
        raise UsageError(
            f"The picture {name_of(index)} cannot be read ({_one_line(error)}). Expected an undamaged file "
            f"in one of the formats {', '.join(FORMATS)}; replace it or leave it out."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


# Folders


def _folder(path: Path, spec: ModelSpec, labelled: bool) -> _Source:
    entries = sorted((e for e in path.iterdir() if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry for entry in entries if entry.is_dir()]
    names = tuple(folder.name for folder in folders)
    loose = [entry for entry in entries if entry.suffix.lower() in ENDINGS and entry.is_file()]
    if labelled:
        _check_class_folders(path, names, len(loose))
    found = [(file, label) for label, folder in enumerate(folders) for file in _pictures_below(folder)]
    files = ([] if labelled else loose) + [file for file, _ in found]
    return _Source(
        name=f"The folder {path}",
        count=len(files),
        read=_pictures(lambda index: files[index], lambda index: str(files[index]), spec),
        labels=torch.tensor([label for _, label in found], dtype=torch.int64) if labelled else None,
        class_names=names if labelled else (),
    )


def _check_class_folders(path: Path, names: tuple[str, ...], num_loose: int) -> None:
    if not names:
        raise UsageError(
            f"The folder {path} has no sub-folders ({num_loose} pictures lie in it directly). Expected one "
            "sub-folder of pictures for every class, sorted by name as the classes 0, 1, 2 ..."
        )
    if SPLITS.issuperset(name.lower() for name in names):
        raise UsageError(
            f"The sub-folders of {path} are called {', '.join(names)}: parts of a set, not classes. "
            f"Name one of them, for example {path / names[-1]}."
        )
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        logger.warning(
            "The sub-folders of %s are numbers, but sorted by name: %s ... are the classes 0, 1, 2 ... "
            "Write 00, 01, 02 ... if the numbers are meant.",
            path,
            ", ".join(names[:3]),
        )


def _pictures_below(folder: Path) -> list[Path]:
    """All pictures in `folder` and further down, without hidden ones, sorted."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in ENDINGS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


# Arrays


def _npz(path: Path, spec: ModelSpec, labelled: bool) -> _Source:
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
    labels = arrays.get("labels")
    if labels is not None:
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
            raise UsageError(
                f"The array `labels` in {path} is {labels.dtype} of shape {labels.shape}. Expected one "
                f"integer an image, shape ({len(images)},)."
            )
        if len(labels) != len(images):
            raise UsageError(
                f"{path} has {len(images)} images but {len(labels)} labels. Expected one label an image."
            )
    return _Source(
        name=f"The file {path}",
        count=len(images),
        read=_array_reader(images, spec),
        labels=torch.from_numpy(labels.astype(np.int64)) if labels is not None else None,
    )


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
                arrays = {name: archive[name] for name in wanted if name in names}
    except UsageError:
        raise
    except _DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"The file {path} cannot be read as arrays ({_one_line(error)}): it is damaged, cut short or of "
            f"another kind. {expected}."
        ) from error
    if missing := [name for name in wanted if name not in arrays]:
        raise UsageError(
            f"The file {path} has no array named {' and none named '.join(missing)}; it has "
            f"{', '.join(sorted(names)) or 'none'}. {expected}."
        )
    return arrays


def _array_reader(images: np.ndarray[Any, Any], spec: ModelSpec) -> Reader:
    """Reader of levels (N, H, W, 1 or 3); those that need no conversion are taken together."""
    channels, height, width = spec.input_size

    def read(positions: Sequence[int]) -> Tensor:
        chosen = images[np.asarray(positions)]
        if images.shape[1:3] == (height, width) and images.shape[3] in (1, channels):
            pixels = torch.from_numpy(chosen).permute(0, 3, 1, 2)
            return _normalise(pixels.expand(-1, channels, -1, -1), spec)
        grey = images.shape[3] == 1
        return torch.stack([prepare(Image.fromarray(x[..., 0] if grey else x), spec) for x in chosen])

    return read


# Zip files


def _zip(path: Path, spec: ModelSpec, labelled: bool) -> _Source:
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"The file {path} cannot be read as a zip ({_one_line(error)}): it is damaged, cut short or of "
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
    else:
        files = sorted(
            name
            for name in members
            if name.lower().endswith(ENDINGS) and not posixpath.basename(name).startswith(".")
        )
    return _Source(
        name=f"The file {path}",
        count=len(files),
        read=_pictures(
            lambda index: _member(archive, members[files[index]], MAX_PICTURE_BYTES),
            lambda index: f"{files[index]} in {path}",
            spec,
        ),
        labels=torch.tensor([label for _, label in rows], dtype=torch.int64) if labelled else None,
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
    folder, where = posixpath.dirname(tables[0]), f"{tables[0]} in {path}"
    seen = set()
    for line, file, label in _rows(_member(archive, members[tables[0]], MAX_LABELS_BYTES), where):
        relative = file.replace("\\", "/")
        found = (posixpath.normpath(posixpath.join(base, relative)) for base in (folder, ""))
        name = next((candidate for candidate in found if candidate in members), None)
        if name is None:
            raise UsageError(
                f"Line {line} of {where} names the file {file!r}, which is not in the zip. Expected the "
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
            f"{where} cannot be read ({_one_line(error)}). Expected a table in UTF-8 with commas."
        ) from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Content of a file in a zip; at most as long as its directory says."""
    where = f"{info.filename} in {archive.filename}"
    if info.file_size > limit:
        raise UsageError(f"{where} is refused: it unpacks to {info.file_size} bytes, more than {limit}.")
    try:
        return archive.read(info)
    except _DAMAGED_ARCHIVE as error:
        raise UsageError(
            f"{where} cannot be read ({_one_line(error)}): the zip is damaged, encrypted or packed by an "
            "unknown method. Make it again."
        ) from error


# Hugging Face datasets


def _hugging_face(text: str, spec: ModelSpec, labelled: bool) -> _Source:
    name, _, split = text.partition("@")
    datasets = import_extra("datasets", "hf")
    splits = [str(found) for found in _from_hub(datasets.get_dataset_split_names, name)]
    split = split or next((s for s in ("test", "validation") if s in splits), "")
    if split not in splits:
        came = f"no split {split!r}" if split else "neither a split 'test' nor 'validation'"
        example = f"hf:{name}@{splits[0]}" if splits else f"hf:{name}@SPLIT"
        raise UsageError(
            f"The Hugging Face dataset {name} has {came}. It has {', '.join(splits) or 'none'}; name one, "
            f"for example {example}."
        )
    rows = _from_hub(datasets.load_dataset, name, split=split)
    features = dict(rows.features)
    images = _column(features, "Image", _IMAGE_COLUMNS, name)
    labels, class_names = None, ()
    if labelled:
        column = _column(features, "ClassLabel", _LABEL_COLUMNS, name)
        labels = _label_tensor(list(rows[column]), column, name)
        class_names = tuple(getattr(features[column], "names", None) or ())
    return _Source(
        name=f"The Hugging Face dataset {name}@{split}",
        count=len(rows),
        # One thread: the library does not promise that rows can be read from several.
        read=_pictures(
            lambda index: _picture_of(rows[index][images]),
            lambda index: f"in row {index} of {name}@{split}",
            spec,
            threads=1,
        ),
        labels=labels,
        class_names=class_names,
    )


def _from_hub(call: Callable[..., Any], name: str, **options: str) -> Any:
    try:
        return call(name, **options)
    except Exception as error:  # of many packages: network, permissions, file formats, the library's own
        raise UsageError(
            f"The Hugging Face dataset {name} could not be loaded ({error_summary(error)}). Check the name "
            "and the network, or give a path."
        ) from error


def _column(features: dict[str, Any], kind: str, usual: tuple[str, ...], dataset: str) -> str:
    """The column of type `kind`; among several, or if there is none, the first of the `usual` names."""
    typed = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(typed) == 1:
        return typed[0]
    if found := [column for column in usual if column in (typed or features)]:
        return found[0]
    what = f"more than one column of type {kind}" if typed else f"no column of type {kind}"
    raise UsageError(
        f"The Hugging Face dataset {dataset} has {what} and none called {', '.join(usual)}; its columns are "
        f"{', '.join(features)}. Expected a set for image classification."
    )


def _label_tensor(values: list[Any], column: str, dataset: str) -> Tensor:
    wrong = [value for value in values if not isinstance(value, int) or isinstance(value, bool)]
    if wrong:
        raise UsageError(
            f"The column {column} of the Hugging Face dataset {dataset} holds {wrong[0]!r}. Expected the "
            "number of a class in every row."
        )
    return torch.tensor(values, dtype=torch.int64)


def _picture_of(value: Any) -> Any:
    """A cell of an image column: a picture, or a dictionary with the bytes or the path of its file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, Image.Image | bytes | str):
        raise UsageError(
            f"A cell of the image column holds a {type(value).__name__}. Expected a picture or "
            "the content of its file."
        )
    return value
