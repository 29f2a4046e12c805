"""The Python interface as the documentation shows it."""

from pathlib import Path

import pytest
import torch
from quantization_networks import SIZE, Residual, images, made
from torch import nn

import zsq


@pytest.mark.parametrize("which", ["digits", "own"])
def test_python_interface(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if which == "digits":
        teacher = zsq.load_model("digits")
    else:
        teacher = zsq.Teacher(made(Residual), input_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    overrides = {
        "synthesis.num_images": 16,
        "synthesis.steps": 3,
        "num_holdout": 4,
        "reconstruction.steps": 3,
    }
    run = zsq.quantize(teacher, recipe="genie", bits="W4A4", seed=0, overrides=overrides)
    inputs = torch.randn(5, *teacher.spec.input_size, generator=torch.Generator().manual_seed(0))
    logits = run.student(inputs)  # a plain nn.Module
    assert isinstance(run.student, nn.Module) and logits.shape == teacher.module(inputs).shape
    run.save("runs/digits")
    again = zsq.load_run("runs/digits")  # the same logits, bit for bit
    assert torch.equal(again.student(inputs).view(torch.int32), logits.view(torch.int32))
    assert torch.equal(again.images, run.images)


def test_nothing_prints_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    teacher = zsq.Teacher(made(Residual), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    zsq.quantize(teacher, recipe="noise-nearest", overrides={"synthesis.num_images": 4})
    assert capfd.readouterr() == ("", "")


def test_accuracy_of_a_student() -> None:
    teacher = zsq.Teacher(made(Residual), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    run = zsq.quantize(teacher, recipe="noise-nearest", bits="W8A8", overrides={"synthesis.num_images": 32})
    x = images(64, seed=1)
    with torch.no_grad():
        labels = teacher.module(x).argmax(1)
    result = zsq.accuracy(run.student, [(x[:40], labels[:40]), (x[40:], labels[40:])])
    assert result.num_images == 64 and result.top1 > 90


def test_errors_are_of_one_family() -> None:
    with pytest.raises(zsq.ZsqError) as caught:
        zsq.quantize("digits", recipe="none")
    assert isinstance(caught.value, zsq.UsageError) and isinstance(caught.value, ValueError)
    assert issubclass(zsq.JobError, zsq.ZsqError) and not issubclass(zsq.JobError, zsq.UsageError)
