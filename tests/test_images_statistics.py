"""Forms of the BatchNorm match, against plain formulas."""

from typing import Any, Literal

import pytest
import torch
from image_networks import SIZE, Residual, captured, photographs
from torch import Tensor

from zsq.errors import UsageError
from zsq.images.forward import ForwardPass, NormInput, observe
from zsq.images.pixel_settings import StatisticsMatch
from zsq.images.statistics import (
    EPS,
    StatisticsDistance,
    is_deep,
    pooled_statistics,
    slack_of,
    statistics_gaps,
    with_targets,
)

Spread, Over = Literal["deviation", "variance"], Literal["batch", "image"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def passes(layers: int = 5, images: int = 6) -> ForwardPass:
    draw = rng()
    norms = tuple(
        NormInput(
            f"bn{k}",
            torch.randn(images, 3, 4, 4, generator=draw) * (k + 1) + k,
            torch.randn(3, generator=draw),
            torch.rand(3, generator=draw) + 0.5,
            1e-5,
        )
        for k in range(layers)
    )
    return ForwardPass(images=torch.zeros(images, 3, 4, 4), norms=norms, logits=None)


def plain_gaps(norm: NormInput, spread: Spread, over: Over) -> tuple[Tensor, Tensor]:
    axes = (0, 2, 3) if over == "batch" else (2, 3)
    mean = norm.features.mean(axes) - norm.mean
    if spread == "variance":
        return mean, norm.features.var(axes, correction=0) - norm.var
    return mean, norm.features.std(axes) - (norm.var + EPS).sqrt()


@pytest.mark.parametrize("spread", ["deviation", "variance"])
@pytest.mark.parametrize("over", ["batch", "image"])
def test_gaps(spread: Spread, over: Over) -> None:
    settings = StatisticsMatch(spread=spread, over=over)
    for norm in passes().norms:
        expected, got = plain_gaps(norm, spread, over), statistics_gaps(norm, settings)
        for a, b in zip(expected, got, strict=True):
            assert b is not None
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("spread", ["deviation", "variance"])
@pytest.mark.parametrize("over", ["batch", "image"])
def test_folded_layers_give_the_same(spread: Spread, over: Over) -> None:
    teacher, images = captured(Residual), torch.randn(6, *SIZE, generator=rng())
    settings = StatisticsMatch(spread=spread, over=over)
    plain, folded = observe(teacher)(images), observe(teacher, fold=True)(images)
    assert any(norm.scale is not None for norm in folded.norms)
    torch.testing.assert_close(
        StatisticsDistance(settings)(folded), StatisticsDistance(settings)(plain), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("channels", ["mean", "sum"])
@pytest.mark.parametrize("layers", ["mean", "sum"])
def test_distance_by_hand(channels: Any, layers: Any) -> None:
    forward = passes(5)
    settings = StatisticsMatch(
        spread="variance", channels=channels, layers=layers, shallow=0.2, deep=1.1, over="batch"
    )
    expected = 0.0
    for index, norm in enumerate(forward.norms):
        mean, spread = plain_gaps(norm, "variance", "batch")
        square = mean.square() + spread.square()
        factor = 1.1 if index >= 1 else 0.2  # 5 // 2 - 1
        expected += factor * float(square.mean() if channels == "mean" else square.sum())
    expected /= 5 if layers == "mean" else 1
    assert float(StatisticsDistance(settings)(forward)) == pytest.approx(expected, rel=1e-5)


def test_deep_layers() -> None:
    # SynQ's code: n >= (L + 2) // 2 - 2
    for total in range(1, 60):
        assert [is_deep(n, total) for n in range(total)] == [n >= (total + 2) // 2 - 2 for n in range(total)]


def test_enhancement_doubles_one_layer_an_image() -> None:
    forward = passes(4, images=6)
    settings = StatisticsMatch(over="image", channels="sum", enhance=True)
    expected = 0.0
    for index, norm in enumerate(forward.norms):
        mean, spread = plain_gaps(norm, "deviation", "image")
        each = (mean.square() + spread.square()).sum(1)
        expected += sum((2 if i % 4 == index else 1) * float(d) for i, d in enumerate(each)) / 6
    assert float(StatisticsDistance(settings)(forward)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("over", ["batch", "image"])
def test_slack(over: Over) -> None:
    settings = StatisticsMatch(over=over, slack=0.5)
    forward = passes()
    slack = slack_of(forward, settings)
    gaps = [g.abs() for g in plain_gaps(forward.norms[2], "deviation", over)]
    gaps = [g if over == "batch" else g.mean(0) for g in gaps]
    assert [float(s) for s in slack[2]] == pytest.approx([float(g.median()) for g in gaps])  # of three
    full = [(a * 100, b * 100) for a, b in slack]
    assert float(StatisticsDistance(settings, full)(forward)) == 0
    assert (
        0 < float(StatisticsDistance(settings, slack)(forward)) < float(StatisticsDistance(settings)(forward))
    )
    none = [(0 * a, 0 * b) for a, b in slack]
    torch.testing.assert_close(
        StatisticsDistance(settings, none)(forward), StatisticsDistance(settings)(forward)
    )


def test_single_positions_have_no_spread_of_their_own() -> None:
    x = torch.randn(4, 3, generator=rng())
    norm = NormInput("bn", x, torch.zeros(3), torch.ones(3), 1e-5)
    mean, spread = statistics_gaps(norm, StatisticsMatch(over="image"))
    assert spread is None and torch.equal(mean, x)


def test_pooled_statistics_are_those_of_all_images() -> None:
    teacher, images = captured(Residual), photographs(20, SIZE)
    observer = observe(teacher)
    found = pooled_statistics([observer(part) for part in images.split((9, 9, 2))])
    for (mean, var), norm in zip(found, observer(images).norms, strict=True):
        torch.testing.assert_close(mean, norm.features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var, norm.features.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


def test_targets_replace_the_statistics_of_deep_layers() -> None:
    forward = passes(6)
    settings = StatisticsMatch(spread="variance", layers="mean", shallow=0.0)
    own = with_targets(forward, pooled_statistics([forward]))
    torch.testing.assert_close(StatisticsDistance(settings)(own), torch.tensor(0.0), atol=1e-9, rtol=0)
    assert [a is b for a, b in zip(own.norms, forward.norms, strict=True)] == [True, True] + [False] * 4


def test_errors() -> None:
    with pytest.raises(UsageError, match="over=image"):
        StatisticsMatch(enhance=True)
    with pytest.raises(UsageError, match="synthesis.bn.slack"):
        StatisticsMatch(slack=1.5)
    with pytest.raises(UsageError, match="'median'. Expected deviation or variance"):
        StatisticsMatch(spread="median")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="synthesis.bn.weight is -1"):
        StatisticsMatch(weight=-1.0)
