"""timm's vision transformer, small and with random weights: learned rounding at all bits, down to a file."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from zsq.cli import app
from zsq.models import Teacher
from zsq.pipeline import quantize
from zsq.run import Run

SIZE = (3, 64, 64)
BITS = ["W8A8", "W6A6", "W4A8", "W4A4"]
SETTINGS: dict[str, Any] = {
    "synthesis.num_images": 16,
    "synthesis.batch_size": 16,
    "synthesis.steps": 6,
    "reconstruction.steps": 40,
    "reconstruction.batch_size": 16,
    "reconstruction.lr_rounding": 0.02,
    "num_holdout": 0,
}


@pytest.fixture(scope="module")
def model(timm: ModuleType) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"img_size": SIZE[1], "depth": 2, "embed_dim": 48, "num_heads": 3}
        network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
        for name, parameter in network.named_parameters():
            if name in ("cls_token", "pos_embed"):  # near 0 as timm starts them
                nn.init.normal_(parameter, std=0.5)
    return Teacher(network.eval(), input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)


def learned(model: Teacher, bits: str, **options: Any) -> Run:
    return quantize(model, recipe="psaq_vit", bits=bits, budget="paper", overrides=SETTINGS, **options)


@pytest.mark.parametrize("bits", BITS)
def test_learned_rounding_and_export(model: Teacher, bits: str, tmp_path: Path) -> None:
    """Every linear layer inside has the bits asked for; units come nearer to the teacher by learning."""
    out = tmp_path / "run"
    results = learned(model, bits, out=out).record["results"]
    assert len(results["units"]) == 6 and len(results["bits"]["weights"]) == 10
    weight_bits, activation_bits = int(bits[1]), int(bits[3])
    assert set(results["bits"]["weights"].values()) == {weight_bits, 8}  # the ends have 8
    assert activation_bits in results["bits"]["activations"].values()
    assert list(results["bits"]["weights"].values()).count(8) == (2 if weight_bits < 8 else 10)
    gains = [unit["snr"] - unit["snr_nearest"] for unit in results["units"]]
    if bits == "W8A8":
        assert all(gain == 0 for gain in gains)  # nothing is learned
    else:
        assert sum(gains[1:]) / len(gains[1:]) > 0.1 and min(gains) > -0.1  # dB; seen: 0.24 at W6A6
    pytest.importorskip("onnxruntime")
    done = CliRunner().invoke(app, ["export", str(out), "--to", "onnx"])
    assert done.exit_code == 0, done.output
    assert (out / "student.onnx").is_file()
