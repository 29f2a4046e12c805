"""Networks from a user's Python file."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tiny_networks import NORM, SIZE, message, same_weights
from torch import nn

from zsq.errors import UsageError
from zsq.models import ModelSource, load_model


def test_loads_code_and_weights(code: Path, network: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, file)
    teacher = load_model(f"{code}:tiny", weights=file, **NORM)
    assert same_weights(teacher, network) and teacher.notes == () and teacher.name == "tiny"
    assert teacher.source == ModelSource(kind="file", name=f"{code}:tiny", weights=str(file))
    again = load_model(teacher.source.name, weights=teacher.source.weights, **NORM)
    assert again.sha256 == teacher.sha256
    assert json.loads(json.dumps(asdict(teacher.source)))["notes"] == []


def test_own_weights_are_said(code: Path) -> None:
    teacher = load_model(f"{code}:tiny", input_size=SIZE)
    assert "the weights that tiny() made are used" in teacher.notes[0] and "[0, 1]" in teacher.notes[1]


def test_a_ready_network_is_taken(code: Path) -> None:
    assert load_model(f"{code}:ready", **NORM).output_shape == (5,)


def test_leaves_sys_path_alone(code: Path) -> None:
    before = list(sys.path)
    load_model(f"{code}:tiny", **NORM)
    with pytest.raises(UsageError):
        load_model(f"{code}:broken", **NORM)
    assert sys.path == before


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for classes in (2, 3):
        folder = tmp_path / str(classes)
        folder.mkdir()
        body = f"return nn.Sequential(nn.Flatten(), nn.Linear(192, {classes}))"
        (folder / "net.py").write_text(f"from torch import nn\n\ndef net(): {body}\n")
    shapes = [load_model(f"{tmp_path / n / 'net.py'}:net", **NORM).output_shape for n in ("2", "3")]
    assert shapes == [(2,), (3,)]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("tine", "has no function 'tine'. It has: tiny, "),
        ("CLASSES", "has no function 'CLASSES'"),
        ("broken", "raised KeyError: 'stage5' (line "),
        ("leaves", "raised SystemExit: 3"),
        ("needs_argument", "missing 1 required positional argument"),
        ("no_module", "returned an object of type dict"),
        ("two_inputs", "rejects input of shape (2, 3, 8, 8) (TypeError: "),
        ("two_outputs", "an output of type tuple"),
    ],
)
def test_rejects_a_wrong_factory(code: Path, factory: str, words: str) -> None:
    assert words in message(lambda: load_model(f"{code}:{factory}", **NORM))


@pytest.mark.parametrize("suffix", ["", ":"])
def test_rejects_a_file_without_factory(code: Path, suffix: str) -> None:
    assert "no factory" in message(lambda: load_model(f"{code}{suffix}", **NORM))


def test_rejects_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in message(lambda: load_model(f"{tmp_path}/absent.py:net", **NORM))


@pytest.mark.parametrize(
    ("source", "words"), [("x = 1 / 0\n", "ZeroDivisionError"), ("def f(:\n", "SyntaxError")]
)
def test_rejects_code_that_fails(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    text = message(lambda: load_model(f"{tmp_path}/bad.py:net", **NORM))
    assert words in text and "line 1" in text


def test_needs_an_input_size(code: Path) -> None:
    assert "--input-size 3,32,32" in message(lambda: load_model(f"{code}:tiny"))


@pytest.mark.parametrize(("factory", "size"), [("tiny", (1, 8, 8)), ("fixed_view", (3, 16, 16))])
def test_rejects_another_input_size(code: Path, factory: str, size: tuple[int, int, int]) -> None:
    text = message(lambda: load_model(f"{code}:{factory}", input_size=size))
    assert f"(2, {size[0]}, {size[1]}, {size[2]})" in text and "check the input size" in text
