"""The dry run: every stage with its steps, times that follow from the trial's, nothing written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytest import CaptureFixture
from quantization_networks import Residual, images, teacher
from tiny_networks import message

from zsq.cli import main
from zsq.forecast import TRIAL_STEPS, _Clock, forecast, planned_steps, trial_recipe
from zsq.images.prompts import TextToImage
from zsq.progress import Progress
from zsq.recipe import GaussianNoise
from zsq.recipes import get_recipe

SETTINGS: dict[str, Any] = {
    "synthesis.num_images": 20,
    "synthesis.batch_size": 10,
    "synthesis.steps": 40,
    "synthesis.latent_size": 8,
    "reconstruction.steps": 12,
    "num_holdout": 4,
}


def test_stages_and_steps_of_a_run() -> None:
    found = forecast(teacher(Residual), bits="W3A3", overrides=SETTINGS)
    steps = {stage.name: stage.steps for stage in found.stages}
    # Two batches of 40 steps, four units of 12, a batch of 40 for the held-out images.
    assert steps == {
        "capture": 0,
        "synthesize": 80,
        "quantize": 0,
        "reconstruct": 48,
        "holdout": 40,
        "inspect": 0,
    }
    assert all(stage.seconds >= 0 for stage in found.stages) and found.seconds > 0
    assert found.synthesis_bytes > 0 and found.reconstruction_bytes > found.cache_bytes > 0
    less = forecast(teacher(Residual), bits="W8A8", images=images(40), overrides=SETTINGS, memory="1kB")
    assert {stage.name: stage.steps for stage in less.stages}[
        "reconstruct"
    ] == 0  # at 8 bits nothing is learned
    assert less.reconstruction_bytes < found.reconstruction_bytes + found.cache_bytes
    assert "needs images" in message(lambda: forecast(teacher(Residual), recipe="given"))


def test_a_step_counts_between_events_of_one_item() -> None:
    times = iter([0.0, 10.0, 11.0, 13.0, 100.0, 103.0, 200.0])
    clock = _Clock(now=lambda: next(times))
    clock(Progress("synthesize", "batch 1", 1, 8))
    clock(Progress("reconstruct", "a", 1, 8))
    clock(Progress("reconstruct", "a", 2, 8))
    clock(Progress("reconstruct", "a", 4, 8))
    clock(Progress("reconstruct", "b", 5, 8))
    clock(Progress("reconstruct", "b", 6, 8))
    clock(Progress("reconstruct", "b", 6, 8, {"snr": 1.0}))
    # Of a: 1 s for one step, 2 s for two; of b: 3 s for one. The end of b has no step.
    assert clock.seconds == {"reconstruct": 6.0} and clock.steps == {"reconstruct": 4}
    assert clock.totals == {"synthesize": 8, "reconstruct": 8}


@pytest.mark.parametrize(
    "name", ["genie", "sadag", "synq", "gdfq", "texq", "psaq_vit", "zeroq", "dfq", "noise"]
)
def test_a_trial_is_short(name: str) -> None:
    recipe = get_recipe(name)
    short = trial_recipe(recipe)
    assert all(ratio == 1 for ratio in planned_steps(short).values())
    assert all(ratio >= 1 for ratio in planned_steps(recipe).values())
    assert short.reconstruction is None or short.reconstruction.steps == TRIAL_STEPS
    assert short.fine_tuning is None or short.fine_tuning.iterations == TRIAL_STEPS
    assert trial_recipe(short) == short


def test_text_is_left_out_of_the_trial() -> None:
    recipe = get_recipe("genq")
    assert isinstance(recipe.synthesis, TextToImage)
    assert isinstance(trial_recipe(replace(recipe, filter=None)).synthesis, GaussianNoise)


def test_command_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "quantize",
        "digits",
        "--dry-run",
        "--set",
        "synthesis.num_images=8",
        "--set",
        "synthesis.steps=30",
    ]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        out, err = capsys.readouterr()
        assert not ended.value.code and "nothing is written" in err and not list(tmp_path.iterdir())
    assert {stage["name"] for stage in json.loads(out)["stages"]} >= {"synthesize", "reconstruct"}
