"""Pictures: decoded, and prepared as a model expects them."""

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zsq.errors import UsageError, one_line
from zsq.teacher import ModelSpec

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not those that start other programs, as EPS
MAX_RESIZED_PIXELS = 2**26  # a very long picture grows when its shorter side is enlarged
# What Pillow raises for damaged pictures; zipfile and numpy also for encrypted or otherwise packed archives.
DAMAGED = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error)
DAMAGED_ARCHIVE = (*DAMAGED, RuntimeError, zipfile.BadZipFile)

Reader = Callable[[Sequence[int]], Tensor]  # positions -> images (N, C, H, W), prepared


@dataclass(frozen=True, eq=False)
class Source:
    """Images of one kind of source.

    Attributes:
        name: for messages.
        count: how many images.
        read: images at some positions.
        labels: the class of every image, (N,), int64; if they were not asked for, where the source has one
            for each, else None.
        class_names: one name a class, or () if the source does not name its classes.
    """

    name: str
    count: int
    read: Reader
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()


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
    mode = mode_of(spec)
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
    return normalise(pixels.permute(2, 0, 1), spec)


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


def normalise(pixels: Tensor, spec: ModelSpec) -> Tensor:
    """Levels (..., C, H, W), uint8 -> (level / 255 - mean) / std, float32."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return pixels.contiguous().to(torch.float32).div_(255).sub_(mean).div_(std)


def mode_of(spec: ModelSpec) -> str:
    """Pillow's name of what the model takes."""
    channels = spec.input_size[0]
    if channels not in (1, 3):
        raise UsageError(
            f"The model takes images of {channels} channels. Pictures can be read for models with 3 channels "
            "(RGB) or 1 (grey)."
        )
    return "RGB" if channels == 3 else "L"


def picture_reader(
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
            f"({one_line(error)}). Leave it out, or make it smaller."
        ) from error
    except DAMAGED as error:
        raise UsageError(
            f"The picture {name_of(index)} cannot be read ({one_line(error)}). Expected an undamaged file "
            f"in one of the formats {', '.join(FORMATS)}; replace it or leave it out."
        ) from error
