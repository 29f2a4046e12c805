"""Labels of given images: what is refused, what they are used for, what they leave as it was."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization_networks import CLASSES, Residual, images, teacher
from safetensors.torch import load_file
from tiny_networks import message
from torch import Tensor
from typer.testing import CliRunner

from zsq.cli import app
from zsq.data import load_labelled_images
from zsq.models import Teacher
from zsq.pipeline import quantize
from zsq.recipes import get_recipe
from zsq.run import Run, load_run
from zsq.student import student_to_bytes

TOTAL, KEPT = 28, 7
NEAREST: dict[str, Any] = {"num_holdout": 0, "synthesis.num_images": 0}
FILTERED = {**NEAREST, "filter": "on", "filter.keep": KEPT}


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


def classes(seed: int = 0) -> Tensor:
    """Every class four times, in some order."""
    order = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(seed))
    return torch.arange(TOTAL)[order] % CLASSES


def run(model: Teacher, overrides: dict[str, Any] = NEAREST, **options: Any) -> Run:
    options = {"recipe": "given-nearest", "bits": "W4A4", "images": images(TOTAL), **options}
    return quantize(model, overrides=overrides, **options)


@pytest.mark.parametrize("method", ["energy", "bn_sensitivity"])
def test_filters_keep_the_same_share_of_every_class(method: str, model: Teacher) -> None:
    chosen = {**FILTERED, "filter.method": method}
    balanced = run(model, chosen, image_labels=classes())
    assert balanced.labels is not None and balanced.labels.bincount(minlength=CLASSES).tolist() == [1] * 7
    for image, label in zip(balanced.images, balanced.labels, strict=True):  # labels went along
        assert classes()[int((images(TOTAL) == image).flatten(1).all(1).nonzero())] == label
    unbalanced = run(model, {**chosen, "filter.balanced": False}, image_labels=classes())
    assert torch.equal(unbalanced.images, run(model, chosen).images)
    assert not torch.equal(unbalanced.images, balanced.images)


def test_without_a_use_for_labels_the_bits_are_the_same(model: Teacher) -> None:
    plain, labelled = run(model), run(model, image_labels=classes())
    assert plain.labels is None and labelled.labels is not None
    assert student_to_bytes(plain.student) == student_to_bytes(labelled.student)
    assert plain.record["given_labels_sha256"] is None
    assert (
        labelled.record["given_labels_sha256"]
        != run(model, image_labels=classes(1)).record["given_labels_sha256"]
    )


def test_drawn_images_keep_their_labels(model: Teacher) -> None:
    found = run(model, {**NEAREST, "synthesis.num_images": 9}, image_labels=classes())
    assert found.labels is not None and len(found.labels) == 9
    for image, label in zip(found.images, found.labels, strict=True):
        assert classes()[int((images(TOTAL) == image).flatten(1).all(1).nonzero())] == label


def test_losses_of_labels_take_them(model: Teacher) -> None:
    """The teacher's own classes as labels change nothing; others do."""
    recipe = get_recipe("synq")
    tuning = {"fine_tuning.epochs": 1, "fine_tuning.iterations": 2, "fine_tuning.batch_size": 8}
    options: dict[str, Any] = {"recipe": recipe, "overrides": {**tuning, "num_holdout": 0}, "bits": "W3A3"}
    with torch.no_grad():
        said = model.module(images(TOTAL)).argmax(1)
    alone, same, other = (
        student_to_bytes(quantize(model, images=images(TOTAL), image_labels=labels, **options).student)
        for labels in (None, said, (said + 1) % CLASSES)
    )
    assert alone == same != other


def test_another_run_is_another_folder(model: Teacher, tmp_path: Path) -> None:
    """A folder that an interrupted run left is not continued with other labels."""
    out = tmp_path / "run"

    def stop(event: Any) -> None:
        raise KeyboardInterrupt

    learned = {"reconstruction.steps": 2, **NEAREST}
    options: dict[str, Any] = {"recipe": "given", "out": out}
    with pytest.raises(KeyboardInterrupt):
        run(model, learned, image_labels=classes(), progress=stop, **options)
    for labels in (None, classes(1)):
        assert "given_labels_sha256" in message(
            lambda x=labels: run(model, learned, image_labels=x, **options)
        )
    found = run(model, learned, image_labels=classes().to(torch.uint8), **options)
    again = load_run(out)
    assert again.labels is not None and found.labels is not None and torch.equal(again.labels, found.labels)
    assert load_file(out / "images.safetensors")["labels"].dtype == torch.int64
    _, labels = load_labelled_images(out, model.spec, CLASSES)
    assert labels is not None and torch.equal(labels, found.labels)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.zeros(TOTAL - 1, dtype=torch.int64), r"int64 of shape \(27,\).*shape \(28,\)"),
        (torch.zeros(TOTAL, 1, dtype=torch.int64), r"shape \(28, 1\)"),
        (torch.zeros(TOTAL), "float32"),
        (torch.zeros(TOTAL, dtype=torch.bool), "bool"),
        (torch.full((TOTAL,), CLASSES), r"7 to 7, and the model has the classes 0 to 6"),
        (torch.full((TOTAL,), -1), "-1 to -1"),
    ],
)
def test_wrong_labels(model: Teacher, tmp_path: Path, labels: Tensor, text: str) -> None:
    said = message(lambda: run(model, image_labels=labels, out=tmp_path / "run"))
    assert re.search(text, said) and not (tmp_path / "run").exists()


def test_labels_without_images_or_classes(model: Teacher) -> None:
    assert "Give images too" in message(lambda: quantize(model, recipe="noise", image_labels=classes()))
    network = Residual()
    network.fc = torch.nn.Unflatten(1, (2, 5))  # type: ignore[assignment]
    maps = Teacher(network.eval(), input_size=(3, 8, 8))
    assert "has no classes" in message(lambda: run(maps, image_labels=classes()))


def test_labels_that_the_teacher_does_not_confirm_are_a_finding(model: Teacher) -> None:
    with torch.no_grad():
        said = model.module(images(TOTAL)).argmax(1)
    for labels, expected in ((said, 0), ((said + 1) % CLASSES, 1)):
        findings = run(model, image_labels=labels).record["results"]["findings"]
        told = [f["what"] for f in findings if "class of the label" in f["what"]]
        assert len(told) == expected


def test_command_line_brings_labels_along(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    file = tmp_path / "set.npz"
    np.savez(file, images=rng.integers(0, 256, (40, 28, 28), dtype=np.uint8), labels=labels)
    command = (
        f"quantize digits --recipe given-nearest --images {file} --filter energy:10 --out {tmp_path / 'a'}"
    )
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    found = load_run(tmp_path / "a")
    assert found.labels is not None and sorted(found.labels.tolist()) == list(range(10))
