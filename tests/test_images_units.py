"""Gaps of BatchNorm statistics in units of each layer: networks whose layers differ in scale by much."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from image_networks import SIZE, AfterReLU, NoBatchNorm, Residual, captured, trained
from torch import Tensor, nn

from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.images.forward import ForwardPass, NormInput, observe, resolved_units
from zsq.images.losses import BatchNormStatistics, bn_statistics_distance
from zsq.images.pixel_settings import PixelSynthesis, StatisticsMatch
from zsq.images.pixels import optimise_pixels
from zsq.images.settings import Synthesis
from zsq.images.statistics import StatisticsDistance, statistics_gaps
from zsq.images.synthesize import synthesize_batch
from zsq.recipe_fields import describe
from zsq.recipes.genie import GENIE
from zsq.recipes.intraq import INTRAQ


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scaled(kind: type[nn.Module], factor: float) -> nn.Module:
    """A trained network whose first layer returns `factor` times as much, and that is the same function."""
    network = trained(kind())
    network.conv1.weight.data *= factor
    if network.conv1.bias is not None:
        network.conv1.bias.data *= factor
    network.bn1.running_mean *= factor
    network.bn1.running_var = (network.bn1.running_var + network.bn1.eps) * factor**2 - network.bn1.eps
    return network


def layer(factor: float, scale: Tensor | None = None) -> ForwardPass:
    draw = rng()
    x = torch.randn(8, 3, 4, 4, generator=draw, dtype=torch.float64)
    mean, var = torch.randn(3, generator=draw).double(), torch.rand(3, generator=draw).double() + 0.5
    own = torch.ones(3).double() if scale is None else scale
    norm = NormInput(
        "bn", x * factor * own.view(-1, 1, 1), mean * factor * own, var * (factor * own) ** 2, 0.0, scale
    )
    return ForwardPass(images=x, norms=(norm,), logits=None)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, -2.0, 3.0]).double()])
def test_relative_distance_knows_no_scale(scale: Tensor | None) -> None:
    relative = BatchNormStatistics(eps=0.0, relative=True)
    one, far = relative(layer(1.0, scale)), relative(layer(100.0, scale))
    torch.testing.assert_close(one, far)
    norm = layer(1.0).norms[0]
    plain = bn_statistics_distance(norm.features, norm.mean, norm.var, eps=0.0)
    torch.testing.assert_close(one, plain / norm.var.mean())
    assert BatchNormStatistics(eps=0.0)(layer(100.0, scale)) > 9000 * plain


@pytest.mark.parametrize("spread", ["deviation", "variance"])
@pytest.mark.parametrize("over", ["batch", "image"])
def test_gaps_in_deviations_know_no_scale(spread: Any, over: Any) -> None:
    settings = StatisticsMatch(spread=spread, over=over, units="deviations")
    first, second = (statistics_gaps(layer(f).norms[0], settings) for f in (1.0, 1e4))
    for a, b in zip(first, second, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_layer_without_variance_has_a_finite_distance() -> None:
    x = torch.zeros(4, 2, 3, 3)
    norm = NormInput("bn", x, torch.zeros(2), torch.zeros(2), 1e-5)
    assert BatchNormStatistics(eps=0.0, relative=True)(ForwardPass(images=x, norms=(norm,), logits=None)) == 0


@pytest.mark.parametrize("kind", [Residual, AfterReLU])
def test_auto_is_deviations_where_one_layer_would_count_for_all(kind: type[nn.Module]) -> None:
    assert resolved_units(captured(kind), "auto") == "activations"
    far = capture(scaled(kind, 1000.0), SIZE)
    assert resolved_units(far, "auto") == "deviations"
    assert resolved_units(far, "activations") == "activations"
    assert resolved_units(captured(kind), "deviations") == "deviations"


def test_auto_without_batch_norms() -> None:
    assert resolved_units(capture(NoBatchNorm().eval(), SIZE), "auto") == "activations"


def test_images_of_a_scaled_network_meet_all_statistics() -> None:
    """A first layer 1000 times as large is most of the published distance, and nothing in its own units."""
    settings = Synthesis(num_images=32, steps=120, latent_size=32)
    teacher = capture(scaled(Residual, 1000.0), SIZE)

    def relative_distance(units: Literal["auto", "activations", "deviations"]) -> float:
        own = replace(settings, bn_units=units)
        batch = synthesize_batch(teacher, own, SIZE, 32, rng=rng(), log=lambda *_: None)
        return float(BatchNormStatistics(relative=True)(observe(teacher)(batch.images)))

    auto = relative_distance("auto")
    assert auto == relative_distance("deviations")
    assert auto < relative_distance("activations") / 2


def test_pixels_of_a_scaled_network_meet_all_statistics() -> None:
    settings = PixelSynthesis(num_images=16, steps=60, lr=0.1)
    teacher = capture(scaled(Residual, 1000.0), SIZE)

    def distance(match: StatisticsMatch) -> float:
        images = optimise_pixels(
            teacher, replace(settings, bn=match), SIZE, 16, labels=None, rng=rng(), log=lambda *_: None
        )
        in_deviations = StatisticsDistance(replace(match, units="deviations"))
        return float(in_deviations(observe(teacher)(images)))

    assert distance(StatisticsMatch()) < distance(StatisticsMatch(units="activations")) / 2


def test_what_other_networks_ran_keeps_its_description() -> None:
    for recipe in (GENIE, INTRAQ):
        assert "units" not in str(describe(recipe))
    changed = replace(GENIE, synthesis=Synthesis(bn_units="deviations"))
    assert describe(changed)["synthesis"]["bn_units"] == "deviations"


def test_unknown_units_are_refused() -> None:
    with pytest.raises(UsageError, match="synthesis.bn_units is 'pixels'"):
        Synthesis(bn_units="pixels")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="synthesis.bn.units"):
        StatisticsMatch(units="pixels")  # type: ignore[arg-type]
