"""Labels of class-conditional images on their way: pieces, filters, run folders, benchmarks' batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import SIZE, Residual, images, teacher
from safetensors.torch import load_file
from torch import Tensor, nn

from zsq.errors import UsageError
from zsq.images.class_settings import ClassGuide
from zsq.images.pixel_settings import Centres, PixelSynthesis
from zsq.images.settings import Filter
from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images
from zsq.recipe import Recipe
from zsq.recipe_fields import describe, with_overrides
from zsq.recipes import sources
from zsq.recipes.zeroq import ZEROQ
from zsq.run import Run, load_run

GUIDED = PixelSynthesis(num_images=16, batch_size=8, steps=3, lr=0.1, classes=ClassGuide())
RECIPE = replace(ZEROQ, name="guided", synthesis=GUIDED, num_holdout=0)


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


def run(model: Teacher, recipe: Recipe = RECIPE, **options: Any) -> Run:
    return quantize(model, recipe=recipe, budget="paper", **options)


def test_labels_are_in_the_run_and_its_folder(model: Teacher, tmp_path: Path) -> None:
    found = run(model, out=tmp_path / "run")
    assert found.labels is not None and found.labels.dtype == torch.int64 and found.labels.shape == (16,)
    counts = torch.bincount(found.labels, minlength=7)
    assert int(counts.max() - counts.min()) <= 1
    again = load_run(tmp_path / "run")
    assert again.labels is not None and torch.equal(again.labels, found.labels)
    assert torch.equal(again.images, found.images)
    assert torch.equal(again.student(images(3)), found.student(images(3)))
    assert set(load_file(tmp_path / "run" / "images.safetensors")) == {"images", "labels"}


def test_images_without_classes_have_no_labels(model: Teacher, tmp_path: Path) -> None:
    recipe = replace(RECIPE, synthesis=replace(GUIDED, classes=None))
    found = run(model, recipe, out=tmp_path / "run")
    assert found.labels is None and load_run(tmp_path / "run").labels is None
    given = run(model, images=images(9))
    assert given.labels is None


def test_a_filter_takes_the_labels_along(model: Teacher) -> None:
    whole = run(model)
    kept = run(model, replace(RECIPE, filter=Filter(method="random", keep=5)))
    assert kept.images.shape[0] == 5 and kept.labels is not None and whole.labels is not None
    for image, label in zip(kept.images, kept.labels, strict=True):
        same = [i for i, other in enumerate(whole.images) if torch.equal(image, other)]
        assert len(same) == 1 and whole.labels[same[0]] == label
    all_kept = run(model, replace(RECIPE, filter=Filter(method="random", keep=16)))
    assert all_kept.labels is not None and torch.equal(all_kept.labels, whole.labels)


def test_resuming_gives_the_same_images_and_labels(model: Teacher, tmp_path: Path) -> None:
    recipe = replace(RECIPE, synthesis=replace(GUIDED, centres=Centres(steps=2)), num_holdout=4)
    first = run(model, recipe)

    class Killed(Exception):
        pass

    def stop(event: Any) -> None:
        if event.stage == "synthesize" and event.item.startswith("batch 2"):
            raise Killed

    with pytest.raises(Killed):
        run(model, recipe, out=tmp_path / "run", progress=stop)
    pieces = {path.stem for path in (tmp_path / "run" / "state").glob("*.piece")}
    assert pieces == {"centres-000", "synthesis-000"}
    resumed = run(model, recipe, out=tmp_path / "run")
    assert first.labels is not None and resumed.labels is not None
    assert torch.equal(first.images, resumed.images) and torch.equal(first.labels, resumed.labels)
    assert first.record["results"] == resumed.record["results"]


def test_batches_made_before(model: Teacher, tmp_path: Path) -> None:
    made: dict[str, dict[str, Tensor]] = {}
    alone = synthesize_images(model, recipe=RECIPE, budget="paper", made=made, out=tmp_path / "images")
    assert set(made) == {"synthesis-000", "synthesis-001"}
    labels = torch.cat([made[name]["labels"] for name in sorted(made)])
    written = load_file(tmp_path / "images" / "images.safetensors")
    assert torch.equal(written["labels"], labels)
    found = run(model, made=made)
    assert torch.equal(found.images, alone) and found.labels is not None
    assert torch.equal(found.labels, labels) and torch.equal(run(model).images, alone)


class Features(nn.Module):
    """Returns a map of features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def test_a_network_without_classes_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Teacher(Features(), input_size=SIZE)
    with pytest.raises(UsageError, match=r"images of classes.*Expected logits of shape \(N, classes\)"):
        run(model, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_the_published_sources() -> None:
    """What the papers and codes say, beside the constants."""
    assert (sources.HAST_IMAGES.num_images, sources.HAST_IMAGES.steps, sources.HAST_IMAGES.lr) == (
        5120,
        1000,
        0.5,
    )
    for source in (sources.HAST_IMAGES, sources.INTRAQ_IMAGES, sources.TEXQ_IMAGES_LARGE):
        assert (source.bn.spread, source.bn.over, source.bn.channels, source.bn.layers) == (
            "variance",
            "batch",
            "mean",
            "mean",
        )
    hast, large = sources.HAST_IMAGES.classes, sources.HAST_IMAGES_LARGE.classes
    assert hast is not None and large is not None
    assert (hast.weight, hast.hardness, large.weight, large.hardness) == (10, 2, 0.1, 0.5)
    assert sources.INTRAQ_IMAGES_LARGE.classes == ClassGuide(loss="probability")
    assert sources.TEXQ_IMAGES.centres == Centres(weight=0.02, steps=1500, shallow=0.2, deep=1.1)


def test_settings_by_name() -> None:
    recipe = with_overrides(RECIPE, {"synthesis.bn.spread": "variance", "synthesis.crops": "on"})
    recipe = with_overrides(recipe, {"synthesis.crops.smallest": "0.3", "synthesis.classes.hardness": 2})
    source = recipe.synthesis
    assert isinstance(source, PixelSynthesis) and source.crops is not None and source.classes is not None
    assert (source.bn.spread, source.crops.smallest, source.classes.hardness) == ("variance", 0.3, 2.0)
    described = describe(recipe)["synthesis"]
    assert described["kind"] == "PixelSynthesis" and described["crops"]["smallest"] == 0.3
    assert "centres" not in described
    none = with_overrides(RECIPE, {"synthesis.classes": "none"}).synthesis
    assert isinstance(none, PixelSynthesis) and none.classes is None
