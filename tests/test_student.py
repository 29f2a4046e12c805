"""The quantized model as a file: its size, its bits, and what is refused."""

import functools
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import ChannelsLast, Residual, Summing, Tokens, attached, images
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tiny_networks import message
from torch import Tensor, fx, nn

from zsq.graph.capture import capture
from zsq.quant.attach import attach
from zsq.quant.calibrate import calibrate
from zsq.quant.scheme import parse_bits
from zsq.recipe import Calibration
from zsq.student import stored_bytes, student_from_file, student_to_bytes


def calibrated(kind: type[nn.Module], bits: str, ends: str = "8bit") -> fx.GraphModule:
    _, student, _, _ = attached(kind, bits, ends=ends)
    calibrate(student, [images(16)], Calibration())
    return student


def bits_of(x: Tensor) -> Tensor:
    return x.detach().view(torch.int32)


# ---- round trip (section (f), test 19) and sizes


@pytest.mark.parametrize("bits", ["W2A2", "W3A3", "W4A4", "W8A8", "W4", "W3A5"])
@pytest.mark.parametrize("kind", [Residual, Summing, Tokens, ChannelsLast])
def test_the_file_gives_the_same_logits_bit_for_bit(kind: type[nn.Module], bits: str, tmp_path: Path) -> None:
    student = calibrated(kind, bits)
    path = tmp_path / "student.safetensors"
    content = student_to_bytes(student)
    path.write_bytes(content)
    again = student_from_file(path)
    for count in (1, 5):
        x = images(count, seed=1)
        assert torch.equal(bits_of(student(x)), bits_of(again(x)))
    assert student_to_bytes(again) == content  # everything is in the file
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert {n: type(m) for n, m in student.named_modules() if "quantizer" in n} == {
        n: type(m) for n, m in again.named_modules() if "quantizer" in n
    }
    assert torch.equal(student(images(2)), calibrated(kind, bits)(images(2)))  # saving changed nothing


class Wide(nn.Module):
    """Mostly weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.flatten(1))
        return y


@functools.cache
def wide() -> fx.GraphModule:
    return capture(Wide().requires_grad_(False), (1, 16, 16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_take_their_true_width(bits: int) -> None:
    student, _ = attach(wide(), parse_bits(f"W{bits}", ends="same"))
    content = student_to_bytes(student)
    weights = 256 * 512 + 512 * 256 + 256 * 6
    sizes = stored_bytes(student)
    assert sizes["codes"] == weights * bits // 8
    assert sum(sizes.values()) == len(content)
    assert len(content) / (4 * weights) == pytest.approx(bits / 32, rel=0.2)  # W4: about an eighth
    channels = 512 + 256 + 6
    assert sizes["quantizers"] == channels * (4 + 1)  # a float scale and a byte of zero point each
    assert sizes["float"] == channels * 4  # biases
    assert {name for name in load_safetensors(content) if name.endswith(".weight")} == set()


# ---- what is refused


def header(content: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", content[:8])
    found: dict[str, Any] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["zsq"])
    return found


@functools.cache
def good() -> bytes:
    return student_to_bytes(calibrated(Residual, "W4A4"))


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    text = message(lambda: student_from_file(path))
    assert str(path) in text
    return text


def with_metadata(change: Any, tensors: dict[str, Tensor] | None = None) -> bytes:
    """A good file with other metadata (and perhaps more tensors)."""
    metadata: Any = header(good())
    metadata = change(metadata) or metadata
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return save_safetensors({**load_safetensors(good()), **(tensors or {})}, {"zsq": text})


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    assert "cannot be read" in message(lambda: student_from_file(tmp_path / "none.safetensors"))
    assert "cannot be read" in message(lambda: student_from_file(tmp_path))
    path = tmp_path / "student.safetensors"
    foreign = "not a quantized model that zsq wrote"
    assert foreign in refused(path, b"")
    assert foreign in refused(path, b"PK\x03\x04" + bytes(1000))
    assert foreign in refused(path, os.urandom(4096))
    assert foreign in refused(path, save_safetensors({"weight": torch.zeros(3)}))
    assert foreign in refused(path, save_safetensors({"weight": torch.zeros(3)}, {"other": "x"}))
    assert foreign in refused(path, struct.pack("<Q", 2**62) + good()[8:])
    assert foreign in refused(path, struct.pack("<Q", 5) + good()[8:])


def test_truncated_files(tmp_path: Path) -> None:
    for size in (1, 7, 8, 9, 100, len(good()) // 2, len(good()) - 1):
        assert "damaged" in refused(tmp_path / "student.safetensors", good()[:size])
    assert "damaged" in refused(tmp_path / "student.safetensors", good() + b"\0")


def test_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    assert "has format 2; this version of zsq reads format 1" in refused(
        path, with_metadata(lambda m: m.update(format=2))
    )
    assert "has format None" in refused(path, with_metadata(lambda m: m.pop("format") and None))


def set_first(metadata: dict[str, Any], which: str, **values: Any) -> None:
    next(q for q in metadata["quantizers"].values() if q["kind"] == which).update(values)


DAMAGE: dict[str, Any] = {
    "no JSON": lambda m: "{",
    "a list": lambda m: "[1, 2]",
    "a number": lambda m: "3",
    "deep": lambda m: "[" * 100_000,
    "no graph": lambda m: m.pop("graph") and None,
    "no quantizers": lambda m: m.pop("quantizers") and None,
    "quantizers are a list": lambda m: m.update(quantizers=[]),
    "quantizers are null": lambda m: m.update(quantizers=None),
    "tensors are a list": lambda m: m.update(tensors=["x"]),
    "graph is a number": lambda m: m.update(graph=3),
    "graph is empty": lambda m: m.update(graph=[]),
    "graph of numbers": lambda m: m.update(graph=[1]),
    "graph of lists": lambda m: m.update(graph=[[]]),
    "unknown node": lambda m: m["graph"][2].update(op="call_method"),
    "kwargs are a list": lambda m: m["graph"][2].update(kwargs=[1]),
    "target is a number": lambda m: m["graph"][2].update(target=4),
    "reads a later node": lambda m: m["graph"][0].update(args=[{"node": "nowhere"}]),
    "no output": lambda m: m["graph"].pop() and None,
    "missing module": lambda m: m["quantizers"].pop(next(iter(m["quantizers"]))) and None,
    "missing tensor": lambda m: m["tensors"].pop(next(iter(m["tensors"]))) and None,
    "unknown tensor": lambda m: m["tensors"].update(more="buffer"),
    "weights of 9 bits": lambda m: set_first(m, "weight", bits=9),
    "weights of 5 bits": lambda m: set_first(m, "weight", bits=5),
    "bits of text": lambda m: set_first(m, "weight", bits="8"),
    "activations of 64 bits": lambda m: set_first(m, "activation", bits=64),
    "huge shape": lambda m: set_first(m, "weight", shape=[2**40, 2**40]),
    "negative shape": lambda m: set_first(m, "weight", shape=[-6, -27]),
    "other axis": lambda m: m["quantizers"]["stem.conv.weight_quantizer"].update(axis=1),
    "no axis": lambda m: set_first(m, "weight", axis=9),
    "no such kind": lambda m: set_first(m, "weight", kind="activation"),
    "empty name": lambda m: m["quantizers"].update({"": next(iter(m["quantizers"].values()))}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_metadata(name: str, tmp_path: Path) -> None:
    text = refused(tmp_path / "student.safetensors", with_metadata(DAMAGE[name]))
    assert "damaged" in text or "zsq wrote" in text


# ---- hostile files: a name must not become code


PROOF = "proof"


def executes(path: str) -> str:
    """An expression without dots and line breaks that creates a file."""
    return f"open({path!r}, 'w')"


def rename(metadata: dict[str, Any], op: str, target: str) -> None:
    node = next(n for n in metadata["graph"] if n["op"] == op)
    node["target"] = target


@pytest.mark.parametrize(
    "attack", ["placeholder", "keyword", "tensor", "module", "from_file", "save", "node", "device", "python"]
)
def test_nothing_that_a_file_brings_is_executed(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = executes(PROOF)
    inside = f'a", {code}) or getattr(self, "training'
    tensors: dict[str, Tensor] = {}

    def change(m: dict[str, Any]) -> None:
        graph = m["graph"]
        call = next(n for n in graph if n["op"] == "call_function" and n["target"].startswith("aten.conv2d"))
        if attack == "placeholder":
            rename(m, "placeholder", f"x={code}")
        elif attack == "keyword":
            call["kwargs"][f"bias={code}, stride"] = 1
        elif attack == "tensor":
            tensors[inside] = torch.zeros(1)
            m["tensors"][inside] = "buffer"
            rename(m, "get_attr", inside)
        elif attack == "module":
            m["quantizers"][inside] = {"kind": "activation", "bits": 4}
            tensors.update({f"{inside}.scale": torch.ones(()), f"{inside}.zero_point": torch.zeros(())})
            rename(m, "call_module", inside)
        elif attack == "from_file":
            call.update(target="aten.from_file.default", args=[PROOF, True, 16], kwargs={})
        elif attack == "save":
            call.update(target="aten.save.default", args=[call["args"][0], PROOF], kwargs={})
        elif attack == "node":
            graph[0]["name"] = f"x\n{code}"
        elif attack == "device":
            call["kwargs"]["device"] = {"dtype": "hub"}
        else:
            call["target"] = "builtins.open"

    content = with_metadata(change, tensors)
    path = tmp_path / "student.safetensors"
    refused(path, with_metadata(change, tensors))
    assert content and not (tmp_path / PROOF).exists()


def test_names_with_dashes_are_fine(tmp_path: Path) -> None:
    class Dashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"conv-1": nn.Conv2d(3, 4, 3), "2": nn.Conv2d(4, 4, 3)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers["2"](self.layers["conv-1"](x)).mean((2, 3))
            return y

    student, _ = attach(capture(Dashed().requires_grad_(False), (3, 8, 8)), parse_bits("W4"))
    path = tmp_path / "student.safetensors"
    path.write_bytes(student_to_bytes(student))
    assert torch.equal(student_from_file(path)(images(2)), student(images(2)))
