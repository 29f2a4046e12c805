"""Runs with fine-tuning: the folder, interrupted and continued, evaluated and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization_networks import SIZE, Residual, images, teacher
from tiny_networks import message
from torch import nn

import zsq
from zsq.cli import app
from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images
from zsq.progress import Progress
from zsq.run import load_run

TINY: dict[str, Any] = {
    "synthesis.num_images": 10,
    "synthesis.batch_size": 10,
    "synthesis.steps": 2,
    "num_holdout": 4,
    "fine_tuning.epochs": 3,
    "fine_tuning.iterations": 2,
    "fine_tuning.batch_size": 5,
    "fine_tuning.lr": 1e-4,
}


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


def tiny(model: Teacher, **options: Any) -> zsq.Run:
    overrides = {**TINY, "synthesis.centres": "none"}
    arguments: dict[str, Any] = {"recipe": "synq", "bits": "W3A3", "overrides": overrides, "seed": 3}
    return quantize(model, **{**arguments, **options})


def test_the_folder_gives_the_same_logits(model: Teacher, tmp_path: Path) -> None:
    events: list[Progress] = []
    overrides = {**TINY, "synthesis.centres": "none", "fine_tuning.lr": 1e-6}
    run = tiny(model, out=tmp_path / "run", progress=events.append, overrides=overrides)
    again, x = load_run(tmp_path / "run"), images(6)
    assert torch.equal(again.student(x), run.student(x))
    assert not (tmp_path / "run" / "state").exists()
    record = run.record
    assert record["recipe"]["fine_tuning"]["epochs"] == 3 and "fine-tune" in record["timings"]
    found = record["results"]["fine_tuning"]
    assert found["epochs"] == 3 and set(found["first"]) == {
        "loss",
        "distillation",
        "labels",
        "maps",
        "perturbed",
    }
    seen = [event for event in events if event.stage == "fine-tune"]
    assert [event.done for event in seen] == [1, 2, 3, 4, 5, 6] and {e.total for e in seen} == {6}
    assert seen[-1].item == "epoch 3 of 3" and "lr" in seen[-1].values
    assert set(record["results"]["bits"]["weights"].values()) == {3}


def test_killed_and_continued_the_same_bits(model: Teacher, tmp_path: Path) -> None:
    """At a rate that is too large at first: epochs that are undone are, again."""
    undisturbed: list[Progress] = []
    overrides = {**TINY, "synthesis.centres": "none", "fine_tuning.lr": 3e-2, "fine_tuning.clip": "none"}
    run = tiny(model, out=tmp_path / "whole", progress=undisturbed.append, overrides=overrides)
    steps = [event.done for event in undisturbed if event.stage == "fine-tune"]
    assert run.record["results"]["fine_tuning"]["lr_factor"] < 1 and len(steps) > 6
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in ("student.safetensors", "run.json")}
    for at in (1, 3, 4, 6):  # within the first epoch, at the end of one, within the last, at its end

        def kill(event: Progress, at: int = at) -> None:
            if event.stage == "fine-tune" and event.done == at:
                raise KeyboardInterrupt

        out = tmp_path / f"run-{at}"
        with pytest.raises(KeyboardInterrupt):
            tiny(model, out=out, progress=kill, overrides=overrides)
        events: list[Progress] = []
        tiny(model, out=out, progress=events.append, overrides=overrides)
        assert (out / "student.safetensors").read_bytes() == whole["student.safetensors"]
        results = [
            json.loads(text)["results"] for text in (whole["run.json"], (out / "run.json").read_bytes())
        ]
        assert results[0] == results[1]
        done = [event.done for event in events if event.stage == "fine-tune" and not event.resumed]
        assert done == steps[-len(done) :] and done[0] == (at - 1) // 2 * 2 + 1


def test_after_a_reconstruction(model: Teacher) -> None:
    """Genie, then fine-tuning from what it made: scales stay, codes need not."""
    overrides = {**TINY, "reconstruction.steps": 3, "reconstruction.batch_size": 5}
    tuning = {key: value for key, value in overrides.items() if key.startswith("fine_tuning.")}
    plain = {key: value for key, value in overrides.items() if key not in tuning}
    before = tiny(model, recipe="genie", overrides=plain)
    after = tiny(model, recipe="genie", overrides={**plain, "fine_tuning": "on", **tuning})
    assert after.record["results"]["units"] == before.record["results"]["units"]
    assert "fine_tuning" in after.record["results"]
    for name, module in before.student.named_modules():
        if hasattr(module, "codes"):
            assert torch.equal(after.student.get_submodule(name).scale, module.scale)  # type: ignore[arg-type]
    assert not torch.equal(before.student(images(4)), after.student(images(4)))


def test_eight_bits_are_not_fine_tuned(model: Teacher) -> None:
    assert "fine_tuning" not in tiny(model, bits="W8A8").record["results"]


def test_filtered_images_are_those_of_the_run(model: Teacher) -> None:
    plain = {key: value for key, value in TINY.items() if not key.startswith("fine_tuning.")}
    blurred = {**plain, "low_pass": "on", "low_pass.cutoff": 0.1}
    found = [
        tiny(model, recipe="noise-nearest", overrides={"synthesis.num_images": 8, **x}).images
        for x in ({}, {"low_pass": "on", "low_pass.cutoff": 0.1})
    ]
    assert torch.allclose(found[0].mean((2, 3)), found[1].mean((2, 3)), atol=1e-5)
    assert float(found[1].std()) < 0.5 * float(found[0].std())
    made = synthesize_images(model, recipe="genie", overrides=blurred, seed=3)
    run = tiny(model, recipe="genie", overrides={**blurred, "reconstruction": "none"})
    assert torch.equal(made, run.images)


def test_models_that_cannot_be_fine_tuned_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    maps = Teacher(network.eval(), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    out = tmp_path / "run"
    assert "class logits" in message(lambda: tiny(maps, out=out)) and not out.exists()


def test_evaluate_and_export(model: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    from typer.testing import CliRunner

    out = tmp_path / "run"
    tiny(model, out=out)
    pixels = np.random.default_rng(0).integers(0, 255, (6, *SIZE[1:], 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.arange(6) % 7)
    for command in (
        ["evaluate", str(out), "--data", str(tmp_path / "data.npz")],
        ["export", str(out), "--to", "onnx"],
        ["evaluate", str(out / "student.onnx"), "--data", str(tmp_path / "data.npz")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert (out / "student.onnx").is_file()
