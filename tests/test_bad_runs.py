"""Damaged run folders and exports, wrong places to write: exit code 2, one paragraph, no change."""

import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Case, cases, check, run_command, write
from safetensors.torch import load_file, save_file

Maker = Callable[[Path], object]
Json = dict[str, Any]


# ---- its other files


def student(change: Callable[[Json, dict[str, torch.Tensor]], object]) -> Maker:
    """student.safetensors with changed metadata or tensors."""

    def make(folder: Path) -> None:
        path = folder / "run/student.safetensors"
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["zsq"])
        tensors = load_file(path)
        change(about, tensors)
        save_file(tensors, path, {"zsq": json.dumps(about)})

    return make


def node(op: str, key: str, value: Any) -> Callable[[Json, dict[str, torch.Tensor]], None]:
    """Another value in the first node of an operation."""

    def change(about: Json, tensors: dict[str, torch.Tensor]) -> None:
        next(n for n in about["graph"] if n["op"] == op)[key] = value

    return change


def quantizer(key: str, value: Any) -> Callable[[Json, dict[str, torch.Tensor]], None]:
    def change(about: Json, tensors: dict[str, torch.Tensor]) -> None:
        next(q for q in about["quantizers"].values() if q["kind"] == "weight")[key] = value

    return change


def first(
    ending: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Json, dict[str, torch.Tensor]], None]:
    def apply(about: Json, tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = change(tensors[name]).clone()

    return apply


def shorter(name: str, size: float) -> Maker:
    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(size * len(content))])

    return make


def removed(name: str) -> Maker:
    return lambda folder: (folder / name).unlink()


def exported(folder: Path, kind: str, name: str) -> None:
    """An export of the run as it should be."""
    assert run_command(["export", "run", "--to", kind, "--out", name])[0] == 0


def account(folder: Path, kind: str, **changes: Any) -> None:
    """An export whose account says something else."""
    name = "bad.onnx" if kind == "onnx" else "bad.xml"
    exported(folder, kind, name)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def images(tensors: dict[str, torch.Tensor]) -> Maker:
    return lambda folder: save_file(tensors, folder / "run/images.safetensors")


EVALUATE, REPORT = "evaluate run --data labelled.npz", "report run"
FILE = "student.safetensors"
FILES = cases(
    *(
        (f"a student {name}", (EVALUATE, REPORT, "export run", "push run")[k % 4], FILE, make)
        for k, (name, make) in enumerate(
            (
                ("that is not there", removed(f"run/{FILE}")),
                ("that is empty", write(f"run/{FILE}", b"")),
                ("that is cut", shorter(f"run/{FILE}", 0.7)),
                ("that is a text", write(f"run/{FILE}", "codes")),
                ("of a header of 2^63", write(f"run/{FILE}", struct.pack("<Q", 2**63) + b"{}")),
                ("that are weights", lambda f: shutil.copy(f / "weights.safetensors", f / "run" / FILE)),
                ("of format 9", student(lambda about, _: about.update(format=9))),
                ("without a graph", student(lambda about, _: about.pop("graph"))),
                ("without quantizers", student(lambda about, _: about.update(quantizers={}))),
                ("of quantizers in a list", student(lambda about, _: about.update(quantizers=[1]))),
                ("of 99 bits", student(quantizer("bits", 99))),
                ("of bits in words", student(quantizer("bits", "four"))),
                ("of too many codes", student(quantizer("shape", [9999, 3, 3, 3]))),
                ("of codes below zero", student(quantizer("shape", [-1, 3, 3, 3]))),
                ("of another axis", student(quantizer("axis", 7))),
                ("of too few scales", student(first(".scale", lambda t: t.flatten()[:0]))),
                ("of codes in floats", student(first(".codes", lambda t: t.float()))),
                (
                    "that lacks codes",
                    student(lambda _, tensors: tensors.pop(next(n for n in tensors if n.endswith(".codes")))),
                ),
                ("that starts a program", student(node("call_function", "target", "os.system"))),
                ("that reads a file", student(node("call_function", "target", "aten.from_file.default"))),
                ("that writes in place", student(node("call_function", "target", "aten.add_.Tensor"))),
                ("of an unknown operation", student(node("call_function", "target", "aten.no_such.default"))),
                ("whose name is code", student(node("placeholder", "target", "x=__import__('os')"))),
                ("whose module is code", student(node("call_module", "target", "a(); b"))),
                ("whose operation lacks its input", student(node("call_function", "args", []))),
                (
                    "whose operation reads what is not there",
                    student(node("call_function", "args", [{"node": "gone"}])),
                ),
                ("whose operation reads numbers", student(node("call_function", "args", [1, 2, 3]))),
                ("of two outputs", student(lambda about, _: about["graph"].append(about["graph"][-1]))),
                ("of a graph in words", student(lambda about, _: about.update(graph="conv"))),
            )
        )
    ),
    *(
        (name, call, says, make)
        for name, call, says, make in (
            ("images that are not there", EVALUATE, "images.safetensors", removed("run/images.safetensors")),
            ("images that are cut", REPORT, "run", shorter("run/images.safetensors", 0.5)),
            ("images under another name", EVALUATE, "images", images({"pictures": torch.zeros(2, 3, 8, 8)})),
            (
                "images of another shape",
                EVALUATE,
                "(2, 3, 9, 9)",
                images({"images": torch.zeros(2, 3, 9, 9)}),
            ),
            (
                "images in integers",
                "export run",
                "int64",
                images({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}),
            ),
            (
                "labels of another length",
                "push run",
                "(3,)",
                images({"images": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(3, dtype=torch.int64)}),
            ),
            (
                "labels in floats",
                REPORT,
                "float32",
                images({"images": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)}),
            ),
            ("metrics that are not there", REPORT, "metrics.jsonl", removed("run/metrics.jsonl")),
            ("metrics that are cut", REPORT, "run", write("run/metrics.jsonl", '{"stage": "syn')),
            ("metrics in numbers", REPORT, "run", write("run/metrics.jsonl", "3\n")),
            ("an inspection that is cut", REPORT, "run", shorter("run/inspection.json", 0.5)),
            ("an inspection of a list", REPORT, "run", write("run/inspection.json", "[1]")),
            ("an inspection of nothing", REPORT, "run", write("run/inspection.json", "{}")),
            ("prompts that are no JSON", REPORT, "run", write("run/prompts.jsonl", "a cat\n")),
            ("latencies that are no JSON", REPORT, "run", write("run/latency.jsonl", "fast\n")),
            ("latencies without times", REPORT, "run", write("run/latency.jsonl", "{}\n")),
            (
                "an export's account that is no JSON",
                REPORT,
                "student.onnx.json",
                lambda f: (write("run/student.onnx", "x")(f), write("run/student.onnx.json", "{")(f)),
            ),
            (
                "an export's account of a list",
                "push run",
                "student.onnx.json",
                lambda f: (write("run/student.onnx", "x")(f), write("run/student.onnx.json", "[1]")(f)),
            ),
            (
                "an export's account of words",
                "push run",
                "student.onnx.json",
                lambda f: (
                    write("run/student.onnx", "x")(f),
                    write("run/student.onnx.json", '{"verified_on_own_images": "all"}')(f),
                ),
            ),
            (
                "an export's account of nothing",
                REPORT,
                "run",
                lambda f: (
                    write("run/student.onnx", "x")(f),
                    write("run/student.onnx.json", '{"file": "x"}')(f),
                ),
            ),
            (
                "an ONNX file that is not there",
                "evaluate gone.onnx --data labelled.npz",
                "gone.onnx",
                lambda f: None,
            ),
            (
                "an ONNX file of no bytes",
                "evaluate bad.onnx --data labelled.npz",
                "bad.onnx",
                write("bad.onnx", ""),
            ),
            (
                "an ONNX file of text",
                "evaluate bad.onnx --data labelled.npz",
                "bad.onnx",
                write("bad.onnx", "onnx"),
            ),
            (
                "an ONNX file with bad options",
                "evaluate bad.onnx --data labelled.npz",
                "bad.onnx",
                lambda f: (write("bad.onnx", "x")(f), write("bad.onnx.json", "{")(f)),
            ),
            (
                "an ONNX file that was changed",
                "evaluate bad.onnx --data labelled.npz",
                "bad.onnx",
                lambda f: (exported(f, "onnx", "bad.onnx"), shorter("bad.onnx", 0.9)(f)),
            ),
            *(
                (
                    f"an ONNX file with options {k}",
                    "evaluate bad.onnx --data labelled.npz",
                    "bad.onnx.json",
                    partial(account, kind="onnx", session=session),
                )
                for k, session in enumerate(
                    (
                        [],
                        {"graph_optimization_level": 5, "disabled_optimizers": []},
                        {"graph_optimization_level": "ORT_NONE", "disabled_optimizers": []},
                        {"graph_optimization_level": "ORT_ENABLE_ALL", "disabled_optimizers": [3]},
                        {"graph_optimization_level": "ORT_ENABLE_ALL", "disabled_optimizers": 3},
                    )
                )
            ),
            (
                "an IR without its weights",
                "evaluate bad.xml --data labelled.npz",
                "bad.xml",
                lambda f: (exported(f, "openvino", "bad.xml"), (f / "bad.bin").unlink()),
            ),
            (
                "an IR with too few weights",
                "evaluate bad.xml --data labelled.npz",
                "bad.xml",
                lambda f: (exported(f, "openvino", "bad.xml"), shorter("bad.bin", 0.1)(f)),
            ),
            (
                "an IR for other images",
                "evaluate bad.xml --data labelled.npz",
                "(3, 9, 9)",
                partial(
                    account,
                    kind="openvino",
                    **{
                        "zsq.preprocessing": '{"input_size": [3, 9, 9], "mean": [0, 0, 0], "std": [1, 1, 1], '
                        '"crop_fraction": 1, "interpolation": "bilinear"}'
                    },
                ),
            ),
            (
                "an IR with unknown properties",
                "evaluate bad.xml --data labelled.npz",
                "bad.xml",
                partial(account, kind="openvino", properties={"NO_SUCH": "1"}),
            ),
            ("an IR that is not there", "evaluate gone.xml --data labelled.npz", "gone.xml", lambda f: None),
            (
                "an IR without its account",
                "evaluate bad.xml --data labelled.npz",
                "bad.xml.json",
                write("bad.xml", "<net/>"),
            ),
            (
                "an IR with a bad account",
                "evaluate bad.xml --data labelled.npz",
                "bad.xml.json",
                lambda f: (write("bad.xml", "<net/>")(f), write("bad.xml.json", "[]")(f)),
            ),
        )
    ),
)


# ---- where to write


def unfinished(folder: Path) -> None:
    path = folder / "run/run.json"
    path.write_text(path.read_text().replace('"status": "done"', '"status": "running"', 1))
    shutil.rmtree(folder / "run/state", ignore_errors=True)


QUANTIZE = "quantize @ --recipe noise-nearest --set synthesis.num_images=8 --out "
OUTPUTS = cases(
    ("a run that is finished", QUANTIZE + "run", "run exists"),
    ("a run of another call", QUANTIZE + "run --seed 5", "seed", unfinished),
    (
        "images of a run of another call",
        "synthesize @ --recipe noise --set synthesis.num_images=8 --out run",
        "job",
        unfinished,
    ),
    ("a run that is damaged", QUANTIZE + "run", "run.json", write("run/run.json", "{")),
    ("the working folder", QUANTIZE + ".", "not empty"),
    ("the working folder by force", QUANTIZE + ". --force", "not a run folder"),
    ("a file", QUANTIZE + "nets.py", "nets.py"),
    ("below a file", QUANTIZE + "nets.py/run", "nets.py/run"),
    ("far below a file", QUANTIZE + "nets.py/a/b/run", "nets.py/a/b/run"),
    ("a name of 5000 letters", QUANTIZE + "r" * 5000, "rrr"),
    ("a link to itself", QUANTIZE + "loop", "loop", lambda f: (f / "loop").symlink_to("loop")),
    ("images below a file", "synthesize @ --out nets.py/images", "nets.py/images"),
    ("images in a run", "synthesize @ --recipe noise --set synthesis.num_images=8 --out run", "run exists"),
    ("an export that is there", "export run --out weights.pt", "weights.pt exists"),
    (
        "an export whose account is there",
        "export run --out new.onnx",
        "new.onnx.json exists",
        write("new.onnx.json", "{}"),
    ),
    ("an export as a folder", "export run --out run", "run exists"),
    ("an export as a folder by force", "export run --out run --force", "run exists"),
    ("an export below a file", "export run --out nets.py/x.onnx", "nets.py/x.onnx"),
    ("a program below a file", "export run --to pt2 --out nets.py/x.pt2", "nets.py/x.pt2"),
    ("an export of 5000 letters", "export run --out " + "e" * 5000, "eee"),
    ("a report that is there", "report run --out nets.py", "nets.py exists"),
    ("a report below a file", "report run --out nets.py/page.html", "nets.py/page.html"),
    ("a report as a folder", "report run --out run --force", "run exists"),
    ("a publication in the run", "push run --out run", "own folder"),
    (
        "a publication that is there",
        "push run --out there",
        "there exists",
        write("there/thesis.txt", "years"),
    ),
    (
        "a publication that is there by force",
        "push run --out there --force",
        "there",
        write("there/thesis.txt", "years"),
    ),
    ("a publication below a file", "push run --out nets.py/there", "nets.py/there"),
    *(
        (f"no run: {call.split()[0]} of {name}", call.replace("run", name, 1), name.split("/")[0], make)
        for call in (EVALUATE, REPORT, "export run", "push run", "bench-latency run")
        for name, make in (
            ("gone/run", lambda f: None),
            ("empty", lambda f: (f / "empty").mkdir()),
            ("nets.py", lambda f: None),
        )
    ),
)


@pytest.mark.parametrize("case", FILES)
def test_files(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)
