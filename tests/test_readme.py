"""The README's snippets and commands run as they are written, with tiny settings added."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from zsq.cli import app

MODEL_FILE = """
from torch import nn

def factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )
"""
README = Path(__file__).parent.parent / "README.md"
TINY = (
    "--set synthesis.num_images=8 --set synthesis.batch_size=8 --set synthesis.steps=2 "
    "--set reconstruction.steps=2 --set num_holdout=4"
)


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    return [block for name, block in found if name == language]


def write_model(folder: Path) -> None:
    """The files that the commands name: path/to/file.py, its weights, labelled images."""
    source = folder / "path/to"
    source.mkdir(parents=True)
    (source / "file.py").write_text(MODEL_FILE, encoding="utf-8")
    names: dict[str, object] = {}
    exec(MODEL_FILE, names)
    network = names["factory"]()  # type: ignore[operator]
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    save_file(weights, folder / "model.safetensors")
    for label in ("cat", "dog"):
        (source / "images" / label).mkdir(parents=True)
        colour = "red" if label == "cat" else "blue"
        Image.new("RGB", (40, 36), colour).save(source / "images" / label / "1.png")


def test_python_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    quick = code.replace('budget="quick"', f'budget="quick", overrides={_overrides()!r}')
    assert quick != code
    names: dict[str, object] = {}
    exec(quick, names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor) and logits.shape == (8, 10)
    assert (tmp_path / "runs/digits-w4a4/student.safetensors").is_file()


def _overrides() -> dict[str, int]:
    pairs = (word.split("=") for word in TINY.split() if "=" in word)
    return {name: int(value) for name, value in pairs}


def test_quantize_evaluate_and_export_your_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    lines = [b.replace("\\\n", " ").splitlines() for b in blocks("") if "runs/" in b]
    commands = [c for block in lines for c in block if c.startswith("zsq ")]
    names_of = [c.split()[1] for c in commands]
    assert names_of[:4] == ["quantize", "evaluate", "export", "evaluate"]
    assert names_of[4:] == ["quantize", "export", "bench-latency", "push", "report", "report"]
    for command in commands:
        tiny = f"{command} {TINY}" if " quantize " in command else command
        result = CliRunner().invoke(app, shlex.split(tiny)[1:])
        assert result.exit_code == 0, result.output
        assert " evaluate " not in command or "top-1" in result.output


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^(?:#.*)?make ([\w-]+) +#", README.read_text(encoding="utf-8"), re.M):
        assert f"\n{target}:" in makefile
