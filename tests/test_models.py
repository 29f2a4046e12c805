"""Models by name: bundled, timm, and names that mean nothing."""

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import message
from torch import nn

from zsq.models import ModelSource, load_model, models


def test_digits() -> None:
    teacher = load_model("digits")
    assert teacher.spec.input_size == (1, 8, 8) and teacher.output_shape == (10,)
    assert teacher.source == ModelSource(kind="bundled", name="digits")
    assert teacher.sha256 == load_model("digits").sha256


def test_digits_with_other_input_and_weights(tmp_path: Path) -> None:
    state = load_model("digits").module.state_dict()
    state["linear.bias"] += 1
    file = tmp_path / "w.safetensors"
    save_file(state, file)
    teacher = load_model("digits", weights=file, input_size=(1, 16, 16), mean=(0.0,), std=(1.0,))
    assert teacher.spec.input_size == (1, 16, 16) and teacher.spec.std == (1.0,)
    assert teacher.source.weights == str(file) and teacher.sha256 != load_model("digits").sha256


def test_a_teacher_passes_through() -> None:
    teacher = load_model("digits")
    assert load_model(teacher) is teacher
    assert "mean, std" in message(lambda: load_model(teacher, mean=(0.0,), std=(1.0,)))


def test_table() -> None:
    assert [entry.model.split(",")[0] for entry in models()] == [
        "digits",
        "path/to/file.py:factory",
        "resnet18.a1_in1k",
    ]


@pytest.mark.parametrize("name", ["w.safetensors", "nets/w.pth", "w.onnx"])
def test_rejects_a_weights_file_as_model(name: str) -> None:
    assert f"--weights {name}" in message(lambda: load_model(name))


def test_rejects_another_path_as_model() -> None:
    assert "no run folder and no Python file" in message(lambda: load_model("runs/absent"))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_timm_with_a_weights_file(timm: types.ModuleType, tmp_path: Path, name: str) -> None:
    network, file = timm.create_model(name), tmp_path / "w.safetensors"
    save_file(network.state_dict(), file)
    teacher = load_model(name, weights=file, input_size=(3, 64, 64))  # small, to be quick
    assert teacher.output_shape == (1000,) and teacher.notes == ()
    assert teacher.spec.mean == pytest.approx((0.485, 0.456, 0.406))
    assert teacher.source == ModelSource(kind="timm", name=name, weights=str(file))
    loaded, saved = teacher.module.state_dict(), network.state_dict()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_timm_preprocessing(timm: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = timm.create_model("test_resnet.r160_in1k")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: network)
    teacher = load_model("test_resnet")
    config = timm.data.resolve_model_data_config(network)
    assert teacher.spec.input_size == config["input_size"] == (3, 160, 160)
    assert teacher.spec.crop_fraction == config["crop_pct"] and teacher.spec.mean == config["mean"]
    assert teacher.spec.interpolation == config["interpolation"]
    assert teacher.source == ModelSource(kind="timm", name="test_resnet.r160_in1k")  # tag made explicit


def test_unknown_timm_name(timm: types.ModuleType) -> None:
    assert "such as resnet18" in message(lambda: load_model("resnet18x"))
    assert "Published for resnet18: resnet18.a1_in1k" in message(lambda: load_model("resnet18.absent"))


def test_offline_hub(timm: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, pretrained: bool) -> nn.Module:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(timm, "create_model", unreachable)
    for name in ("resnet18", "hf-hub:timm/resnet18.a1_in1k"):
        text = message(lambda name=name: load_model(name))  # type: ignore[misc]
        assert "could not be fetched" in text and "no route to host" in text and "--weights FILE" in text


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, module, None)
    text = message(lambda: load_model("resnet18"))
    assert "'resnet18' is not bundled" in text and "pip install 'zsq[timm]'" in text


def test_timm_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str, extra: str) -> types.ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("zsq.architectures.import_extra", fail)
    assert "torchvision does not fit torch" in message(lambda: load_model("resnet18"))
