"""Images from latents that are of classes, and that differ in brightness and contrast."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_networks import SIZE, Residual, captured
from quantization_networks import Residual as QuantizedResidual
from quantization_networks import teacher
from torch import fx

import zsq.images.synthesize as synthesize_module
from zsq.errors import UsageError
from zsq.images.class_settings import ClassGuide
from zsq.images.forward import ForwardPass
from zsq.images.look_settings import Variety
from zsq.images.losses import InputStatistics
from zsq.images.prior import STANDARD, InputPrior
from zsq.images.settings import Refinement, Synthesis
from zsq.images.synthesize import synthesize, synthesize_batch
from zsq.images.variety import LEAST_CONTRAST, draw_looks, looks_of
from zsq.pipeline import quantize
from zsq.recipe import Recipe, Reconstruction
from zsq.recipe_fields import describe, with_overrides
from zsq.recipes.genie import GENIE
from zsq.recover.settings import FineTuning

SETTINGS = Synthesis(num_images=16, batch_size=16, steps=60, latent_size=16)
PRIOR = InputPrior((0.5, -0.3, 0.1), (2.0, 0.5, 1.5))
SHORT = replace(
    GENIE,
    num_holdout=0,
    synthesis=replace(SETTINGS, batch_size=8, steps=3, classes=ClassGuide(weight=0.1), variety=Variety()),
    reconstruction=Reconstruction(steps=2),
)


@pytest.fixture(scope="module")
def residual() -> fx.GraphModule:
    return captured(Residual)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_looks_leave_all_pixels_mean_0_and_deviation_1(channels: int) -> None:
    settings = Variety(brightness=0.5, tint=0.1, contrast=0.2)
    mean, std = draw_looks(2000, channels, settings, rng())
    assert mean.shape == (2000, channels) and std.shape == (2000, channels)
    torch.testing.assert_close(mean.mean(0), torch.zeros(channels), rtol=0, atol=1e-6)
    torch.testing.assert_close((mean.square() + std.square()).mean(0), torch.ones(channels))
    assert float(mean.mean(1).std()) == pytest.approx(0.5, rel=0.06)
    assert float(std[:, 0].std()) == pytest.approx(0.2, rel=0.1)
    if channels > 1:
        assert float((mean - mean.mean(1, keepdim=True)).std()) == pytest.approx(
            0.1 * (2 / 3) ** 0.5, rel=0.1
        )


def test_looks_without_variety_are_those_published() -> None:
    mean, std = draw_looks(6, 3, Variety(brightness=0, tint=0, contrast=0), rng())
    assert torch.equal(mean, torch.zeros(6, 3))
    torch.testing.assert_close(std, torch.ones(6, 3))


def test_no_image_is_without_contrast() -> None:
    _, std = draw_looks(5000, 1, Variety(brightness=0.7, tint=0.1, contrast=0.5), rng())
    assert float(std.min()) > 0.8 * LEAST_CONTRAST


@pytest.mark.parametrize("prior", [STANDARD, PRIOR])
def test_images_cost_nothing_with_the_looks_that_they_have(prior: InputPrior) -> None:
    images = prior.apply(
        torch.randn(5, *SIZE, generator=rng()) * torch.rand(5, 1, 1, 1, generator=rng(1)) * 2
    )
    forward = ForwardPass(images=images, norms=(), logits=None)
    assert float(InputStatistics(prior, looks_of(images, prior))(forward)) < 1e-10
    mean, std = looks_of(images, prior)
    expected = ((mean - 0.5).square() + (std - 2).square()).sum() / 5
    found = InputStatistics(prior, (torch.full((5, 3), 0.5), torch.full((5, 3), 2.0)))(forward)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("prior", [STANDARD, PRIOR])
def test_images_come_to_differ(residual: fx.GraphModule, prior: InputPrior) -> None:
    def between(settings: Synthesis) -> float:
        batch = synthesize_batch(
            residual, settings, SIZE, 16, rng=rng(), log=lambda *_: None, prior=prior, where="batch"
        )
        return float(looks_of(batch.images, prior)[0].mean(1).std())

    assert between(SETTINGS) < 0.1
    assert between(replace(SETTINGS, variety=Variety(), image_weight=10.0)) > 0.3


def test_images_come_to_be_of_their_class(residual: fx.GraphModule) -> None:
    made: dict[str, dict[str, torch.Tensor]] = {}
    logs: list[dict[str, float]] = []
    settings = replace(SETTINGS, num_images=20, batch_size=10, classes=ClassGuide(weight=1.0))
    images = synthesize(
        residual, settings, SIZE, seed=0, finished=made, log=lambda n, s, t, values: logs.append(values)
    )
    labels = torch.cat([piece["labels"] for piece in made.values()])
    assert torch.bincount(labels).tolist() == [4] * 5
    plain = synthesize(residual, SETTINGS, SIZE, seed=0, finished={}, log=lambda *_: None)
    own = residual(images).log_softmax(1).gather(1, labels[:, None]).mean()
    other = residual(plain).log_softmax(1).gather(1, labels[:16, None]).mean()
    assert own > other + 0.5
    assert {"loss", "bn", "image", "class"} < set(logs[0]) and logs[-1]["class"] < logs[0]["class"]


def test_tables_are_the_steps(monkeypatch: pytest.MonkeyPatch, residual: fx.GraphModule) -> None:
    """As in `test_replay`, of a loss with more parts."""
    settings = replace(SETTINGS, steps=4, variety=Variety(), classes=ClassGuide(second_share=0.3))
    labels, second = torch.arange(16) % 5, (torch.arange(16) + 1) % 5

    def run() -> tuple[torch.Tensor, list[dict[str, float]]]:
        logs: list[dict[str, float]] = []
        batch = synthesize_batch(
            residual,
            settings,
            SIZE,
            16,
            rng=rng(),
            log=lambda step, values: logs.append(values),
            labels=labels,
            second=second,
        )
        return batch.images, logs

    images, logs = run()
    monkeypatch.setattr(synthesize_module, "can_record", lambda _: True)
    again, others = run()
    assert (again - images).abs().mean() < 2e-3
    for values, other in zip(logs, others, strict=True):
        assert values == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("swing", [False, True])
def test_a_refinement_keeps_classes_and_looks(tmp_path: Path, swing: bool) -> None:
    """SADAG on such images, killed in the middle: the same bits after resuming, and the labels with them."""
    recipe = replace(SHORT, refinement=Refinement(steps=2, warmup_steps=1, swing=swing))
    model = teacher(QuantizedResidual)

    class Killed(Exception):
        pass

    def stop(event: Any) -> None:
        if event.stage == "refine" and event.item.startswith("batch 2"):
            raise Killed

    options: dict[str, Any] = {"recipe": recipe, "bits": "W3A3", "budget": "paper"}
    whole = quantize(model, **options)
    with pytest.raises(Killed):
        quantize(model, **options, out=tmp_path / "run", progress=stop)
    resumed = quantize(model, **options, out=tmp_path / "run")
    assert torch.equal(resumed.images, whole.images)
    assert whole.labels is not None and resumed.labels is not None
    assert torch.equal(resumed.labels, whole.labels) and len(whole.labels) == 16


def test_they_are_settings_of_any_recipe_with_a_generator_of_latents() -> None:
    recipe = with_overrides(GENIE, {"synthesis.variety": "on", "synthesis.classes": "on"})
    assert recipe.synthesis == replace(Synthesis(), variety=Variety(), classes=ClassGuide())
    assert "variety" not in describe(GENIE)["synthesis"] and "classes" not in describe(GENIE)["synthesis"]
    assert describe(recipe)["synthesis"]["variety"]["brightness"] == 0.45


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="synthesis.variety.tint"):
        Variety(tint=-0.1)
    with pytest.raises(UsageError, match="add up to at most"):
        Variety(brightness=0.9)


def test_nothing_is_said_of_classes_that_no_loss_takes() -> None:
    """Images of three steps are of no class: said where labels are trained on, not where they are one aim."""
    model = teacher(QuantizedResidual)

    def found(recipe: Recipe) -> list[str]:
        run = quantize(model, recipe=recipe, bits="W3A3", budget="paper")
        return [f["what"] for f in run.record["results"]["findings"] if "class asked for" in f["what"]]

    tuned = replace(SHORT, fine_tuning=FineTuning(epochs=1, iterations=1, batch_size=4))
    assert not found(SHORT) and len(found(tuned)) == 1
