"""Every recipe of the table on a tiny network, and pairs of parts that no recipe pairs."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import SIZE, Residual, images, teacher

from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import MadeInBatches, PixelSynthesis
from zsq.images.prompts import TextToImage
from zsq.images.settings import LowPass, Synthesis
from zsq.models import Teacher
from zsq.pipeline import compose_recipe, quantize
from zsq.progress import Progress
from zsq.recipe import Calibration, GaussianNoise, GivenImages, Recipe
from zsq.recipe_fields import describe
from zsq.recipes import RECIPES, get_recipe
from zsq.recipes.genie import GENIE
from zsq.recover.settings import FineTuning, MapAlignment
from zsq.run import Run
from zsq.student import student_to_bytes


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


def shrunk(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with counts for a test; what it does stays."""
    source = recipe.synthesis
    if isinstance(source, Synthesis):
        source = replace(source, num_images=10, batch_size=10, steps=30, latent_size=8, lr_latent=0.01)
    elif isinstance(source, PixelSynthesis):
        source = replace(source, num_images=10, batch_size=10, steps=30, lr=0.05)
    elif isinstance(source, GeneratorSynthesis):
        centres = source.centres and replace(source.centres, steps=2)
        source = replace(source, num_images=10, batch_size=10, steps=30, centres=centres)
    elif isinstance(source, TextToImage):
        source = replace(source, num_images=13, batch_size=13, steps=1)
    else:
        source = replace(source, num_images=10)
    chosen = recipe.filter and replace(recipe.filter, keep=12, then=replace(recipe.filter, keep=10))
    reconstruction = recipe.reconstruction and replace(recipe.reconstruction, steps=3, batch_size=5)
    refinement = recipe.refinement and replace(recipe.refinement, steps=2, warmup_steps=2)
    tuning = recipe.fine_tuning and replace(recipe.fine_tuning, epochs=2, iterations=2, batch_size=5)
    return replace(
        recipe,
        **{
            "synthesis": source,
            "filter": chosen,
            "refinement": refinement,
            "reconstruction": reconstruction,
            "fine_tuning": tuning,
            "num_holdout": 2,
            **changes,
        },
    )


def run(model: Teacher, recipe: Recipe, seed: int = 0, **options: Any) -> Run:
    given = images(16) if isinstance(recipe.synthesis, GivenImages) else None
    return quantize(model, recipe=recipe, budget="paper", images=given, seed=seed, **options)


def test_the_table() -> None:
    baselines = {"given", "given-nearest", "noise", "noise-nearest"}
    fine_tuned = {"intraq", "hast", "synq", "genie-synq", "zeroq-ft"}
    in_turns = {"gdfq", "gdfq-synq", "adasg", "adadfq", "texq"}
    others = {"genie", "best", "sadag", "zeroq", "dsg", "dfq", "psaq_vit", "genq", "mixup_class"}
    assert set(RECIPES) == others | fine_tuned | in_turns | baselines
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.paper and get_recipe(name) is recipe
    assert compose_recipe("genie") == GENIE


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers and transformers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_runs_and_one_seed_gives_one_result(
    name: str, model: Teacher, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe = shrunk(RECIPES[name])
    if isinstance(recipe.synthesis, TextToImage):
        (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
        pipeline, names = str(request.getfixturevalue("random_pipeline")), str(tmp_path / "names.txt")
        recipe = replace(recipe, synthesis=replace(recipe.synthesis, pipeline=pipeline, class_names=names))
    first, again, other = (run(model, recipe, seed) for seed in (1, 1, 2))
    assert first.images.shape == (13 if name == "mixup_class" else 10, *SIZE)
    logits = first.student(images(3))
    assert logits.shape == (3, 7) and bool(logits.isfinite().all())
    assert student_to_bytes(first.student) == student_to_bytes(again.student)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    described = describe(recipe)
    assert first.record["recipe"] == json.loads(json.dumps(described, allow_nan=False)) == described
    json.dumps(first.record, allow_nan=False)
    learned = [u["snr"] != u["snr_nearest"] for u in first.record["results"]["units"]]
    assert any(learned) if recipe.reconstruction else not any(learned)
    assert ("fine_tuning" in first.record["results"]) == (recipe.fine_tuning is not None)


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if isinstance(r.synthesis, MadeInBatches)])
def test_synthesis_lowers_its_loss(name: str, model: Teacher) -> None:
    events: list[Progress] = []
    run(model, shrunk(RECIPES[name]), progress=events.append)
    losses = [e.values["loss"] for e in events if e.stage == "synthesize" and "loss" in e.values]
    assert len(losses) > 5 and min(losses[-4:]) < 0.8 * losses[0]  # a step with crops may be higher


FINE_TUNED = {n: r.fine_tuning for n, r in RECIPES.items() if r.fine_tuning is not None}
TURNS = [name for name, tuning in FINE_TUNED.items() if tuning.turns is not None]


@pytest.mark.parametrize("name", TURNS)
def test_turns_lower_the_losses_of_both(name: str, model: Teacher) -> None:
    """Against a teacher whose logits tell images apart; means over the first and the last third."""
    network = copy.deepcopy(model.module)
    with torch.no_grad():
        network.get_parameter("fc.weight").mul_(20)
    sharp = Teacher(network, input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    recipe = shrunk(RECIPES[name], num_holdout=0)
    assert recipe.fine_tuning is not None
    rate = {"adasg": 1e-2, "adadfq": 1e-2, "gdfq": 1e-3}.get(name, 1e-4)
    tuning = replace(recipe.fine_tuning, epochs=9, iterations=4, batch_size=16, lr=rate)
    events: list[Progress] = []
    run(sharp, replace(recipe, fine_tuning=tuning), bits="W3A3", progress=events.append)
    seen = [e.values for e in events if e.stage == "fine-tune"]
    for part in ("loss", "generator_loss"):
        first, last = (sum(v[part] for v in some) / 6 for some in (seen[:6], seen[-6:]))
        assert last < first, part


@pytest.mark.parametrize("name", [n for n in FINE_TUNED if n not in TURNS])
def test_fine_tuning_lowers_its_loss(name: str, model: Teacher) -> None:
    recipe = shrunk(RECIPES[name])
    assert recipe.fine_tuning is not None
    tuning = replace(recipe.fine_tuning, epochs=12, iterations=3, batch_size=10, augment=False, lr=1e-4)
    tuning = replace(tuning, undo_rise=1e9)  # it rises at first, on so few images
    found = run(model, replace(recipe, fine_tuning=tuning), bits="W3A3").record["results"]["fine_tuning"]
    assert found["epochs"] == 12 and found["last"]["loss"] < 0.9 * found["first"]["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"fold_batch_norm": True},
        {"fine_tuning": FineTuning(epochs=1, iterations=2, batch_size=5), "low_pass": LowPass()},
        {"fine_tuning": FineTuning(epochs=1, iterations=2, maps=MapAlignment()), "fold_batch_norm": True},
        {"calibration": Calibration(method="minmax", symmetric=False)},
        {"calibration": Calibration(method="percentile", num_images=4)},
        {"synthesis": GaussianNoise(), "fold_batch_norm": True, "reconstruction": None},
        {"num_holdout": 0},
    ],
    ids=["fold", "tuned-low-pass", "tuned-fold", "minmax", "percentile", "noise-fold-nearest", "no-holdout"],
)
@pytest.mark.parametrize("bits", ["W4A4", "W3"])
def test_parts_that_no_recipe_pairs(changes: dict[str, Any], bits: str, model: Teacher) -> None:
    recipe = shrunk(replace(GENIE, **changes))
    found = run(model, recipe, bits=bits, ends="same")
    snr = found.record["results"]["estimated_without_data"]["calibration_images"]["snr"]
    assert 0 < snr < 100
