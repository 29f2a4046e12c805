"""Malformed images and data: exit code 2, one paragraph, nothing written, nothing executed."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import MARKER, Case, Maker, Payload, cases, check, cut, write, zip_of
from PIL import Image
from safetensors.torch import save_file


def with_sizes(name: str, make: Maker, member: str, size: int) -> Maker:
    """The zip of another maker whose directory declares another unpacked size of a member."""

    def change(folder: Path) -> None:
        make(folder)
        content = bytearray((folder / name).read_bytes())
        at = content.rindex(b"PK\x01\x02", 0, content.rindex(member.encode()))
        content[at + 24 : at + 28] = struct.pack("<I", size)
        (folder / name).write_bytes(bytes(content))

    return change


def arrays(**found: Any) -> Maker:
    return lambda folder: np.savez(folder / "bad.npz", **found)


def array_file(text: str, data: bytes = b"") -> bytes:
    """An .npy of a header as it is."""
    content = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content + data


def npz_header(text: str, data: bytes = b"") -> Maker:
    return zip_of("bad.npz", {"images.npy": array_file(text, data)})


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def wide_png(width: int, height: int) -> bytes:
    """A picture whose head declares a size."""
    content = bytearray(picture())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def tree(**files: bytes) -> Maker:
    """Files of a folder `set`; __ in a name stands for a slash."""

    def make(folder: Path) -> None:
        (folder / "set").mkdir()
        for name, content in files.items():
            write("set/" + name.replace("__", "/").replace("_png", ".png").replace("_csv", ".csv"), content)(
                folder
            )

    return make


def labels(*rows: str, head: str = "file,label") -> bytes:
    return "\n".join((head, *rows)).encode()


def made(metadata: object = None, images: torch.Tensor | None = None, name: str = "images") -> Maker:
    """A folder `set` of images as zsq writes them, with other metadata or images."""

    def make(folder: Path) -> None:
        (folder / "set").mkdir()
        tensors = {name: torch.zeros(4, 3, 8, 8) if images is None else images}
        about = (
            None
            if metadata is None
            else {"spec": metadata if isinstance(metadata, str) else json.dumps(metadata)}
        )
        save_file(tensors, folder / "set/images.safetensors", about)

    return make


def bomb(folder: Path) -> None:
    """300 megabytes of zeros in a small file."""
    with zipfile.ZipFile(folder / "bad.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as file:
            file.write(array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (4800, 256, 256, 1), }"))
            for _ in range(300):
                file.write(bytes(2**20))


def listed(*rows: str, head: str = "file,label", **files: bytes) -> dict[str, bytes]:
    return {"labels.csv": labels(*rows, head=head), "a.png": picture(), **files}


U8 = np.zeros((4, 8, 8, 3), np.uint8)
ANY = np.arange(4)
NPZ, ZIP, FOLDER = "evaluate run --data bad.npz", "evaluate run --data bad.zip", "evaluate run --data set"
GIVEN = "quantize @ --recipe given --images "
DATA = cases(
    ("data that is not there", "evaluate run --data none.npz", "none.npz"),
    ("data of an unknown kind", "evaluate run --data nets.py", "nets.py"),
    ("data of 5000 letters", "evaluate run --data " + "d" * 5000, "ddd"),
    ("data that links to itself", NPZ, "bad.npz", lambda f: (f / "bad.npz").symlink_to("bad.npz")),
    ("a dataset without a name", "evaluate run --data hf:", "hf:"),
    ("a dataset that is a path", "evaluate run --data hf:../../run", "hf:../../run"),
    ("a run as data", "evaluate run --data run", "run"),
    ("images that are not there", GIVEN + "none.zip", "none.zip"),
    ("images of an unknown kind", GIVEN + "weights.pt", "weights.pt"),
    ("more images than there are", "quantize @ --images labelled.npz --set synthesis.num_images=0.5", "0.5"),
    *(
        (f"npz {name}", call, says, make)
        for name, call, says, make in (
            ("without labels", NPZ, "labels", arrays(images=U8)),
            ("without images", NPZ, "images", arrays(labels=ANY)),
            ("of floats", NPZ, "float64", arrays(images=U8 / 255, labels=ANY)),
            ("of 16 bits", NPZ, "uint16", arrays(images=U8.astype(np.uint16), labels=ANY)),
            ("with channels first", NPZ, "(4, 3, 8, 8)", arrays(images=U8.transpose(0, 3, 1, 2), labels=ANY)),
            ("of one image", NPZ, "(8, 3)", arrays(images=U8[0, 0], labels=ANY)),
            ("of images without pixels", NPZ, "(4, 0, 8, 3)", arrays(images=U8[:, :0], labels=ANY)),
            ("of no images", NPZ, "no images", arrays(images=U8[:0], labels=ANY[:0])),
            ("of too few labels", NPZ, "3 labels", arrays(images=U8, labels=ANY[:3])),
            ("of labels in floats", NPZ, "float64", arrays(images=U8, labels=ANY / 2)),
            ("of labels in rows", NPZ, "(2, 2)", arrays(images=U8, labels=ANY.reshape(2, 2))),
            ("of labels below zero", NPZ, "-1", arrays(images=U8, labels=ANY - 1)),
            ("of labels beyond the classes", NPZ, "labels 3 to 6", arrays(images=U8, labels=ANY + 3)),
            (
                "of labels beyond all numbers",
                NPZ,
                "labels",
                arrays(images=U8, labels=np.full(4, 2**64 - 1, np.uint64)),
            ),
            ("of objects", NPZ, "bad.npz", arrays(images=np.array([Payload()], object), labels=ANY)),
            (
                "of labels with a payload",
                NPZ,
                "bad.npz",
                arrays(images=U8, labels=np.array([Payload()] * 4, object)),
            ),
            (
                "that is a single array",
                NPZ,
                "single array",
                lambda f: (f / "bad.npz").write_bytes(
                    array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }", b"ab")
                ),
            ),
            ("that is a pickle", NPZ, "bad.npz", write("bad.npz", pickle.dumps(Payload()))),
            ("that is empty", NPZ, "bad.npz", write("bad.npz", b"")),
            ("that is a text", NPZ, "bad.npz", write("bad.npz", "images")),
            ("that is cut", NPZ, "bad.npz", cut("labelled.npz", "bad.npz", 0.6)),
            (
                "that executes its head",
                GIVEN + "bad.npz",
                "bad.npz",
                npz_header(f"__import__('os').system('touch {MARKER}')"),
            ),
            ("of a head that is no dictionary", GIVEN + "bad.npz", "bad.npz", npz_header("[1, 2]")),
            (
                "of a shape beyond the file",
                GIVEN + "bad.npz",
                "bad.npz",
                npz_header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 8, 8, 3), }", b"abc"),
            ),
            (
                "of a shape beyond all memory",
                GIVEN + "bad.npz",
                "bad.npz",
                npz_header(
                    "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999, 8, 8, 3), }", b"abc"
                ),
            ),
            (
                "of a shape below zero",
                GIVEN + "bad.npz",
                "bad.npz",
                npz_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3), }", b"abc"),
            ),
            (
                "of a shape beyond all numbers",
                GIVEN + "bad.npz",
                "bad.npz",
                npz_header(
                    "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 40 + ",), }", b"abc"
                ),
            ),
            (
                "of an unknown type",
                GIVEN + "bad.npz",
                "bad.npz",
                npz_header("{'descr': 'bad', 'fortran_order': False, 'shape': (2,), }", b"ab"),
            ),
            (
                "of a head beyond the file",
                GIVEN + "bad.npz",
                "bad.npz",
                zip_of("bad.npz", {"images.npy": b"\x93NUMPY\x01\x00\xff\xff{"}),
            ),
            ("that unpacks to 300 megabytes", GIVEN + "bad.npz", "bad.npz", bomb),
            (
                "that declares four gigabytes",
                GIVEN + "bad.npz",
                "bad.npz",
                with_sizes("bad.npz", arrays(images=U8), "images.npy", 2**32 - 2),
            ),
        )
    ),
    *(
        (f"zip {name}", call, says, make)
        for name, call, says, make in (
            ("that is empty", ZIP, "bad.zip", write("bad.zip", b"")),
            ("that is a text", ZIP, "bad.zip", write("bad.zip", "a.png,3")),
            (
                "that is cut",
                ZIP,
                "bad.zip",
                lambda f: (zip_of("all.zip", listed("a.png,0"))(f), cut("all.zip", "bad.zip", 0.7)(f)),
            ),
            ("of nothing", ZIP, "labels.csv", zip_of("bad.zip", {})),
            ("without labels", ZIP, "labels.csv", zip_of("bad.zip", {"a.png": picture()})),
            ("of no rows", ZIP, "no images", zip_of("bad.zip", listed())),
            ("of other columns", ZIP, "name, class", zip_of("bad.zip", listed("a.png,0", head="name,class"))),
            ("of labels in words", ZIP, "cat", zip_of("bad.zip", listed("a.png,cat"))),
            ("of labels below zero", ZIP, "-1", zip_of("bad.zip", listed("a.png,-1"))),
            ("of labels beyond the classes", ZIP, "labels 6 to 6", zip_of("bad.zip", listed("a.png,6"))),
            ("of a row without a label", ZIP, "Line 2", zip_of("bad.zip", listed("a.png"))),
            ("of a picture twice", ZIP, "again", zip_of("bad.zip", listed("a.png,0", "a.png,1"))),
            ("of a picture that is not there", ZIP, "b.png", zip_of("bad.zip", listed("b.png,0"))),
            (
                "of labels in other letters",
                ZIP,
                "labels.csv",
                zip_of("bad.zip", {"labels.csv": b"\xff\xfe\x00f", "a.png": b""}),
            ),
            (
                "of a label of many letters",
                ZIP,
                "labels.csv",
                zip_of("bad.zip", listed("a.png," + "9" * 200_000)),
            ),
            (
                "of two tables",
                ZIP,
                "more than one",
                zip_of("bad.zip", {"a/labels.csv": labels(), "b/labels.csv": labels()}),
            ),
            ("that points above itself", ZIP, "../weights.pt", zip_of("bad.zip", listed("../weights.pt,0"))),
            ("that points to the root", ZIP, "/etc/passwd", zip_of("bad.zip", listed("/etc/passwd,0"))),
            (
                "of a picture that is none",
                ZIP,
                "a.png",
                zip_of("bad.zip", {**listed("a.png,0"), "a.png": b"not a picture"}),
            ),
            (
                "of a picture that is cut",
                ZIP,
                "a.png",
                zip_of("bad.zip", {**listed("a.png,0"), "a.png": picture()[:40]}),
            ),
            (
                "of a picture with 10^10 pixels",
                ZIP,
                "a.png",
                zip_of("bad.zip", {**listed("a.png,0"), "a.png": wide_png(100_000, 100_000)}),
            ),
            (
                "of a picture of PostScript",
                ZIP,
                "a.png",
                zip_of(
                    "bad.zip",
                    {**listed("a.png,0"), "a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"},
                ),
            ),
            (
                "of a picture in 32 bits",
                ZIP,
                "a.png",
                zip_of("bad.zip", {**listed("a.png,0"), "a.png": picture("TIFF", "F")}),
            ),
            (
                "that declares four gigabytes",
                ZIP,
                "4294967294",
                with_sizes("bad.zip", zip_of("bad.zip", listed("a.png,0")), "a.png", 2**32 - 2),
            ),
            (
                "whose table declares a gigabyte",
                ZIP,
                "1073741824",
                with_sizes("bad.zip", zip_of("bad.zip", listed("a.png,0")), "labels.csv", 2**30),
            ),
            (
                "of images without pictures",
                GIVEN + "bad.zip",
                "no images",
                zip_of("bad.zip", {"a.txt": b"a"}),
            ),
            (
                "of images, one broken",
                GIVEN + "bad.zip",
                "b.png",
                zip_of("bad.zip", {"a.png": picture(), "b.png": b"?"}),
            ),
        )
    ),
    *(
        (f"folder {name}", call, says, make)
        for name, call, says, make in (
            ("of nothing", FOLDER, "set", tree()),
            ("of loose pictures", FOLDER, "sub-folders", tree(a_png=picture())),
            ("of empty classes", FOLDER, "no images", tree(cat__a=b"", dog__b=b"")),
            ("of splits", FOLDER, "train", tree(train__a_png=picture(), test__a_png=picture())),
            ("of a broken picture", FOLDER, "a.png", tree(cat__a_png=b"?")),
            (
                "of too many classes",
                FOLDER,
                "labels 0 to 6",
                tree(**{f"c{k}__a_png": picture() for k in range(7)}),
            ),
            (
                "whose table points above",
                FOLDER,
                "../weights.pt",
                tree(labels_csv=labels("../weights.pt,0"), a_png=picture()),
            ),
            ("whose table is a picture", FOLDER, "labels.csv", tree(labels_csv=picture(), a_png=picture())),
            ("of no pictures", GIVEN + "set", "no images", tree(a=b"")),
            (
                "whose picture is a folder",
                GIVEN + "set",
                "no images",
                lambda f: (f / "set/a.png/b").mkdir(parents=True),
            ),
            (
                "whose picture is a link to nothing",
                GIVEN + "set",
                "a.png",
                lambda f: (
                    tree(b_png=picture())(f),
                    (f / "set/c").mkdir(),
                    (f / "set/c/a.png").symlink_to("gone"),
                ),
            ),
        )
    ),
    *(
        (f"made images {name}", GIVEN + "set", says, make)
        for name, says, make in (
            ("under another name", "images.safetensors", made(name="pictures")),
            ("of another size", "(3, 9, 9)", made(images=torch.zeros(2, 3, 9, 9))),
            ("of two dimensions", "images.safetensors", made(images=torch.zeros(2, 3))),
            ("in integers", "images.safetensors", made(images=torch.zeros(2, 3, 8, 8, dtype=torch.int64))),
            ("of none", "no images", made(images=torch.zeros(0, 3, 8, 8))),
            ("of nan", "NaN", made(images=torch.full((2, 3, 8, 8), float("nan")))),
            ("that say nothing in JSON", "images.safetensors", made("{")),
            ("that say a list", "images.safetensors", made("[1]")),
            ("whose mean is a text", "images.safetensors", made({"mean": "dark"})),
            ("of two means", "images.safetensors", made({"mean": [0.5, 0.5], "std": [1, 1]})),
            ("whose std is null", "images.safetensors", made({"std": None})),
            ("whose mean is infinite", "1e+39", made({"mean": [1e39, 0, 0]})),
            (
                "that are cut",
                "images.safetensors",
                lambda f: (made()(f), cut("set/images.safetensors", "set/images.safetensors", 0.5)(f)),
            ),
        )
    ),
)


@pytest.mark.parametrize("case", DATA)
def test_images(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["labelled.npz", "set"])
def test_unreadable(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is unreadable for root")

    def make(folder: Path) -> None:
        if name == "set":
            tree(cat__a_png=picture())(folder)
        (folder / name).chmod(0)

    check(Case("unreadable", f"evaluate run --data {name}", name, make), place, tmp_path, monkeypatch)
