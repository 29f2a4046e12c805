"""Refinement and filters in a whole run: paired with Genie, resumed, refused where they make no sense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import Residual, images, teacher
from test_pipeline import RESULTS, TINY, Killer, contents
from tiny_networks import message

import zsq
from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images
from zsq.progress import Progress
from zsq.recipe_images import Batches
from zsq.student import student_to_bytes

REFINED: dict[str, Any] = {
    **TINY,
    "num_holdout": 0,
    "refinement.steps": 3,
    "refinement.warmup_steps": 3,
    "refinement.lr_latent": 0.01,
    "refinement.lr_generator": 1e-3,
}
UNREFINED = {name: value for name, value in REFINED.items() if not name.startswith("refinement.")}


def run(model: Teacher, recipe: str = "sadag", **options: Any) -> zsq.Run:
    overrides = {**(REFINED if recipe == "sadag" else UNREFINED), **options.pop("overrides", {})}
    return quantize(model, **{"recipe": recipe, "bits": "W2A3", "seed": 3, **options}, overrides=overrides)


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


@pytest.fixture(scope="module")
def undisturbed(model: Teacher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("refined") / "run"
    run(model, out=folder)
    return contents(folder)


def test_refined_images_and_a_student_of_their_own(model: Teacher) -> None:
    before = model.sha256
    events: list[Progress] = []
    genie, sadag = run(model, "genie"), run(model, progress=events.append)
    assert model.sha256 == before
    assert genie.images.shape == sadag.images.shape and not torch.equal(genie.images, sadag.images)
    assert set(sadag.record["timings"]) - set(genie.record["timings"]) == {"refine"}
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["synthesize", "warm-up", "refine", "reconstruct"]
    for stage in stages:
        seen = [event for event in events if event.stage == stage]
        assert all(0 < event.done <= event.total for event in seen) and seen[-1].done == seen[-1].total
    logged = [line for line in sadag.metrics if line["stage"] == "refine"]
    assert {"loss", "bn", "match", "diversity"} <= logged[0].keys()


def test_without_weights_it_is_genie(model: Teacher) -> None:
    """The student of the warm-up leaves no trace, and both recipes share images and seeds."""
    still = {f"refinement.{part}_weight": 0 for part in ("bn", "match", "diversity")}
    genie, sadag = run(model, "genie"), run(model, overrides=still)
    assert torch.equal(genie.images, sadag.images)
    assert student_to_bytes(genie.student) == student_to_bytes(sadag.student)


def test_images_made_before_serve_both_recipes(model: Teacher, undisturbed: dict[str, bytes]) -> None:
    made: Batches = {}
    found = synthesize_images(model, recipe="genie", overrides=UNREFINED, seed=3, made=made)
    assert torch.equal(run(model, "genie", made=made).images, found)
    refined = run(model, made=made)
    assert student_to_bytes(refined.student) == undisturbed["student.safetensors"]
    only_images = {name: {"images": piece["images"]} for name, piece in made.items()}
    again = run(model, made=only_images)  # the sources are missing, so the batches are made again
    assert student_to_bytes(again.student) == undisturbed["student.safetensors"]


def test_only_the_images_of_a_recipe_that_refines(
    model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"recipe": "sadag", "overrides": REFINED, "seed": 3}
    synthesize_images(model, **arguments, bits="W2A3", out=tmp_path / "images")
    name = "images.safetensors"
    assert contents(tmp_path / "images")[name] == undisturbed[name]
    other, eight = (synthesize_images(model, **arguments, bits=bits) for bits in ("W4A4", "W8A8"))
    assert not torch.equal(other, eight)
    assert torch.equal(eight, run(model, "genie").images)  # nothing to refine against


def test_interrupted_at_any_event_and_continued(
    model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    events: list[Progress] = []
    run(model, out=tmp_path / "count", progress=events.append)
    positions = {
        stage: [i for i, event in enumerate(events) if event.stage == stage]
        for stage in ("synthesize", "warm-up", "refine", "reconstruct")
    }
    assert len({events[i].item for i in positions["refine"]}) == 2
    chosen = {positions[stage][k] for stage in ("warm-up", "refine") for k in (0, len(positions[stage]) // 2)}
    for at in sorted({*chosen, positions["refine"][-1], positions["reconstruct"][1]}):
        out = tmp_path / f"run-{at}"
        with pytest.raises(KeyboardInterrupt):
            run(model, out=out, progress=Killer(at))
        seen: list[Progress] = []
        run(model, out=out, progress=seen.append)
        assert all(contents(out)[name] == undisturbed[name] for name in RESULTS), at
        first, second = (json.loads(files["run.json"]) for files in (contents(out), undisturbed))
        assert first["results"] == second["results"]
        if at > positions["refine"][-1]:
            kept = [event for event in seen if event.stage in ("synthesize", "warm-up", "refine")]
            assert all(event.resumed for event in kept)


ROUNDS: dict[str, Any] = {"refinement.rounds": 2}


def test_rounds_have_students_of_their_own(model: Teacher, tmp_path: Path) -> None:
    """Steps are shared, students are not; progress counts all of them, and any round can be continued."""
    out, events = tmp_path / "run", []
    whole = run(model, overrides=ROUNDS, out=out, progress=events.append)
    expected = contents(out)
    assert not torch.equal(whole.images, run(model).images)
    for stage in ("warm-up", "refine"):
        seen = [event for event in events if event.stage == stage]
        assert {event.item.split(", ")[1] for event in seen} == {"round 1 of 2", "round 2 of 2"}
        assert [event.done for event in seen] == sorted(event.done for event in seen)
        assert len({event.total for event in seen}) == 1 and seen[-1].done == seen[-1].total
    assert seen[-1].total == 2 * REFINED["refinement.steps"]  # of two batches
    at = next(
        k for k, e in enumerate(events) if e.stage == "refine" and e.item.startswith("batch 2 of 2, round 2")
    )
    first = next(k for k, e in enumerate(events) if e.stage == "warm-up" and e.item.endswith("round 2 of 2"))
    for position in (first, at):
        folder = tmp_path / f"run-{position}"
        with pytest.raises(KeyboardInterrupt):
            run(model, overrides=ROUNDS, out=folder, progress=Killer(position))
        again: list[Progress] = []
        run(model, overrides=ROUNDS, out=folder, progress=again.append)
        assert all(contents(folder)[name] == expected[name] for name in RESULTS)
        early = [e for e in again if e.item.endswith("round 1 of 2")]
        assert early and all(event.resumed for event in early)


def test_a_round_without_weights_changes_nothing(model: Teacher) -> None:
    still = {f"refinement.{part}_weight": 0 for part in ("bn", "match", "diversity")}
    assert torch.equal(run(model, "genie").images, run(model, overrides=still | ROUNDS).images)


@pytest.mark.parametrize(
    "options",
    [{"refinement.gradients": "all_units"}, {"fold_batch_norm": True}, {"synthesis.precision": "bfloat16"}],
    ids=["all-units", "fold", "bfloat16"],
)
def test_refinement_goes_with_other_settings(options: dict[str, Any], model: Teacher) -> None:
    found = run(model, overrides=options)
    assert bool(found.images.isfinite().all())
    genie = {name: value for name, value in options.items() if not name.startswith("refinement.")}
    assert not torch.equal(found.images, run(model, "genie", overrides=genie).images)


def test_refinement_needs_synthesis(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong = {"overrides": {"refinement": "on"}, "out": out}
    text = message(lambda: quantize(model, recipe="noise", **wrong))
    assert "GaussianNoise" in text and not out.exists()
    given = run(model, images=images(12))
    assert given.images.shape[0] == 12 and "refinement" not in given.record["recipe"]


@pytest.mark.parametrize("method", ["gradient_cover", "energy", "bn_sensitivity", "random"])
def test_filter(method: str, model: Teacher) -> None:
    chosen = {"filter": "on", "filter.method": method, "filter.keep": 7}
    every = run(model, "genie")
    some = run(model, "genie", overrides=chosen)
    index = [int((every.images == image).flatten(1).all(1).nonzero()) for image in some.images]
    assert len(index) == 7 and index == sorted(index)
    assert some.record["recipe"]["filter"]["keep"] == 7
    assert torch.equal(run(model, "genie", overrides=chosen).images, some.images)
    all_of_them = run(model, "genie", overrides={**chosen, "filter.keep": 20})
    assert student_to_bytes(all_of_them.student) == student_to_bytes(every.student)


def test_filter_of_given_images(model: Teacher) -> None:
    twins = images(5).repeat(4, 1, 1, 1)
    chosen = {"filter": "on", "filter.keep": 5, "filter.gradients": "all_units", "reconstruction.steps": 2}
    found = quantize(model, recipe="given", images=twins, overrides=chosen, bits="W3A3")
    assert len(torch.unique(found.images, dim=0)) == 5


def test_filters_one_after_another(model: Teacher) -> None:
    first = {"filter": "on", "filter.method": "energy", "filter.keep": 9}
    then = {"filter.then": "on", "filter.then.method": "bn_sensitivity", "filter.then.keep": 4}
    every, nine, four = (run(model, "genie", overrides=o).images for o in ({}, first, first | then))
    assert [len(x) for x in (nine, four)] == [9, 4]
    assert all(any(torch.equal(x, y) for y in nine) for x in four) and len(every) > 9


def test_filters_that_a_model_cannot_serve(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong = {"filter": "on", "filter.method": "patch_entropy"}
    assert "no" in message(lambda: quantize(model, overrides={**UNREFINED, **wrong}, out=out))
    assert not out.exists()
