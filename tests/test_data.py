"""Reading labelled images: what is read, how it is prepared, and what is refused."""

import io
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zsq import data_files
from zsq.data import Dataset, check_labels, load_images, load_labelled_images, open_dataset, prepare
from zsq.errors import UsageError
from zsq.rng import rng_for
from zsq.run import write_images
from zsq.teacher import ModelSpec

Levels = np.ndarray[Any, np.dtype[np.uint8]]


def spec(channels: int = 3, height: int = 8, width: int = 8, **changes: Any) -> ModelSpec:
    settings: dict[str, Any] = {
        "input_size": (channels, height, width),
        "mean": (0.5, 0.4, 0.3)[:channels],
        "std": (0.25, 0.5, 0.2)[:channels],
        "crop_fraction": 1.0,
    }
    return ModelSpec(**{**settings, **changes})


def levels(*shape: int, seed: int = 0) -> Levels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normalised(pixels: Levels, to: ModelSpec) -> torch.Tensor:
    """Levels (H, W, C) by the definition: (x / 255 - mean) / std."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255
    return (x - torch.tensor(to.mean).view(-1, 1, 1)) / torch.tensor(to.std).view(-1, 1, 1)


def encoded(pixels: Levels, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def write_zip(path: Path, files: Mapping[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def whole(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*dataset.batches(2), strict=True)
    return torch.cat(images), torch.cat(labels)


# Preparing one picture


def test_picture_of_the_input_size_is_used_as_it_is() -> None:
    pixels, to = levels(8, 6, 3), spec(height=8, width=6, crop_fraction=0.5)
    image = prepare(Image.fromarray(pixels), to)
    assert image.dtype == torch.float32
    assert torch.equal(image, normalised(pixels, to))


def test_256_for_224_is_cropped_at_16_without_resizing() -> None:
    pixels, to = levels(256, 256, 3), spec(height=224, width=224, crop_fraction=0.875)
    assert torch.equal(prepare(Image.fromarray(pixels), to), normalised(pixels[16:240, 16:240], to))


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_shorter_side_is_resized_and_the_centre_cut_out(interpolation: str) -> None:
    # Shorter side round(8 / 0.8) = 10; longer 10 * 35 / 20 = 17.5 -> 17; offsets round(4.5) = 4 and 1.
    pixels, to = levels(20, 35, 3), spec(crop_fraction=0.8, interpolation=interpolation)
    resized = Image.fromarray(pixels).resize((17, 10), Image.Resampling[interpolation.upper()])
    assert torch.equal(prepare(Image.fromarray(pixels), to), normalised(np.array(resized)[1:9, 4:12], to))


@pytest.mark.parametrize(
    ("size", "picture", "resized"),
    [
        ((4, 8), (20, 40), (5, 10)),  # shorter side round(4 / 0.8) = 5
        ((4, 8), (20, 20), (8, 8)),  # 5 x 5 would not hold 8 columns: as small as fits
        ((4, 8), (40, 20), (16, 8)),
        ((8, 4), (20, 20), (10, 10)),
        ((8, 4), (30, 15), (20, 10)),
        ((8, 4), (3, 9), (10, 30)),  # small pictures are enlarged
    ],
)
def test_input_that_is_not_square(
    size: tuple[int, int], picture: tuple[int, int], resized: tuple[int, int]
) -> None:
    pixels, to = levels(*picture, 3), spec(height=size[0], width=size[1], crop_fraction=0.8)
    shown = np.array(Image.fromarray(pixels).resize(resized[::-1], Image.Resampling.BILINEAR))
    top, left = (round((a - b) / 2) for a, b in zip(resized, size, strict=True))
    wanted = normalised(shown[top : top + size[0], left : left + size[1]], to)
    assert torch.equal(prepare(Image.fromarray(pixels), to), wanted)


def test_colours_and_grey() -> None:
    grey, colour = levels(8, 8), levels(8, 8, 3)
    three = prepare(Image.fromarray(grey), spec())
    assert torch.equal(three, normalised(np.repeat(grey[..., None], 3, axis=2), spec()))
    one = prepare(Image.fromarray(colour), spec(channels=1))
    luma = (colour @ np.array([0.299, 0.587, 0.114])) / 255
    # Pillow rounds the grey level to a whole one: half a level, divided by the std.
    assert (one[0] - (torch.from_numpy(luma) - 0.5) / 0.25).abs().max() < 0.6 / 255 / 0.25


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_picture_modes_become_rgb(mode: str) -> None:
    picture = Image.fromarray(levels(8, 8, 3)).convert(mode)
    wanted = normalised(np.array(picture.convert("RGB")), spec())
    assert torch.equal(prepare(picture, spec()), wanted)


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.fromarray(levels(8, 8, 3)).quantize(16)
    wanted = normalised(np.array(picture.convert("RGB")), spec())
    picture.save(tmp_path / "a.png", transparency=bytes(range(16)))
    assert torch.equal(load_images(tmp_path, spec())[0], wanted)


def test_sixteen_bits_a_channel_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match=r"deep\.png cannot be used.*I;16.*8 bits"):
        load_images(tmp_path, spec())


def test_a_shape_that_would_explode_is_refused() -> None:
    # Shorter side 224: 224 x 1,120,000 pixels.
    with pytest.raises(UsageError, match="5000 x 1 pixels .*1120000 x 224"):
        prepare(Image.new("RGB", (5000, 1)), spec(height=224, width=224))


def test_models_with_other_channels_are_refused(tmp_path: Path) -> None:
    two = spec(channels=2)
    with pytest.raises(UsageError, match="2 channels"):
        prepare(Image.new("RGB", (8, 8)), two)
    with pytest.raises(UsageError, match="2 channels"):
        open_dataset(tmp_path, two)


# Arrays


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8, 1), (8, 8), (11, 9, 3), (9, 12)])
def test_npz_equals_its_pictures(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    pixels, labels = levels(5, *shape), np.array([3, 0, 1, 1, 2], np.uint8)
    to = spec(channels=channels)
    path = write_npz(tmp_path / "set.npz", images=pixels, labels=labels, extra=np.array([object()]))
    dataset = open_dataset(path, to)
    images, found = whole(dataset)
    pictures = [Image.fromarray(x[..., 0] if x.shape[2:] == (1,) else x) for x in pixels]
    assert torch.equal(images, torch.stack([prepare(picture, to) for picture in pictures]))
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert found.dtype == torch.int64 and found.tolist() == labels.tolist()
    assert (len(dataset), dataset.num_classes, dataset.class_names) == (5, 4, ())


def test_npz_path_may_be_text_and_the_ending_in_capitals(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", images=levels(2, 8, 8), labels=np.array([0, 1]))
    path = (tmp_path / "set.npz").rename(tmp_path / "SET.NPZ")
    assert len(open_dataset(str(path), spec())) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0]}, "no array named images; it has labels"),
        ({"images": levels(2, 8, 8), "target": [0, 1]}, "no array named labels; it has images, target"),
        ({"x": [1], "y": [2]}, "no array named images and none named labels; it has x, y"),
        ({"images": levels(2, 8, 8) / 255.0, "labels": [0, 1]}, "float64 .*Expected uint8"),
        ({"images": levels(2, 8, 8).astype(np.int64), "labels": [0, 1]}, "int64 .*Expected uint8"),
        ({"images": levels(2, 3, 8, 8), "labels": [0, 1]}, r"shape \(2, 3, 8, 8\).*\(N, H, W, 3\)"),
        ({"images": levels(8, 8), "labels": [0, 1]}, r"shape \(8, 8\).*\(N, H, W, 3\)"),
        ({"images": levels(2, 0, 8), "labels": [0, 1]}, r"shape \(2, 0, 8\)"),
        ({"images": levels(2, 8, 8), "labels": [0, 1, 2]}, "2 images but 3 labels"),
        ({"images": levels(2, 8, 8), "labels": [0.0, 1.0]}, "`labels` .* is float64"),
        ({"images": levels(2, 8, 8), "labels": [[0], [1]]}, r"`labels` .* shape \(2, 1\)"),
        ({"images": levels(2, 8, 8), "labels": [True, False]}, "`labels` .* is bool"),
        ({"images": levels(2, 8, 8), "labels": [0, -1]}, "label -1"),
        ({"images": levels(0, 8, 8), "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": np.array([object()]), "labels": [0]}, "without pickled objects"),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(write_npz(tmp_path / "set.npz", **arrays), spec())


@pytest.mark.parametrize("keep", [0, 10, 400, -30])
def test_truncated_npz(tmp_path: Path, keep: int) -> None:
    path = write_npz(tmp_path / "set.npz", images=levels(9, 8, 8, 3), labels=np.arange(9))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="cannot be read as arrays"):
        open_dataset(path, spec())


def test_damaged_bytes_in_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "set.npz", images=levels(9, 8, 8, 3), labels=np.arange(9))
    content = bytearray((tmp_path / "set.npz").read_bytes())
    content[300:400] = bytes(100)
    with pytest.raises(UsageError, match="cannot be read as arrays"):
        open_dataset(write(tmp_path / "set.npz", bytes(content)), spec())


def test_npz_that_is_a_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", levels(2, 8, 8))
    with pytest.raises(UsageError, match="holds a single array"):
        open_dataset((tmp_path / "a.npy").rename(tmp_path / "a.npz"), spec())


# Folders


def test_folder_by_class(tmp_path: Path) -> None:
    pixels = levels(5, 8, 8, 3)
    names = ["cat/b.png", "cat/a.PNG", "ant/deep/er/z.png", "dog/1.bmp", "ant/a.png"]
    for name, picture in zip(names, pixels, strict=True):
        write(tmp_path / name, encoded(picture, "BMP" if name.endswith("bmp") else "PNG"))
    for ignored in ("cat/notes.txt", "cat/._a.png", "loose.png", ".hidden/a.png", "dog/.cache/a.png"):
        write(tmp_path / ignored, b"no picture")
    (tmp_path / "eel").mkdir()
    dataset = open_dataset(tmp_path, spec())
    images, labels = whole(dataset)
    assert dataset.class_names == ("ant", "cat", "dog", "eel") and dataset.num_classes == 4
    assert labels.tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(images, torch.stack([normalised(pixels[i], spec()) for i in (4, 2, 1, 0, 3)]))


def test_batches_and_limit(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", images=levels(100, 8, 8), labels=np.repeat(np.arange(10), 10))
    dataset = open_dataset(path, spec())
    assert [len(labels) for _, labels in dataset.batches(30)] == [30, 30, 30, 10]
    limited = [labels for _, labels in dataset.batches(30, limit=40)]
    assert [len(labels) for labels in limited] == [30, 10]
    drawn = torch.cat(limited)
    assert drawn.tolist() == sorted(drawn.tolist())  # in the order of the source
    assert len(drawn.unique()) > 5  # not only the first four classes
    assert torch.equal(drawn, torch.cat([labels for _, labels in dataset.batches(7, limit=40)]))
    assert sum(len(labels) for _, labels in dataset.batches(30, limit=1000)) == 100
    for wrong in ({"batch_size": 0}, {"batch_size": 5, "limit": 0}):
        with pytest.raises(UsageError, match="Expected at least 1"):
            next(dataset.batches(**wrong))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no sub-folders \(0 pictures"),
        (["a.png", "b.png"], r"no sub-folders \(2 pictures"),
        (["cat/notes.txt"], "holds no images"),
        (["train/cat/a.png", "val/cat/a.png"], "train, val: parts of a set"),
    ],
)
def test_wrong_folder(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        write(tmp_path / name, encoded(levels(8, 8)))
    with pytest.raises(UsageError, match=message):
        open_dataset(tmp_path, spec())


MADE_FOR = spec()


def test_folder_with_a_table(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png", "unlisted.png"):
        (tmp_path / name).write_bytes(PICTURE)
    table = tmp_path / "labels.csv"
    table.write_text("file,label,prompt\nsub/a.png,4,a cat\n./b.png,2,a dog\n")
    found = open_dataset(tmp_path, MADE_FOR)
    assert found.labels.tolist() == [2, 4] and found.read([0, 1]).shape == (2, *MADE_FOR.input_size)
    assert len(load_images(tmp_path, MADE_FOR)) == 3
    table.write_text("file,label\n../b.png,1\n")
    with pytest.raises(UsageError, match=r"names the file '../b.png', which is not below"):
        open_dataset(tmp_path, MADE_FOR)


def test_images_that_zsq_made(tmp_path: Path) -> None:
    images = torch.randn(4, *MADE_FOR.input_size, generator=torch.Generator().manual_seed(0))
    write_images(tmp_path, images, MADE_FOR)
    assert torch.equal(load_images(tmp_path, MADE_FOR), images)
    assert torch.equal(load_images(tmp_path, MADE_FOR, 2), images[sorted(_picked(4, 2))])
    other = replace(MADE_FOR, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    levels = [
        load_images(tmp_path, s) * torch.tensor(s.std).view(3, 1, 1) + torch.tensor(s.mean).view(3, 1, 1)
        for s in (MADE_FOR, other)
    ]
    torch.testing.assert_close(*levels)
    for wrong, text in ((replace(MADE_FOR, input_size=(3, 4, 4)), "of shape"), (MADE_FOR, "cannot be read")):
        with pytest.raises(UsageError, match=text):
            load_images(tmp_path, wrong)
        (tmp_path / "images.safetensors").write_bytes(b"none")
    with pytest.raises(UsageError, match="nothing about accuracy"):
        open_dataset(tmp_path, MADE_FOR)


def _picked(count: int, wanted: int) -> list[int]:
    return torch.randperm(count, generator=rng_for(0, "data", "subset"))[:wanted].tolist()


def test_numbers_sorted_as_text_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0", "2", "10"):
        write(tmp_path / name / "a.png", encoded(levels(8, 8)))
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path, spec()).class_names == ("0", "10", "2")
    assert "sorted by name: 0, 10, 2" in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b"no picture", encoded(levels(64, 64, 3))[:-2000], encoded(levels(8, 8), "PCX")]
)
def test_broken_picture(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "cat" / "bad.png", content)
    dataset = open_dataset(tmp_path, spec())
    with pytest.raises(UsageError, match=r"bad\.png cannot be read"):
        whole(dataset)


@pytest.mark.parametrize("limit", [100, 60])  # 128 pixels: Pillow warns above its limit, fails above twice it
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    write(tmp_path / "cat" / "big.png", encoded(levels(16, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with (
        warnings.catch_warnings(),
        pytest.raises(UsageError, match=r"big\.png is refused: it has more pixels"),
    ):
        warnings.simplefilter("ignore")  # as a user may have it
        whole(open_dataset(tmp_path, spec()))


def test_damaged_tags_of_a_picture_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    tags = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # five entries are announced, none follows
    Image.fromarray(levels(8, 8, 3)).save(tmp_path / "cat" / "a.jpg", exif=tags)
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(tmp_path / "cat" / "a.jpg").close()
    assert len(whole(open_dataset(tmp_path, spec()))[0]) == 1


# Zip files


def test_zip_with_labels(tmp_path: Path) -> None:
    pixels = levels(4, 8, 8, 3)
    files: dict[str, bytes | str] = {
        "set/labels.csv": '\ufefflabel, file ,author\n0,./sub/a.png,\n7,b.png,"x, y"\n2,sub\\c.png,z\n\n',
        "set/b.png": encoded(pixels[0]),
        "set/sub/a.png": encoded(pixels[1]),
        "set/sub/c.png": encoded(pixels[2]),
        "set/sub/unlisted.png": b"",
        "set/old/labels.csv": "deeper",
        "__MACOSX/labels.csv": "",
        "../../outside.png": encoded(pixels[3]),
    }
    dataset = open_dataset(write_zip(tmp_path / "set.zip", files), spec())
    images, labels = whole(dataset)
    assert labels.tolist() == [7, 0, 2]  # sorted by file: b.png, sub/a.png, sub/c.png
    assert torch.equal(images, torch.stack([normalised(p, spec()) for p in pixels[:3]]))
    assert dataset.num_classes == 8
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]  # nothing is unpacked


def test_zip_entries_that_point_outside_are_harmless(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "labels.csv": "file,label\n../../a.png,1\n/etc/b.png,0\n",
        "../../a.png": encoded(levels(8, 8)),
        "/etc/b.png": encoded(levels(8, 8)),
    }
    images, labels = whole(open_dataset(write_zip(tmp_path / "set.zip", files), spec()))
    assert len(images) == 2 and labels.tolist() == [1, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


PICTURE = encoded(levels(8, 8, 3))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": PICTURE}, r"no labels\.csv"),
        ({"labels.csv": "file,class\na.png,0\n", "a.png": PICTURE}, "columns file, class.* file and label"),
        ({"labels.csv": "", "a.png": PICTURE}, r"columns \(none\)"),
        ({"labels.csv": "file,label\n"}, "holds no images"),
        (
            {"labels.csv": "file,label\na.png,0\nb.png,1\n", "a.png": PICTURE},
            "Line 3 .*'b.png', which is not in",
        ),
        ({"labels.csv": "file,label\na.png,cat\n", "a.png": PICTURE}, "Line 2 .*label 'cat'"),
        ({"labels.csv": "file,label\na.png,1.0\n", "a.png": PICTURE}, r"label '1\.0'"),
        ({"labels.csv": "file,label\na.png,-1\n", "a.png": PICTURE}, "label '-1'"),
        ({"labels.csv": "file,label\na.png\n", "a.png": PICTURE}, "label ''"),
        ({"labels.csv": "file,label\na.png,99999999999999999999\n", "a.png": PICTURE}, "label '9999"),
        ({"labels.csv": "file,label\na.png,1\na.png,2\n", "a.png": PICTURE}, "Line 3 .*'a.png' again"),
        ({"labels.csv": b"file,label\n\xff.png,1\n"}, "Expected a table in UTF-8"),
        ({"labels.csv": "file,label\n" + "x" * 200_000}, "Expected a table"),
        ({"a/labels.csv": "", "b/labels.csv": ""}, r"more than one labels\.csv"),
    ],
)
def test_wrong_zip(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(write_zip(tmp_path / "set.zip", files), spec())


def test_zip_entry_that_is_no_picture(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"labels.csv": "file,label\na.png,0\n", "a.png": "text"})
    with pytest.raises(UsageError, match=r"a\.png in .*set\.zip cannot be read"):
        whole(open_dataset(path, spec()))


def test_zip_files_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "set.zip", {"labels.csv": "file,label\na.png,0\n", "a.png": PICTURE})
    monkeypatch.setattr(data_files, "MAX_PICTURE_BYTES", 20)
    with pytest.raises(UsageError, match=r"a\.png in .* refused: it unpacks to \d+ bytes, more than 20"):
        whole(open_dataset(path, spec()))
    monkeypatch.setattr(data_files, "MAX_LABELS_BYTES", 10)
    with pytest.raises(UsageError, match=r"labels\.csv in .* refused"):
        open_dataset(path, spec())


def test_damaged_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"labels.csv": "file,label\na.png,0\n", "a.png": PICTURE})
    content = path.read_bytes()
    for keep in (0, 50, len(content) - 10):
        with pytest.raises(UsageError, match="cannot be read as a zip"):
            open_dataset(write(path, content[:keep]), spec())
    start = content.index(b"a.png") + 30
    broken = content[:start] + bytes(40) + content[start + 40 :]
    with pytest.raises(UsageError, match=r"a\.png in .* cannot be read"):
        whole(open_dataset(write(path, broken), spec()))


def test_encrypted_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"labels.csv": "file,label\na.png,0\n", "a.png": PICTURE})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # flag in the local header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UsageError, match=r"labels\.csv in .*encrypted"):
        open_dataset(write(path, bytes(content)), spec())


# Images without labels


def test_load_images_needs_no_labels(tmp_path: Path) -> None:
    pixels = levels(3, 8, 8, 3)
    wanted = torch.stack([normalised(p, spec()) for p in pixels])
    npz = write_npz(tmp_path / "set.npz", images=pixels)
    files: dict[str, bytes] = {f"dir/{i}.png": encoded(p) for i, p in enumerate(pixels)}
    noise: dict[str, bytes | str] = {
        "dir/._0.png": b"",
        "__MACOSX/dir/0.png": b"",
        "labels.csv": "file,box\n",
    }
    archive = write_zip(tmp_path / "set.zip", {**files, **noise})
    for name, content in files.items():
        write(tmp_path / "flat" / Path(name).name, content)
        write(tmp_path / "by_class" / Path(name).stem / "a.png", content)
    for source in (npz, archive, tmp_path / "flat", str(tmp_path / "by_class")):
        assert torch.equal(load_images(source, spec()), wanted)
    with pytest.raises(UsageError, match="no array named labels"):
        open_dataset(npz, spec())


def labels_of(
    source: Path | str, num_classes: int | None = 3, made_for: ModelSpec = MADE_FOR
) -> list[int] | None:
    images, labels = load_labelled_images(source, made_for, num_classes)
    assert torch.equal(images, load_images(source, made_for))
    assert labels is None or (labels.dtype == torch.int64 and len(labels) == len(images))
    return None if labels is None else labels.tolist()


def test_labels_of_arrays_where_they_are_known(tmp_path: Path) -> None:
    pixels = levels(3, 8, 8)

    def npz(**arrays: Any) -> Path:
        return write_npz(tmp_path / "set.npz", images=pixels, **arrays)

    assert labels_of(npz(labels=np.array([2, 0, 1], np.uint8))) == [2, 0, 1]
    assert labels_of(npz(labels=np.array([2, 0, 1])), None) is None  # no classifier
    assert labels_of(npz(labels=np.array([2, 0, 1])), 2) is None  # no class of the model
    for unknown in ([0, -1, 1], [0, 1], [0.0, 1.0, 2.0], [object()] * 3):
        assert labels_of(npz(labels=np.array(unknown))) is None
    assert labels_of(npz()) is None


@pytest.mark.parametrize(
    ("folders", "num_classes", "expected"),
    [
        (["cat", "dog", "eel"], 3, [0, 1, 2]),
        (["cat", "dog", "eel"], 4, None),  # one class has no folder: which?
        (["train", "val"], 2, None),
        (["8", "9", "10"], 3, None),  # sorted by name: 10, 8, 9
        (["part1", "."], 1, None),  # a picture beside the folders
        (["."], 1, None),
    ],
)
def test_labels_of_folders_where_they_are_known(
    tmp_path: Path, folders: list[str], num_classes: int, expected: list[int] | None
) -> None:
    for name in folders:
        write(tmp_path / name / "a.png", PICTURE)
    assert labels_of(tmp_path, num_classes) == expected


def test_labels_of_tables_where_they_are_known(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.png"):
        write(tmp_path / "dir" / name, PICTURE)
    table = tmp_path / "dir" / "labels.csv"
    for text, expected in (
        ("file,label\nsub/a.png,2\n./b.png,1\n", [1, 2]),
        ("file,label\nsub/a.png,2\n", None),
        ("file,box\n", None),
    ):
        table.write_text(text)
        assert labels_of(tmp_path / "dir") == expected
        files = {"labels.csv": text, "b.png": PICTURE, "sub/a.png": PICTURE}
        assert labels_of(write_zip(tmp_path / "set.zip", files)) == expected


def test_labels_of_made_images(tmp_path: Path) -> None:
    images = torch.randn(4, *MADE_FOR.input_size, generator=torch.Generator().manual_seed(0))
    write_images(tmp_path, images, MADE_FOR, torch.tensor([1, 0, 2, 2]))
    assert labels_of(tmp_path) == [1, 0, 2, 2] and labels_of(tmp_path, 2) is None
    write_images(tmp_path, images, MADE_FOR)
    assert labels_of(tmp_path) is None
    write_images(tmp_path, images, MADE_FOR, torch.tensor([1, 0, 2]))
    with pytest.raises(UsageError, match="its labels are torch.int64 of shape"):
        load_images(tmp_path, MADE_FOR)


def test_load_images_draws_from_the_whole_set(tmp_path: Path) -> None:
    pixels = np.repeat(np.arange(100, dtype=np.uint8), 64).reshape(100, 8, 8)
    path = write_npz(tmp_path / "set.npz", images=pixels)
    drawn = load_images(path, spec(channels=1, mean=(0.0,), std=(1.0,)), num_images=10)
    found = (drawn[:, 0, 0, 0] * 255).round().tolist()
    assert found == sorted(set(found)) and found[-1] > 50
    assert torch.equal(drawn, load_images(path, spec(channels=1, mean=(0.0,), std=(1.0,)), num_images=10))
    assert len(load_images(path, spec(), num_images=100)) == 100
    with pytest.raises(UsageError, match="101 images were asked for, but .* holds 100"):
        load_images(path, spec(), num_images=101)
    with pytest.raises(UsageError, match="Expected at least 1"):
        load_images(path, spec(), num_images=0)


# Other paths


@pytest.mark.parametrize(
    "name", ["missing/folder/deep", "./missing", "missing.npz", "a/missing.zip", "", "a b"]
)
def test_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = name if name else str(tmp_path / "missing")
    with pytest.raises(UsageError, match="does not exist. Expected a folder"):
        open_dataset(path, spec())


@pytest.mark.parametrize("name", ["set.tar", "picture.png", "set"])
def test_unknown_kind_of_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no set of images that zsq can read. Expected a folder"):
        open_dataset(write(tmp_path / name, b"x"), spec())


def test_labels_must_fit_the_model(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", images=levels(3, 8, 8), labels=np.array([4, 11, 5]))
    dataset = open_dataset(path, spec())
    check_labels(dataset, 12)
    with pytest.raises(UsageError, match="labels 4 to 11, but the model has 11 outputs.* 0 to 10"):
        check_labels(dataset, 11)


# Hugging Face datasets


class Rows:
    """What `load_dataset(name, split=...)` returns, as far as it is used."""

    def __init__(self, columns: dict[str, Sequence[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def feature(kind: str, **fields: Any) -> Any:
    return type(kind, (SimpleNamespace,), {})(**fields)


Hub = Callable[[dict[str, Rows]], list[tuple[str, str]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Puts a stub in place of the package `datasets`; the calls it receives are listed."""

    def install(splits: dict[str, Rows]) -> list[tuple[str, str]]:
        calls: list[tuple[str, str]] = []

        def load_dataset(name: str, *, split: str) -> Rows:
            calls.append((name, split))
            return splits[split]

        stub = ModuleType("datasets")
        monkeypatch.setattr(stub, "get_dataset_split_names", lambda name: list(splits), raising=False)
        monkeypatch.setattr(stub, "load_dataset", load_dataset, raising=False)
        monkeypatch.setitem(sys.modules, "datasets", stub)
        return calls

    return install


def rows(labels: Sequence[Any] = (1, 0, 1), seed: int = 0) -> Rows:
    pictures = [Image.fromarray(p) for p in levels(3, 8, 8, 3, seed=seed)]
    features = {
        "id": feature("Value"),
        "photo": feature("Image"),
        "kind": feature("ClassLabel", names=["a", "b", "c"]),
    }
    return Rows({"id": [7, 8, 9], "photo": pictures, "kind": labels}, features)


@pytest.mark.parametrize(
    ("name", "splits", "called"),
    [
        ("hf:user/name", ("train", "validation", "test"), ("user/name", "test")),
        ("user/name", ("train", "validation"), ("user/name", "validation")),
        ("hf:name@train", ("train", "test"), ("name", "train")),
        ("name@train", ("train", "test"), ("name", "train")),
    ],
)
def test_hugging_face(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    splits: tuple[str, ...],
    called: tuple[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = hub({split: rows(seed=k) for k, split in enumerate(splits)})
    dataset = open_dataset(name, spec())
    images, labels = whole(dataset)
    pixels = levels(3, 8, 8, 3, seed=splits.index(called[1]))
    assert calls == [called]
    assert torch.equal(images, torch.stack([normalised(p, spec()) for p in pixels]))
    assert labels.tolist() == [1, 0, 1]
    assert dataset.class_names == ("a", "b", "c") and dataset.num_classes == 3
    assert torch.equal(load_images(name, spec()), images)
    assert labels_of(name) == [1, 0, 1] and labels_of(name, 2) is None


def test_hugging_face_columns_by_their_usual_names(hub: Hub, tmp_path: Path) -> None:
    pixels = levels(2, 8, 8, 3)
    path = write(tmp_path / "b.png", encoded(pixels[1]))
    cells = [{"bytes": encoded(pixels[0]), "path": None}, {"bytes": None, "path": str(path)}]
    value, label = feature("Value"), feature("ClassLabel", names=["a", "b"])
    columns: dict[str, Sequence[Any]] = {"img": cells, "coarse_label": [1, 1], "fine_label": [0, 1]}
    hub({"test": Rows(columns, {"img": value, "coarse_label": label, "fine_label": label})})
    images, labels = whole(open_dataset("hf:name", spec()))
    assert torch.equal(images, torch.stack([normalised(p, spec()) for p in pixels]))
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("splits", "name", "message"),
    [
        ({"train": rows()}, "hf:name", "neither .*It has train; .*hf:name@train"),
        ({"test": rows()}, "hf:name@val", "no split 'val'. It has test"),
        ({"test": rows((-1, -1, -1))}, "hf:name", "label -1.*secret"),
        ({"test": rows((0, None, 1))}, "hf:name", "column kind .* holds None"),
        (
            {"test": Rows({}, {"text": feature("Value")})},
            "hf:name",
            "no column of type Image .*columns are text",
        ),
        (
            {"test": Rows({"a": []}, {"a": feature("Image"), "b": feature("Image")})},
            "hf:name",
            "more than one column of type Image",
        ),
    ],
)
def test_wrong_hugging_face_dataset(hub: Hub, splits: dict[str, Rows], name: str, message: str) -> None:
    hub(splits)
    with pytest.raises(UsageError, match=message):
        open_dataset(name, spec())


def test_hugging_face_cell_without_a_picture(hub: Hub) -> None:
    columns: dict[str, Sequence[Any]] = {"image": [None], "label": [0]}
    hub({"test": Rows(columns, {"image": feature("Image"), "label": feature("Value")})})
    with pytest.raises(UsageError, match="holds a NoneType"):
        whole(open_dataset("hf:name", spec()))


def test_hugging_face_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> list[str]:
        raise ConnectionError("the hub cannot be reached\nin two lines")

    hub({})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["datasets"], "get_dataset_split_names", offline)
    with pytest.raises(UsageError, match="name could not be loaded .*cannot be reached.*network") as caught:
        open_dataset("hf:user/name", spec())
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UsageError, match="user/name does not exist; taken as a Hugging Face dataset: .*could not"
    ):
        open_dataset("user/name", spec())


@pytest.mark.parametrize("name", ["hf:user/name", "user/name"])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'zsq\[hf\]'"):
        open_dataset(name, spec())
