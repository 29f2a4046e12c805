"""The recipe without images, from end to end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from statistics_networks import SIZE, Separable, Shortcut, images
from torch import Tensor, nn

import zsq
from zsq.errors import UsageError
from zsq.models import Teacher
from zsq.recipe import Recipe
from zsq.recipe_fields import describe, with_overrides
from zsq.recipes.dfq import DFQ
from zsq.run import Run, load_run
from zsq.student import student_to_bytes


def teacher(kind: type[nn.Module]) -> Teacher:
    """A network with the statistics of normal images."""
    rng = torch.Generator().manual_seed(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.3, 1.5, generator=rng)
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(512, seed=7))
    return Teacher(network.eval(), input_size=SIZE)


def run(model: Teacher, recipe: Recipe = DFQ, **options: Any) -> Run:
    recipe = replace(recipe, synthesis=replace(recipe.synthesis, num_images=8))
    return zsq.quantize(model, recipe=recipe, budget="paper", **options)


@pytest.mark.parametrize("kind", [Separable, Shortcut])
def test_the_student_is_near_and_does_not_depend_on_the_images(kind: type[nn.Module], tmp_path: Path) -> None:
    model = teacher(kind)
    found, other = run(model, out=tmp_path / "run"), run(model, seed=1)
    x = images(64, seed=5)
    expected = model.module(x)
    assert float((found.student(x) - expected).std()) < 0.1 * float(expected.std())
    assert not torch.equal(found.images, other.images)
    assert student_to_bytes(found.student) == student_to_bytes(other.student)
    assert student_to_bytes(run(model, images=images(5)).student) == student_to_bytes(found.student)
    assert torch.equal(load_run(tmp_path / "run").student(x), found.student(x))
    estimates = found.record["results"]["estimated_without_data"]
    assert estimates["holdout"]["num_images"] == 8 and "calibration_images" not in estimates
    assert found.labels is None


def test_parts_can_be_left_out() -> None:
    model, x = teacher(Separable), images(64, seed=5)
    errors = {}
    for name in ("nothing", "bias_correction", "equalization"):
        recipe = with_overrides(DFQ, {} if name == "nothing" else {name: "none"})
        student = run(model, recipe, bits="W3A8").student
        errors[name] = (student(x) - model.module(x)).mean(0).square().mean()
    assert float(errors["nothing"]) < float(errors["bias_correction"])
    assert len({float(e) for e in errors.values()}) == 3


def test_with_reconstruction_and_in_the_record() -> None:
    recipe = with_overrides(DFQ, {"reconstruction": "on", "reconstruction.steps": 3})
    found = run(teacher(Separable), recipe, bits="W4A4")
    described = describe(recipe)
    assert described["calibration"] == {"kind": "StatisticalRanges", "deviations": 6.0}
    assert described["bias_correction"] == {"kind": "BiasCorrection"}
    assert found.record["recipe"]["equalization"]["passes"] == 50
    assert "calibration_images" in found.record["results"]["estimated_without_data"]


class Normless(nn.Module):
    """No BatchNorm at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu()).mean((2, 3))


def test_models_that_it_cannot_work_on_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be derived from its BatchNorm statistics.*zeroq"):
        run(Teacher(Normless(), input_size=SIZE), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="calibration.deviations must be above 0"):
        with_overrides(DFQ, {"calibration.deviations": 0})
