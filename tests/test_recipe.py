import json
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from tiny_networks import message

from zsq.budget import (
    BUDGETS,
    COUNTS,
    FINE_TUNING_CLIP,
    FINE_TUNING_COUNTS,
    FINE_TUNING_FACTOR,
    LARGE_FACTOR,
    MAX_LR_ROUNDING,
    MAX_REFINEMENT_FACTOR,
    MAX_SCALES_FACTOR_OF_2_BITS,
    REFINEMENT_COUNTS,
    TRAVEL,
    TRAVEL_OF_4_BITS,
    with_budget,
)
from zsq.errors import UsageError
from zsq.image_budget import LARGE_BATCH, PIXEL_CLASS_WEIGHT
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import PixelSynthesis
from zsq.images.settings import Filter, LowPass, Synthesis
from zsq.pipeline import compose_recipe
from zsq.recipe import Calibration, GaussianNoise, GivenImages, Recipe, Reconstruction
from zsq.recipe_fields import describe, flat, with_overrides
from zsq.recipes import RECIPES, get_recipe
from zsq.recipes.genie import GENIE
from zsq.recover.settings import ClassLabels, FineTuning, MapAlignment

NOISE_NEAREST = RECIPES["noise-nearest"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("synthesis.steps", 500, 500),
        ("synthesis.steps", "500", 500),
        ("synthesis.steps", 500.0, 500),
        ("synthesis.lr_latent", "1e-2", 0.01),
        ("synthesis.lr_latent", 1, 1.0),
        ("synthesis.swing", "false", False),
        ("synthesis.swing", "True", True),
        ("synthesis.swing", False, False),
        ("synthesis.precision", "bfloat16", "bfloat16"),
        ("calibration.method", "minmax", "minmax"),
        ("scheme.activation_bits", "none", None),
        ("scheme.activation_bits", None, None),
        ("scheme.activation_bits", "3", 3),
        ("fold_batch_norm", "true", True),
        ("num_holdout", 0, 0),
        ("name", "mine", "mine"),
    ],
)
def test_overrides_of_every_type(name: str, value: Any, expected: Any) -> None:
    changed = with_overrides(GENIE, {name: value})
    got = flat(changed)[name]
    assert got == expected and type(got) is type(expected)
    others = {key: v for key, v in flat(changed).items() if key != name}
    assert others == {key: v for key, v in flat(GENIE).items() if key != name}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("sythesis.steps", 1, r"no setting 'sythesis.steps'.*synthesis"),
        ("synthesis.step", 1, r"no setting 'synthesis.step'.*steps"),
        ("synthesis", "none", r"no setting 'synthesis'"),
        ("", 1, r"no setting ''"),
        ("synthesis.steps.more", 1, r"no setting 'synthesis.steps.more': 'steps' is a single value, 4000"),
        ("synthesis.steps", "many", r"'synthesis.steps' needs a value of type int, got 'many'"),
        ("synthesis.steps", 5.5, r"type int, got 5.5"),
        ("synthesis.steps", "5.5", r"type int, got '5.5'"),
        ("synthesis.steps", True, r"type int, got True"),
        ("synthesis.steps", None, r"type int, got None"),
        ("synthesis.steps", math.nan, r"type int, got nan"),
        ("synthesis.steps", math.inf, r"type int, got inf"),
        ("synthesis.steps", 0, r"steps is 0. Expected at least 1"),
        ("synthesis.steps", -3, r"not negative, got -3"),
        ("synthesis.lr_latent", "nan", r"finite number that is not negative, got nan"),
        ("synthesis.lr_latent", "inf", r"finite number that is not negative, got inf"),
        ("synthesis.lr_latent", -0.1, r"not negative, got -0.1"),
        ("synthesis.lr_latent", 10**400, r"type float, got 1000"),
        ("synthesis.lr_latent", "", r"type float, got ''"),
        ("synthesis.swing", 1, r"type bool, got 1"),
        ("synthesis.swing", "yes", r"type bool, got 'yes'"),
        ("synthesis.precision", "float16", r"one of 'float32', 'bfloat16', got 'float16'"),
        ("calibration.method", "guess", r"error, minmax or percentile"),
        ("calibration.method", 3, r"type str, got 3"),
        ("scheme.activation_bits", "many", r"type int or NoneType, got 'many'"),
        ("scheme.activation_bits", 9, r"between 2 and 8, got 9"),
        ("scheme.ends", "float", r"ends must be one of"),
        ("reconstruction.drop_prob", 1.5, r"between 0 and 1, got 1.5"),
        ("reconstruction.steps", 0, r"reconstruction.steps must be at least 1, got 0"),
        ("reconstruction.batch_size", 0, r"reconstruction.batch_size must be at least 1"),
        ("reconstruction.beta_end", 0.5, r"reconstruction.beta_end must be at least 1"),
        ("calibration.num_images", 0, r"calibration.num_images must be at least 1"),
    ],
)
def test_overrides_refused(name: str, value: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        with_overrides(GENIE, {name: value})
    assert "\n" not in str(caught.value)


def test_overrides_of_a_stage_that_the_recipe_does_not_use() -> None:
    with pytest.raises(
        UsageError, match="'reconstruction.steps' is inside 'reconstruction', which this recipe"
    ):
        with_overrides(NOISE_NEAREST, {"reconstruction.steps": 5})
    with pytest.raises(UsageError, match="type Reconstruction or NoneType"):
        with_overrides(NOISE_NEAREST, {"reconstruction": 5})
    assert with_overrides(NOISE_NEAREST, {"reconstruction": "none"}) == NOISE_NEAREST
    assert with_overrides(NOISE_NEAREST, {"reconstruction": "on"}).reconstruction == Reconstruction()
    chosen = with_overrides(GENIE, {"filter": "on", "filter.keep": "64"})
    assert chosen.filter == Filter(keep=64) and describe(chosen)["filter"]["keep"] == 64
    assert with_overrides(chosen, {"filter": "on"}) == chosen  # as it is, not as by default
    assert with_overrides(chosen, {"filter": "none"}) == GENIE
    nearest = with_overrides(GENIE, {"reconstruction": None})
    assert nearest.reconstruction is None and replace(nearest, reconstruction=Reconstruction()) == GENIE
    with pytest.raises(UsageError, match="no setting 'filter'"):
        with_overrides(chosen, {"filter": 64})
    with pytest.raises(UsageError, match="at least 1"):
        with_overrides(NOISE_NEAREST, {"synthesis.num_images": 0})


def test_fine_tuning_and_its_parts_are_settings_of_any_recipe() -> None:
    chosen = with_overrides(
        GENIE,
        {
            "fine_tuning": "on",
            "fine_tuning.maps": "on",
            "fine_tuning.maps.weight": "200",
            "fine_tuning.labels": "on",
            "fine_tuning.labels.threshold": 0.5,
            "fine_tuning.low_pass": "on",
            "fine_tuning.low_pass.unit": "bins",
            "fine_tuning.low_pass.cutoff": 8,
            "low_pass": "on",
        },
    )
    assert chosen.fine_tuning == FineTuning(
        maps=MapAlignment(weight=200.0),
        labels=ClassLabels(threshold=0.5),
        low_pass=LowPass(cutoff=8.0, unit="bins"),
    )
    assert chosen.low_pass == LowPass() and chosen.reconstruction == GENIE.reconstruction
    assert describe(chosen)["fine_tuning"]["maps"] == {
        "kind": "MapAlignment",
        "weight": 200.0,
        "channels": "all",
    }
    assert "perturbation" not in describe(chosen)["fine_tuning"]
    with pytest.raises(UsageError, match="fine_tuning has no loss"):
        with_overrides(
            chosen,
            {"fine_tuning.maps": "none", "fine_tuning.labels": "none", "fine_tuning.distillation": "none"},
        )
    for name in ("hast", "synq"):
        recipe = RECIPES[name]
        assert recipe.scheme.ends == "same" and recipe.reconstruction is None


def test_several_overrides_apply_in_order() -> None:
    changed = with_overrides(
        GENIE, {"synthesis.steps": 5, "reconstruction.steps": 7, "synthesis.swing": False}
    )
    assert isinstance(changed.synthesis, Synthesis) and changed.reconstruction is not None
    assert (changed.synthesis.steps, changed.synthesis.swing, changed.reconstruction.steps) == (5, False, 7)
    assert with_overrides(GENIE, {}) is GENIE


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_describe_and_flat_are_json_and_complete(recipe: Recipe) -> None:
    described = describe(recipe)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    left_out = {f.name for f in fields(recipe) if f.default is None and getattr(recipe, f.name) is None}
    assert list(described) == [field.name for field in fields(Recipe) if field.name not in left_out]
    for field in fields(Recipe):
        stage = getattr(recipe, field.name)
        if is_dataclass(stage):
            assert described[field.name]["kind"] == type(stage).__name__
    settings = flat(recipe)
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    for name, value in settings.items():  # every name that is shown can be set
        if value is not None:
            assert with_overrides(recipe, {name: value}) == recipe
            assert with_overrides(recipe, {name: str(value)}) == recipe
        else:
            assert with_overrides(recipe, {name: "none"}) == recipe


def test_every_default_is_written_down_where_genie_published_it() -> None:
    # Card, section (c)
    settings = flat(GENIE)
    published = {
        "synthesis.num_images": 1024,
        "synthesis.batch_size": 128,
        "synthesis.steps": 4000,
        "synthesis.latent_size": 256,
        "synthesis.lr_latent": 0.1,
        "synthesis.lr_generator": 0.01,
        "reconstruction.steps": 20000,
        "reconstruction.batch_size": 32,
        "reconstruction.lr_rounding": 1e-3,
        "reconstruction.lr_weight_scale": 1e-4,
        "reconstruction.lr_activation_scale": 4e-5,
        "reconstruction.rounding_weight": 1.0,
        "reconstruction.warmup": 0.2,
        "reconstruction.beta_start": 20.0,
        "reconstruction.beta_end": 2.0,
        "reconstruction.drop_prob": 0.5,
        "reconstruction.input_mix_prob": 0.5,
        "calibration.exponent": 2.4,
    }
    assert {name: settings[name] for name in published} == published


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_budgets(recipe: Recipe, budget: str) -> None:
    scaled = with_budget(recipe, budget)
    if budget == "paper":
        assert scaled is recipe
        published_for_large = with_budget(recipe, budget, input_size=(3, 224, 224))
        if recipe.fine_tuning is None:
            assert published_for_large is recipe
        else:
            tuning = published_for_large.fine_tuning
            assert tuning is not None and tuning.batch_size == LARGE_BATCH
            assert tuning.lr == pytest.approx(LARGE_FACTOR * recipe.fine_tuning.lr)
            same = replace(tuning, batch_size=recipe.fine_tuning.batch_size, lr=recipe.fine_tuning.lr)
            source = recipe.synthesis
            generated = isinstance(source, GeneratorSynthesis)
            assert (published_for_large.synthesis == source) != generated
            assert replace(published_for_large, fine_tuning=same, synthesis=source) == recipe
        return
    num_images, synthesis_steps, reconstruction_steps = COUNTS[budget, False]
    assert with_budget(recipe, budget, input_size=(3, 64, 64)) == scaled
    large = with_budget(recipe, budget, input_size=(3, 224, 224))
    if isinstance(recipe.synthesis, PixelSynthesis):  # never more than was published
        assert scaled.synthesis.num_images == min(num_images, recipe.synthesis.num_images)
        assert isinstance(scaled.synthesis, PixelSynthesis)
        assert scaled.synthesis.steps == min(synthesis_steps, recipe.synthesis.steps)
        assert scaled.synthesis.cosine is not None and scaled.synthesis.lr <= recipe.synthesis.lr
        if recipe.synthesis.cosine is None:
            assert scaled.synthesis.start == "natural" and scaled.synthesis.valid_pixels
        else:
            assert scaled.synthesis.start == "white"
        guides = scaled.synthesis.classes, recipe.synthesis.classes
        weights = [guide.weight for guide in guides if guide is not None]
        highest = math.inf if recipe.synthesis.bn is None else PIXEL_CLASS_WEIGHT
        assert weights == ([min(weights[1], highest), weights[1]] if weights else [])
        assert large.synthesis.num_images == COUNTS[budget, True][0]
        if recipe.synthesis.centres is not None:  # of 1000 classes they would take most of the time
            assert scaled.synthesis.centres.classes is None
            assert large.synthesis.centres.classes == large.synthesis.num_images
    else:  # filters leave as many
        assert _left(scaled) == num_images and _left(large) == COUNTS[budget, True][0]
        assert scaled.synthesis.num_images / num_images == recipe.synthesis.num_images / _left(recipe)
    if isinstance(scaled.synthesis, Synthesis):
        assert scaled.synthesis.steps == synthesis_steps
    if scaled.reconstruction is None:
        assert recipe.reconstruction is None
    else:
        assert scaled.reconstruction.steps == reconstruction_steps
        published = recipe.reconstruction
        assert published is not None
        rate = scaled.reconstruction.lr_rounding
        assert published.lr_rounding < rate <= MAX_LR_ROUNDING
        assert rate * reconstruction_steps == pytest.approx(TRAVEL_OF_4_BITS)
        assert replace(scaled.reconstruction, steps=published.steps, lr_rounding=1e-3) == published
    if scaled.refinement is not None and recipe.refinement is not None:
        counts = (scaled.refinement.steps, scaled.refinement.warmup_steps)
        assert counts == REFINEMENT_COUNTS[budget, False]
        factor = scaled.refinement.lr_generator / recipe.refinement.lr_generator
        assert scaled.refinement.lr_latent == pytest.approx(factor * recipe.refinement.lr_latent)
        assert factor == pytest.approx(min(500 / counts[0], MAX_REFINEMENT_FACTOR))
    if scaled.fine_tuning is not None and recipe.fine_tuning is not None:
        tuning, published_tuning = scaled.fine_tuning, recipe.fine_tuning
        counts = (tuning.epochs, tuning.iterations, tuning.batch_size)
        assert counts == FINE_TUNING_COUNTS[budget, False]
        assert tuning.lr == pytest.approx(FINE_TUNING_FACTOR * published_tuning.lr)
        assert 0 < tuning.lr_decay_epochs < tuning.epochs and tuning.lr_decays == 1
        weights = [labels and labels.weight for labels in (tuning.labels, published_tuning.labels)]
        assert weights[0] == weights[1] and (tuning.clip, published_tuning.clip) == (FINE_TUNING_CLIP, None)
        losses = ("distillation", "maps", "features", "perturbation", "low_pass", "ranges")
        assert all(getattr(tuning, name) == getattr(published_tuning, name) for name in losses)
        assert large.fine_tuning.lr == pytest.approx(tuning.lr * LARGE_FACTOR)
    stages = ("synthesis", "refinement", "filter", "reconstruction", "fine_tuning")
    published_stages = {name: getattr(recipe, name) for name in stages}
    assert replace(scaled, **published_stages) == recipe


def test_fewer_bits_round_at_a_larger_rate() -> None:
    rates = []
    for bits in ("W2A4", "W3A3", "W4A4", "W5A4"):
        learning = compose_recipe("genie", bits=bits, budget="standard").reconstruction
        assert learning is not None
        rates.append(learning.lr_rounding * learning.steps)
    assert rates == pytest.approx([TRAVEL, TRAVEL, TRAVEL_OF_4_BITS, TRAVEL_OF_4_BITS])


def test_step_sizes_move_faster_at_2_bits() -> None:
    published = Reconstruction()
    factors = []
    for bits, budget in (("W2A2", "quick"), ("W2A2", "standard"), ("W2A4", "quick"), ("W2", "quick")):
        learning = compose_recipe("genie", bits=bits, budget=budget).reconstruction
        assert learning is not None
        factors.append(learning.lr_weight_scale / published.lr_weight_scale)
        assert learning.lr_activation_scale == pytest.approx(factors[-1] * published.lr_activation_scale)
    assert factors == pytest.approx([MAX_SCALES_FACTOR_OF_2_BITS, MAX_SCALES_FACTOR_OF_2_BITS, 1, 1])
    assert compose_recipe("genie", bits="W2A2", budget="paper").reconstruction == published


def _left(recipe: Recipe) -> int:
    """Images after all filters."""
    count, chosen = recipe.synthesis.num_images, recipe.filter
    while chosen is not None:
        count, chosen = chosen.keep, chosen.then
    return count


def test_stages_that_are_put_in_have_the_counts_of_the_budget() -> None:
    """Also before settings of theirs, which hold in any order."""
    overrides = {"fine_tuning.lr": 1e-3, "reconstruction": "on", "fine_tuning": "on"}
    recipe = compose_recipe("dfq", budget="quick", overrides={k: overrides[k] for k in sorted(overrides)})
    assert recipe.reconstruction is not None and recipe.fine_tuning is not None
    assert recipe.reconstruction.steps == COUNTS["quick", False][2]
    tuning = recipe.fine_tuning
    assert (tuning.epochs, tuning.iterations, tuning.batch_size) == FINE_TUNING_COUNTS["quick", False]
    assert tuning.lr == 1e-3


def test_budgets_grow() -> None:
    for large in (False, True):
        quick, standard = COUNTS["quick", large], COUNTS["standard", large]
        assert all(a <= b for a, b in zip(quick, standard, strict=True)) and quick != standard
    for budget in ("quick", "standard"):
        assert all(a < b for a, b in zip(COUNTS[budget, True], COUNTS[budget, False], strict=True))


def test_compose_recipe() -> None:
    found = compose_recipe(
        "genie", bits="w3a5", ends="same", budget="quick", overrides={"synthesis.steps": 3}
    )
    assert found.scheme.bits == "W3A5" and found.scheme.ends == "same"
    assert isinstance(found.synthesis, Synthesis)
    assert (found.synthesis.steps, found.synthesis.num_images) == (3, COUNTS["quick", False][0])
    assert compose_recipe(GENIE) is GENIE  # the published counts unless a budget is asked for
    assert compose_recipe("genie", bits="W2").scheme.ends == GENIE.scheme.ends
    assert compose_recipe("genie", ends="same").scheme.bits == GENIE.scheme.bits
    assert "W4A4" in message(lambda: compose_recipe("genie", bits=""))
    assert "ends" in message(lambda: compose_recipe("genie", ends="float"))
    assert "'genei'" in message(lambda: compose_recipe("genei"))
    assert "'fast'" in message(lambda: compose_recipe("genie", budget="fast"))
    assert "genie" in message(lambda: get_recipe("x"))


def test_stages_check_their_settings() -> None:
    for make in (
        lambda: GaussianNoise(num_images=0),
        lambda: Calibration(num_images=0),
        lambda: Reconstruction(warmup=1.1),
        lambda: Reconstruction(input_mix_prob=-0.1),
        lambda: Reconstruction(drop_prob=math.nan),
    ):
        message(make)
    assert GivenImages(num_images=0).num_images == 0  # all of them
