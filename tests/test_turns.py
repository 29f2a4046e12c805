"""A generator trained in turns with a student: both change, resumed runs have the same bits, bad calls."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import Residual, images, made
from tiny_networks import message
from torch import Tensor

import zsq
from zsq.budget import FINE_TUNING_CLIP, GENERATED_DIFFICULTY, with_budget
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import Centres
from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images
from zsq.progress import Progress
from zsq.recipes import RECIPES
from zsq.recover import network_outputs
from zsq.recover.network_outputs import Observed
from zsq.recover.settings import Adaptability, FineTuning, Mixup, Turns
from zsq.recover.student_losses import adaptability_bounds, relative_agreement
from zsq.recover.tuning_step import mixed
from zsq.recover.turns import adaptability_loss
from zsq.rng import rng_for
from zsq.state import StateFolder

TINY: dict[str, Any] = {
    "synthesis.num_images": 10,
    "synthesis.batch_size": 8,
    "synthesis.steps": 3,
    "num_holdout": 4,
    "fine_tuning.epochs": 3,
    "fine_tuning.iterations": 2,
    "fine_tuning.batch_size": 8,
    "fine_tuning.lr": 1e-3,
}


@pytest.fixture(scope="module")
def model() -> Teacher:
    """Whose logits tell images apart."""
    network = made(Residual)
    with torch.no_grad():
        network.fc.weight.mul_(20)  # type: ignore[operator, union-attr]
    return Teacher(network, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)


def tiny(model: Teacher, **options: Any) -> zsq.Run:
    overrides = {**TINY, **options.pop("overrides", {})}
    arguments: dict[str, Any] = {"recipe": "adadfq", "bits": "W3A3", "overrides": overrides, "seed": 3}
    return quantize(model, **{**arguments, **options})


class Killed(Exception):
    pass


def test_killed_and_continued_the_same_bits(model: Teacher, tmp_path: Path) -> None:
    """Generator, optimizer and last images too, within an epoch and at its end."""
    tiny(model, out=tmp_path / "whole")
    names = ("student.safetensors", "images.safetensors")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    results = json.loads((tmp_path / "whole" / "run.json").read_text())["results"]
    for at in (3, 4):

        def kill(event: Progress, at: int = at) -> None:
            if event.stage == "fine-tune" and event.done == at:
                raise Killed

        out = tmp_path / f"run-{at}"
        with pytest.raises(Killed):
            tiny(model, out=out, progress=kill)
        assert "generator" in StateFolder(out / "state")
        events: list[Progress] = []
        tiny(model, out=out, progress=events.append)
        assert all((out / name).read_bytes() == content for name, content in whole.items())
        assert json.loads((out / "run.json").read_text())["results"] == results
        assert [e.resumed for e in events if e.stage == "synthesize"] == [True]


def test_the_generator_goes_on_and_its_last_images_are_kept(model: Teacher) -> None:
    events: list[Progress] = []
    run = tiny(model, recipe="gdfq", progress=events.append)
    first = synthesize_images(model, recipe="gdfq", bits="W3A3", overrides=TINY, seed=3)
    assert run.images.shape == first.shape and not torch.equal(run.images, first)
    assert run.labels is not None and len(run.labels.unique()) == 7
    again = tiny(model, recipe="gdfq", overrides={"fine_tuning.turns": "none"})
    assert torch.equal(again.images, first) and again.labels is not None
    assert torch.equal(run.labels, again.labels)
    assert not torch.equal(run.student(images(4)), again.student(images(4)))
    logged = [e.values for e in events if e.stage == "fine-tune"]
    parts = {"loss", "distillation", "labels", "lr"}
    assert set(logged[0]) == parts | {"generator_loss", "generator_bn", "generator_class"}
    assert logged[0]["loss"] == pytest.approx(logged[0]["distillation"] + logged[0]["labels"])


def test_the_teacher_is_asked_again_only_if_the_student_sees_other_images(
    model: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    call = Observed.__call__

    def spy(self: Observed, x: Tensor, labels: Tensor, *, maps: bool = True) -> Any:
        counts.append(len(x))
        return call(self, x, labels, maps=maps)

    monkeypatch.setattr(network_outputs.Observed, "__call__", spy)
    found = tiny(model, recipe="gdfq", overrides={"fine_tuning.epochs": 1}).record["results"]["fine_tuning"]
    assert counts == [8, 8]
    counts.clear()
    whole = {"fine_tuning.low_pass": "on", "fine_tuning.low_pass.cutoff": 1e6, "fine_tuning.epochs": 1}
    again = tiny(model, recipe="gdfq", overrides=whole).record["results"]["fine_tuning"]
    assert counts == [8] * 4
    for name, value in found["last"].items():
        assert again["last"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_eight_bits_take_the_first_images_and_other_stages_too(model: Teacher) -> None:
    first = synthesize_images(model, recipe="gdfq", overrides=TINY, seed=3)
    assert torch.equal(tiny(model, recipe="gdfq", bits="W8A8").images, first)
    learned = {"reconstruction": "on", "reconstruction.steps": 2, "fine_tuning": "none"}
    plain = {k: v for k, v in TINY.items() if not k.startswith("fine_tuning.")}
    run = quantize(model, recipe="gdfq", bits="W3A3", overrides={**plain, **learned}, seed=3)
    assert torch.equal(run.images, first) and "fine_tuning" not in run.record["results"]


def test_agreement_and_bounds_by_hand() -> None:
    """Three images, two classes. Differences (0, 0), (log 3, 0), (log 9, 0): softmax 1/2, 3/4 and 9/10."""
    teacher_logits = torch.tensor([[1.0, 1.0], [3.0, 0.0], [9.0, 0.0]]).log().nan_to_num(neginf=0.0)
    entropies = torch.tensor([[p, 1 - p] for p in (0.5, 0.75, 0.9)])
    h = -(entropies * entropies.log()).sum(1)
    expected = (h - h[2]) / (torch.log(torch.tensor(2.0)) - h[2])
    found = relative_agreement(torch.zeros(3, 2), teacher_logits)
    assert torch.allclose(found, expected, atol=1e-6) and found[0] == 1 and found[2] == 0
    loss = adaptability_bounds(found, lowest=0.25, highest=0.9)
    assert float(loss) == pytest.approx((0.1 + 0.25 + max(0.0, float(expected[1]) - 0.9)) / 3, abs=1e-6)
    same = relative_agreement(teacher_logits + 1, teacher_logits)
    assert same.tolist() == [1.0, 1.0, 1.0]


def test_game_by_hand() -> None:
    """Sum (2, 0), difference (0, 0) of one image of class 0, weights 0.5 x (0.2, 0.1)."""
    logits = torch.tensor([[1.0, 0.0]])
    parts = adaptability_loss(logits, logits, torch.tensor([0]), Adaptability(weight=0.5))
    assert float(parts["disagreement"]) == pytest.approx(0.1 * 0.693147, rel=1e-4)
    assert float(parts["agreement"]) == pytest.approx(0.05 * 0.126928, rel=1e-4)
    assert float(parts["bounds"]) == pytest.approx(1 - 0.8)


def test_gradients_of_the_game() -> None:
    rng = rng_for(0)
    teacher_logits = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])

    def total(x: Tensor) -> Tensor:
        return torch.stack(list(adaptability_loss(x, teacher_logits, labels, Adaptability()).values())).sum()

    x = torch.randn(4, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (x,))


def test_mixtures() -> None:
    batch = torch.eye(6).view(6, 1, 1, 6)  # image k is 1 at place k
    found = mixed(batch, Mixup(smallest=0.7), rng_for(0)).view(6, 6)
    own = found.diagonal()
    assert torch.allclose(found.sum(1), torch.ones(6)) and bool((own >= 0.7).all())
    assert len(own.unique()) > 3
    assert torch.equal(mixed(batch, Mixup(smallest=1.0), rng_for(0)), batch)


def test_budgets() -> None:
    recipe = RECIPES["texq"]
    quick = with_budget(recipe, "quick", input_size=(3, 32, 32))
    assert isinstance(quick.synthesis, GeneratorSynthesis) and quick.fine_tuning is not None
    assert (quick.synthesis.num_images, quick.synthesis.condition) == (128, "input")
    assert quick.synthesis.batch_size == quick.fine_tuning.batch_size == 64
    assert quick.synthesis.centres is not None and quick.synthesis.centres.steps == round(1500 * 150 / 800)
    assert (quick.synthesis.lr, quick.synthesis.class_weight) == (3e-3, 0.1 * quick.synthesis.bn.weight)
    game = with_budget(RECIPES["adadfq"], "quick", input_size=(3, 32, 32)).synthesis
    assert isinstance(game, GeneratorSynthesis) and (game.lr, game.class_weight) == (1e-3, 0.1)
    assert with_budget(recipe, "paper", input_size=(3, 32, 32)) is recipe
    for name, threshold in (("gdfq", GENERATED_DIFFICULTY), ("gdfq-synq", 0.5), ("intraq", 1.0)):
        tuning = with_budget(RECIPES[name], "quick", input_size=(3, 32, 32)).fine_tuning
        assert tuning is not None and tuning.clip == FINE_TUNING_CLIP
        assert tuning.labels is not None and tuning.labels.threshold == threshold
    large = with_budget(recipe, "paper", input_size=(3, 224, 224))
    assert isinstance(large.synthesis, GeneratorSynthesis) and large.fine_tuning is not None
    assert (large.synthesis.condition, large.synthesis.steps) == ("norms", 10000)
    assert large.synthesis.batch_size == large.fine_tuning.batch_size == 16


def test_wrong_calls_are_refused_before_anything_is_written(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for options, text in (
        ({"recipe": "synq", "overrides": {"fine_tuning.turns": "on"}}, "trains the generator of the images"),
        ({"overrides": {"low_pass": "on"}}, "fine_tuning.low_pass=on"),
        (
            {"recipe": "adadfq", "overrides": {"synthesis.second_share": 0.5}},
            "fine_tuning.turns.adaptability asks for images of one class",
        ),
        ({"overrides": {"fine_tuning.turns.adaptability.lowest": 0.9}}, "adaptability.lowest is 0.9"),
        ({"overrides": {"fine_tuning.mixup": "on", "fine_tuning.mixup.smallest": 0.2}}, "mixup.smallest"),
    ):
        assert text in message(lambda options=options: tiny(model, out=out, **options))  # type: ignore[misc]
    flat = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    no_classes = Teacher(flat, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert "logits" in message(lambda: tiny(no_classes, out=out)) and not out.exists()


def test_parts_that_no_recipe_pairs(model: Teacher) -> None:
    """Filter, maps, perturbation, augmentation and centres with turns."""
    recipe = replace(
        RECIPES["adadfq"],
        synthesis=GeneratorSynthesis(
            num_images=10, batch_size=8, steps=2, condition="norms", centres=Centres(steps=2)
        ),
        fine_tuning=replace(
            RECIPES["synq"].fine_tuning or FineTuning(),
            epochs=1,
            iterations=2,
            batch_size=8,
            ranges="kept",
            mixup=Mixup(),
            turns=Turns(adaptability=Adaptability()),
        ),
        num_holdout=2,
    )
    found = quantize(model, recipe=recipe, bits="W4A4", budget="paper").record["results"]["fine_tuning"]
    parts = {"bn", "bounds", "disagreement", "agreement", "centres", "loss"}
    assert {f"generator_{part}" for part in parts} <= set(found["first"])
    assert {"maps", "labels", "distillation", "perturbed"} <= set(found["first"])
