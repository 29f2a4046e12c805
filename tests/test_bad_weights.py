"""Malformed weights: exit code 2, one paragraph, nothing written, nothing executed."""

import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Case, Maker, Payload, cases, check, cut, write, zip_of
from safetensors.torch import load_file, save_file


def header(text: str | bytes, size: int | None = None, data: bytes = b"") -> Maker:
    """A safetensors file of a header as it is, with a length of its own."""
    content = text.encode() if isinstance(text, str) else text
    length = struct.pack("<Q", len(content) if size is None else size)
    return write("bad.safetensors", length + content + data)


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def changed(suffix: str, change: Callable[[dict[str, Any]], Any]) -> Maker:
    """The network's own weights, changed, as bad.safetensors or bad.pt."""

    def make(folder: Path) -> None:
        tensors: dict[str, Any] = load_file(folder / "weights.safetensors")
        found = change(tensors)
        found = tensors if found is None else found
        if suffix == ".safetensors":
            save_file(found, folder / "bad.safetensors")
        else:
            torch.save(found, folder / f"bad{suffix}")

    return make


def pickled(protocol: int) -> Maker:
    return write("bad.pt", pickle.dumps({"conv1.weight": Payload()}, protocol=protocol))


def put(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def replaced(key: str, value: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[key] = value(tensors[key])

    return change


def endless(tensors: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that holds itself."""
    tensors["model"] = tensors
    return tensors


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what some checkpoints hold
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def program(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what some checkpoints are
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "bad.pt")  # type: ignore[no-untyped-call]


PLAIN = "quantize @ --weights "
SAFE, TORCH = PLAIN + "bad.safetensors", PLAIN + "bad.pt"
WEIGHTS = cases(
    ("that are not there", PLAIN + "none.pt", "none.pt"),
    ("that are a folder", PLAIN + "run", "run"),
    ("below a file", PLAIN + "nets.py/w.pt", "nets.py/w.pt"),
    ("of an unknown kind", PLAIN + "nets.py", ".py"),
    ("without an ending", PLAIN + "weights", "weights", write("weights", "x")),
    ("of 5000 letters", PLAIN + "w" * 5000 + ".pt", "www"),
    ("of an unknown user", PLAIN + "'~nobody-of-this-name/w.pt'", "~nobody-of-this-name"),
    ("that link to nothing", PLAIN + "bad.pt", "gone.pt", lambda f: (f / "bad.pt").symlink_to("gone.pt")),
    ("that link to themselves", PLAIN + "bad.pt", "bad.pt", lambda f: (f / "bad.pt").symlink_to("bad.pt")),
    ("that are a pipe", PLAIN + "bad.pt", "bad.pt", lambda f: os.mkfifo(f / "bad.pt")),
    *(
        (f"safetensors: {name}", SAFE, "bad.safetensors", make)
        for name, make in (
            ("empty", write("bad.safetensors", b"")),
            ("7 bytes", write("bad.safetensors", b"\x01" * 7)),
            ("a header of no length", header(b"", 0)),
            ("a header beyond the file", header(tensor(), 10_000)),
            ("a header of 100 MB", header(tensor(), 100_000_000)),
            ("a header of 2^63", header(tensor(), 2**63)),
            ("a header of 2^64-1", header(tensor(), 2**64 - 1)),
            ("a header that is cut", header(tensor(), 20)),
            ("a header that is no JSON", header("{'a': 1}")),
            ("a header that is a list", header("[1, 2]")),
            ("a header of other letters", header(b"\xff\xfe" * 10)),
            ("a header in 20000 brackets", header("[" * 20_000)),
            ("an unknown type", header(tensor("F99"), data=bytes(8))),
            ("a shape below zero", header(tensor(shape=[-2]), data=bytes(8))),
            ("a shape of words", header(tensor(shape=["two"]), data=bytes(8))),
            ("a shape beyond all numbers", header(tensor(shape=[2**63, 2**63]), data=bytes(8))),
            ("a shape that its bytes do not fill", header(tensor(shape=[3]), data=bytes(8))),
            ("bytes beyond the file", header(tensor(offsets=[0, 8]), data=bytes(4))),
            ("bytes that end before they begin", header(tensor(offsets=[8, 0]), data=bytes(8))),
            ("bytes after the last tensor", header(tensor(), data=bytes(100))),
            ("no bytes' place", header('{"a": {"dtype": "F32", "shape": [2]}}', data=bytes(8))),
            ("another kind of file", write("bad.safetensors", b"\x89PNG\r\n\x1a\n" + bytes(100))),
            ("no tensors", header("{}")),
            *(
                (f"cut after {size:g}", cut("weights.safetensors", "bad.safetensors", size))
                for size in (8, 0.2, 0.5, 0.99)
            ),
        )
    ),
    *(
        (f"weights {name}", PLAIN + f"bad{suffix}", says, changed(suffix, change))
        for suffix in (".safetensors", ".pt")
        for name, says, change in (
            (f"with nan in {suffix}", "conv1.weight", put("conv1.weight", "", float("nan"))),
            (f"with infinity in {suffix}", "bn2.running_var", put("bn2.running_var", "", float("inf"))),
            (
                f"in integers in {suffix}",
                "conv1.weight",
                replaced("conv1.weight", lambda t: t.to(torch.int8)),
            ),
            (
                f"complex in {suffix}",
                "conv2.weight",
                replaced("conv2.weight", lambda t: t.to(torch.complex64)),
            ),
            (
                f"one too few in {suffix}",
                "linear.bias",
                lambda t: {k: v for k, v in t.items() if k != "linear.bias"},
            ),
            (f"one too many in {suffix}", "extra", lambda t: t.update(extra=torch.ones(2))),
            (
                f"of another shape in {suffix}",
                "linear.weight",
                replaced("linear.weight", lambda t: t[:5].clone()),
            ),
            (f"of another network in {suffix}", "conv1.weight", lambda t: {"fc.weight": torch.ones(2, 2)}),
            (f"of negative variance in {suffix}", "NaN", replaced("bn1.running_var", lambda t: t - 9)),
        )
    ),
    *(
        (f"torch: {name}", TORCH, says, make)
        for name, says, make in (
            ("empty", "bad.pt", write("bad.pt", b"")),
            ("a text", "bad.pt", write("bad.pt", "conv1.weight = 3")),
            ("another kind of file", "bad.pt", write("bad.pt", b"\x89PNG\r\n\x1a\n" + bytes(100))),
            ("another zip", "bad.pt", zip_of("bad.pt", {"a.txt": b"a"})),
            ("an empty zip", "bad.pt", zip_of("bad.pt", {})),
            ("a list", "list", changed(".pt", lambda t: list(t.values()))),
            ("a tensor", "Tensor", changed(".pt", lambda t: t["conv1.weight"])),
            ("a number", "int", changed(".pt", lambda t: 3)),
            ("nothing in it", "no tensors", changed(".pt", lambda t: {"model": {}})),
            ("numbers by name", "epoch", changed(".pt", lambda t: {"epoch": 3})),
            ("tensors without names", "no tensors", changed(".pt", lambda t: dict(enumerate(t.values())))),
            ("itself", "bad.pt", changed(".pt", endless)),
            (
                "sparse weights",
                "linear.weight",
                changed(".pt", replaced("linear.weight", lambda t: t.to_sparse())),
            ),
            (
                "weights without data",
                "linear.weight",
                changed(".pt", replaced("linear.weight", lambda t: t.to("meta"))),
            ),
            (
                "quantized weights",
                "linear.weight",
                changed(".pt", replaced("linear.weight", quantized)),
            ),
            ("a program", "TorchScript", program),
            ("a whole network", "pickled objects", changed(".pt", lambda t: torch.nn.Linear(2, 2))),
            ("a payload in a checkpoint", "pickled objects", changed(".pt", lambda t: {**t, "x": Payload()})),
            *((f"a payload, protocol {number}", "bad.pt", pickled(number)) for number in (0, 2, 4)),
            (
                "a payload in a zip",
                "pickled objects",
                zip_of(
                    "bad.pt",
                    {"bad/data.pkl": pickle.dumps(Payload(), protocol=2), "bad/version": b"3\n"},
                    zipfile.ZIP_STORED,
                ),
            ),
            (
                "a payload in a tar",
                "bad.pt",
                write("bad.pt", b"pickle" + b"\0" * 506 + pickle.dumps(Payload())),
            ),
            *(
                (f"cut after {size:g}", "bad.pt", cut("weights.pt", "bad.pt", size))
                for size in (2, 0.2, 0.5, 0.99)
            ),
        )
    ),
)


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_unreadable(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing is unreadable for root")

    def make(folder: Path) -> None:
        (folder / name).chmod(0)

    check(Case("unreadable", f"quantize @ --weights {name}", name, make), place, tmp_path, monkeypatch)
