"""The generator of classes: sizes, what a class changes, what its training lowers, and where it goes on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from image_networks import SIZE, AfterReLU, NoBatchNorm, Residual, captured, trained
from quantization_networks import Residual as Deeper
from quantization_networks import made
from tiny_networks import message
from torch import Tensor, fx

from zsq.distributed import Group
from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.images.class_generator import ClassGenerator
from zsq.images.class_losses import SecondClass
from zsq.images.forward import observe
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.generator_training import GeneratorTraining, warm_up
from zsq.images.pixel_settings import Centres, StatisticsMatch
from zsq.images.prior import InputPrior
from zsq.images.statistics import image_statistics, pooled_statistics
from zsq.rng import rng_for

TINY = GeneratorSynthesis(num_images=20, batch_size=10, steps=5, latent_size=6)


@pytest.fixture(scope="module")
def teacher() -> fx.GraphModule:
    return captured(Residual)


@pytest.fixture(scope="module")
def sharp() -> fx.GraphModule:
    """Whose logits tell images apart."""
    network = made(Deeper)
    with torch.no_grad():
        network.fc.weight.mul_(20)  # type: ignore[operator, union-attr]
    return capture(network.requires_grad_(False), (3, 8, 8))


def begun(
    graph: fx.GraphModule, settings: GeneratorSynthesis = TINY, size: Any = SIZE, **options: Any
) -> GeneratorTraining:
    return GeneratorTraining(graph, settings, size, rng=rng_for(0, "parameters"), **options)


@pytest.mark.parametrize("condition", ["input", "norms"])
@pytest.mark.parametrize("size", [(3, 12, 12), (1, 8, 8), (1, 7, 13), (3, 5, 4)])
def test_sizes_scale_and_class(condition: Any, size: tuple[int, int, int]) -> None:
    generator = ClassGenerator(size, 4, latent_size=6, condition=condition, rng=rng_for(0))
    latents, labels = torch.randn(9, 6, generator=rng_for(1)), torch.arange(9) % 4
    images = generator(latents, labels)
    assert images.shape == (9, *size) and images.dtype == torch.float32
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(size[0]), atol=1e-4)
    assert torch.allclose(images.var((0, 2, 3), correction=0), torch.ones(size[0]), rtol=1e-2)
    with torch.no_grad():
        for table in (*generator.scales, *generator.shifts) if condition == "norms" else ():
            table.normal_(generator=rng_for(2))
    assert not torch.allclose(generator(latents, labels), generator(latents, (labels + 1) % 4))
    assert torch.equal(generator(latents, labels), generator(latents, labels))


@pytest.mark.parametrize("condition", ["input", "norms"])
def test_two_classes_are_mixed(condition: Any) -> None:
    """Half of each is the same in either order; at a vanishing share the image is of the first alone."""
    generator = ClassGenerator(SIZE, 4, latent_size=6, condition=condition, rng=rng_for(0))
    with torch.no_grad():
        for table in (*generator.scales, *generator.shifts) if condition == "norms" else ():
            table.normal_(generator=rng_for(2))
    latents, labels = torch.randn(9, 6, generator=rng_for(1)), torch.arange(9) % 4
    others = (labels + 1) % 4

    def images(first: Tensor, second: Tensor, share: float) -> Tensor:
        return generator(latents, first, SecondClass(second, share))  # type: ignore[no-any-return]

    assert torch.allclose(images(labels, others, 0.5), images(others, labels, 0.5), atol=1e-5)
    assert torch.allclose(images(labels, others, 1e-9), generator(latents, labels), atol=1e-4)
    assert not torch.allclose(images(labels, others, 0.5), generator(latents, labels), atol=1e-2)


def test_training_on_two_classes_lowers_their_divergence(sharp: fx.GraphModule) -> None:
    settings = replace(
        TINY, steps=80, batch_size=30, lr=1e-2, bn=StatisticsMatch(weight=0.01), second_share=0.4
    )
    training, parts = begun(sharp, settings, (3, 8, 8)), []
    warm_up(training, rng_for(1), lambda _, values: parts.append(values["class"]))
    assert sum(parts[-4:]) < 0.7 * sum(parts[:4])
    images, labels = training.draw(20, rng_for(2))
    assert images.shape == (20, 3, 8, 8) and labels.shape == (20,)
    with pytest.raises(UsageError, match=r"second_share is 0.4.*centres=none"):
        replace(settings, centres=Centres())


@pytest.mark.parametrize("condition", ["input", "norms"])
def test_every_parameter_gets_a_gradient_that_reaches_its_own_class_only(condition: Any) -> None:
    generator = ClassGenerator((3, 8, 8), 5, latent_size=6, condition=condition, rng=rng_for(0))
    images = generator(torch.randn(4, 6, generator=rng_for(1)), torch.tensor([0, 0, 2, 2]))
    (images * torch.randn(images.shape, generator=rng_for(2))).sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    tables = [generator.classes] if condition == "input" else [*generator.scales, *generator.shifts]
    for table in tables:
        assert table.grad is not None
        touched = table.grad.abs().sum(1) > 0
        assert touched.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("condition", ["input", "norms"])
def test_training_lowers_the_loss_and_images_show_their_own_class(
    condition: Any, sharp: fx.GraphModule
) -> None:
    settings = replace(TINY, batch_size=16, steps=60, condition=condition)
    training = begun(sharp, settings, (3, 8, 8))

    def surprise() -> list[float]:
        """Cross-entropy of the classes that the images were made for, and of each other one in turn."""
        images, labels = training.draw(70, rng_for(3))
        logits = observe(sharp, logits=True)(images).logits
        assert logits is not None
        return [float(torch.nn.functional.cross_entropy(logits, (labels + k) % 7)) for k in range(7)]

    before, seen = surprise(), []
    warm_up(training, rng_for(1), lambda _, values: seen.append(values))
    assert len(seen) == 21 and set(seen[0]) == {"loss", "bn", "class"}
    first, last = (sum(v["class"] for v in some) / 5 for some in (seen[:5], seen[-5:]))
    after = surprise()
    assert last < 0.75 * first and after[0] < 0.6 * before[0] and after[0] < min(after[1:])


def test_the_batch_norm_distance_falls(teacher: fx.GraphModule) -> None:
    settings = replace(TINY, steps=60, class_weight=0.0, bn=StatisticsMatch(spread="variance"))
    seen: list[dict[str, float]] = []
    warm_up(begun(teacher, settings), rng_for(1), lambda _, values: seen.append(values))
    assert seen[-1]["bn"] < 0.5 * seen[0]["bn"]
    assert seen[-1]["loss"] == pytest.approx(seen[-1]["bn"])


def test_one_seed_gives_the_same_bits_and_a_state_goes_on(teacher: fx.GraphModule) -> None:
    whole, first = begun(teacher), begun(teacher)
    rngs = [rng_for(1), rng_for(1)]
    for _ in range(4):
        whole.step(10, rngs[0])
    for _ in range(2):
        first.step(10, rngs[1])
    second = begun(teacher)
    second.load(first.state())
    for _ in range(2):
        second.step(10, rngs[1])
    kept = whole.state()
    assert any(name.startswith("exp_avg_sq.") for name in kept)
    assert all(torch.equal(value, second.state()[name]) for name, value in kept.items())
    one, two = whole.draw(20, rng_for(5)), second.draw(20, rng_for(5))
    assert torch.equal(one[0], two[0]) and one[1].bincount(minlength=5).tolist() == [4] * 5


def test_another_loss_of_classes_and_rate(teacher: fx.GraphModule) -> None:
    """It sees the images with history and what the teacher says of them."""
    training = begun(teacher)
    before = training.state()

    def none(images: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert images.requires_grad and logits.shape == (10, 5) and labels.shape == (10,)
        return {"other": logits.square().mean()}

    made_ = training.step(10, rng_for(0), class_loss=none, lr_factor=0.0)
    assert set(made_.parts) == {"loss", "bn", "other"} and not made_.images.requires_grad
    after = training.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_centres_hold_each_image_to_that_of_its_class(teacher: fx.GraphModule) -> None:
    """Its own centre: nothing to pay for images that are the centres."""
    centres = torch.randn(5, *SIZE, generator=rng_for(4))
    settings = replace(TINY, centres=Centres(weight=1.0), bn=StatisticsMatch(spread="variance", weight=0.1))
    training = begun(teacher, settings, centres=centres)
    parts = training.step(10, rng_for(0)).parts
    assert float(parts["centres"]) > 0
    images = centres[torch.tensor([3, 1, 1])]
    training._images = lambda latents, labels: images.clone().requires_grad_()  # type: ignore[method-assign]
    labels = iter((torch.tensor([3, 1, 1]), torch.tensor([3, 1, 2])))
    found = []
    for _ in range(2):
        forward = training._observer(images)
        own = next(labels)
        assert training._centres is not None
        of_images = [(m[own], v[own]) for m, v in training._centres]
        from zsq.images.statistics import with_targets

        found.append(float(training._to_centres(with_targets(forward, of_images))))
    assert found[0] == pytest.approx(0.0, abs=1e-6) and found[1] > 1e-3


def test_statistics_of_images(teacher: fx.GraphModule) -> None:
    forward = observe(teacher)(torch.randn(4, *SIZE, generator=rng_for(0)))
    for (mean, var), (pooled, spread), norm in zip(
        image_statistics(forward), pooled_statistics([forward]), forward.norms, strict=True
    ):
        assert torch.allclose(mean, norm.features.mean((2, 3)), atol=1e-5)
        assert torch.allclose(var, norm.features.var((2, 3), correction=0), atol=1e-5)
        assert torch.allclose(mean.mean(0), pooled, atol=1e-5)
        assert torch.allclose(var.mean(0) + mean.var(0, correction=0), spread, atol=1e-4)


def test_images_have_the_mean_that_is_expected(teacher: fx.GraphModule) -> None:
    prior = InputPrior((0.5, 0.0, -0.5), (2.0, 1.0, 0.5))
    images, _ = begun(teacher, prior=prior).draw(10, rng_for(0))
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor(prior.mean), atol=1e-3)
    assert torch.allclose(images.std((0, 2, 3)), torch.tensor(prior.std), rtol=1e-2)


class Doubling(Group):
    """Two processes that do the same: sums are twice what each has."""

    def add(self, tensors: Any) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def test_processes_stay_together(teacher: fx.GraphModule) -> None:
    alone, joint = begun(teacher), begun(teacher)
    alone.step(10, rng_for(0))
    joint.step(10, rng_for(0), group=Doubling(1, 2))
    for name, value in alone.state().items():
        assert torch.allclose(joint.state()[name], value, atol=1e-6), name


def test_one_channel_and_odd_sizes() -> None:
    size = (1, 9, 7)
    training = begun(capture(trained(Residual(channels=1), size), size), TINY, size)
    before = training.draw(10, rng_for(0))[0]
    warm_up(training, rng_for(1), lambda *_: None)
    after = training.draw(10, rng_for(0))[0]
    assert after.shape == (10, *size) and not torch.equal(before, after)


def test_bad_settings_and_models() -> None:
    for make, text in (
        (lambda: replace(TINY, batch_size=1), "synthesis.batch_size is 1"),
        (lambda: replace(TINY, steps=0), "synthesis.steps is 0"),
        (lambda: replace(TINY, beta1=1.0), "synthesis.beta1 is 1.0"),
        (lambda: replace(TINY, condition="both"), "synthesis.condition is 'both'"),  # type: ignore[arg-type]
        (lambda: replace(TINY, bn=StatisticsMatch(slack=0.9)), "synthesis.bn.slack"),
        (lambda: begun(captured(NoBatchNorm)), "no BatchNorm layer"),
    ):
        assert text in message(make)
    begun(captured(AfterReLU))  # its first output has the shape of logits
