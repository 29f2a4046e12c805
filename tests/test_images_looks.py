"""What images are asked to look like without stored statistics: closed forms, gradients, the whole source."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_networks import graph_of
from image_networks import NoBatchNorm, captured
from torch import Tensor, nn

from zsq.errors import UsageError
from zsq.graph.attention import attentions, softmax_before
from zsq.graph.capture import capture
from zsq.images.class_settings import ClassGuide
from zsq.images.look_settings import Cosine, PatchSimilarity, Smoothness, Views
from zsq.images.looks import (
    attention_patches,
    disagreement,
    mean_square,
    moved,
    patch_cosines,
    similarity_entropy,
    variation,
)
from zsq.images.pixel_settings import Centres, PixelSynthesis
from zsq.images.pixels import synthesize_pixels
from zsq.images.prior import InputPrior, PixelLimits
from zsq.images.schedules import Annealing

SIZE = (3, 16, 16)
LOOKS = PixelSynthesis(
    num_images=10,
    batch_size=10,
    steps=40,
    lr=0.2,
    momentum=0.5,
    cosine=Cosine(),
    valid_pixels=True,
    bn=None,
    classes=ClassGuide(),
    patches=PatchSimilarity(),
    smoothness=Smoothness(weight=10.0),
    views=Views(agreement=1.0),
)
LIMITS = PixelLimits((-2.0,) * 3, (2.0,) * 3)


def made(name: str, settings: PixelSynthesis, seed: int = 0) -> tuple[Tensor, list[dict[str, float]]]:
    logged: list[dict[str, float]] = []
    images = synthesize_pixels(
        graph_of(name),
        settings,
        SIZE,
        seed=seed,
        finished={},
        log=lambda *event: logged.append(event[3]),
        limits=LIMITS,
    )
    return images, logged


@pytest.mark.parametrize("name", ["transformer", "gated"])
def test_images_of_networks_without_batch_norm(name: str) -> None:
    settings = replace(LOOKS, smoothness=replace(LOOKS.smoothness, lowest=0.3, highest=0.3))
    images, logged = made(name, settings)
    assert images.shape == (10, *SIZE) and float(images.abs().max()) <= 2
    assert set(logged[0]) == {"loss", "class", "patches", "smoothness", "agreement", "lr"}
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert logged[-1]["smoothness"] < 0.75 * logged[0]["smoothness"]
    assert (logged[0]["patches"] == 0) == (name == "gated")
    assert torch.equal(made(name, settings)[0], images)
    assert not torch.equal(made(name, settings, seed=1)[0], images)


def test_the_entropy_of_patches_rises() -> None:
    settings = replace(LOOKS, classes=None, smoothness=None, views=None)
    _, logged = made("transformer", settings)
    assert logged[-1]["patches"] < logged[0]["patches"]


def test_attentions_are_found() -> None:
    """However they are written; products without a softmax are none."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = (x @ x.transpose(1, 2)).softmax(-1) @ x
            x = x + self.inner(x, x, x, need_weights=False)[0]
            return (x.transpose(1, 2) @ x).mean((1, 2), keepdim=True)[:, :, 0]

    graph = capture(Written().requires_grad_(False), SIZE).graph
    found = attentions(graph)
    assert len(found) == 2 and found == attention_patches(graph)
    assert len(attentions(graph_of("transformer").graph)) == 2 and not attentions(graph_of("gated").graph)
    assert softmax_before(graph_of("transformer").graph.find_nodes(op="output")[0].args[0]) is None


def test_entropy_by_hand() -> None:
    """Two cosines, two points: at each the density is half that of the kernel's peak."""
    cosines = torch.tensor([[0.0, 0.5]])
    peak = 0.5 / (0.01 * math.sqrt(2 * math.pi)) + 1e-4
    expected = -0.5 * peak * math.log(peak)
    assert float(similarity_entropy(cosines, points=2, bandwidth=0.01)) == pytest.approx(expected, rel=1e-5)


def test_cosines_of_patches() -> None:
    """The class token is left out; heads are averaged; windows stay with their image."""
    rng = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 9, 5, generator=rng)
    token = torch.randn(2, 1, 5, generator=rng)
    tokens = torch.cat([token, patches], 1)
    heads = torch.stack([tokens * 0.5, tokens * 1.5], 1)
    expected = torch.cosine_similarity(patches[:, None], patches[:, :, None], dim=3).flatten(1)
    torch.testing.assert_close(patch_cosines(heads, 2), expected)
    torch.testing.assert_close(patch_cosines(tokens, 2), expected)
    torch.testing.assert_close(patch_cosines(patches, 1), expected.view(1, -1))


def test_gradients() -> None:
    rng = torch.Generator().manual_seed(0)
    cosines = (torch.rand(2, 9, generator=rng, dtype=torch.float64) - 0.5).requires_grad_()
    fixed = torch.tensor([[-0.9] * 1, [0.9] * 1], dtype=torch.float64)  # holds the ends of the grid
    assert torch.autograd.gradcheck(
        lambda c: similarity_entropy(torch.cat([c, fixed], 1), points=10, bandwidth=0.3), cosines
    )
    images = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(variation, images)
    assert torch.autograd.gradcheck(mean_square, images)


def test_variation_and_views_by_hand() -> None:
    """Rows of constant pixels 0, 1, 0, 1: no change to the right, 1 in the other three directions."""
    rows = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 4, 1).expand(2, 3, 4, 4)
    assert float(variation(rows)) == pytest.approx(0.75)
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 0, 0] = 1
    assert float(moved(corner, 1, mirror=False)[0, 0, 1, 1]) == 1
    assert float(moved(corner, -1, mirror=True)[0, 0, 3, 0]) == 1


def test_norm_of_pixels() -> None:
    """(1 + 4 + 9 + 16) / 4 by hand; in a run it pulls pixels to the expected mean, in its deviations."""
    assert float(mean_square(torch.tensor([1.0, -2.0, 3.0, -4.0]).view(1, 1, 2, 2))) == 7.5
    alone = replace(LOOKS, classes=None, patches=None, smoothness=None, views=None, cosine=None, lr=0.05)
    settings = replace(alone, norm_weight=2.0, valid_pixels=False, steps=10)
    prior = InputPrior((0.5, 0.0, -1.0), (0.5, 1.0, 2.0))
    logged: list[dict[str, float]] = []

    def log(*event: Any) -> None:
        logged.append(event[3])

    images = synthesize_pixels(graph_of("gated"), settings, SIZE, seed=0, finished={}, log=log, prior=prior)
    assert set(logged[0]) == {"loss", "norm", "lr"}
    assert logged[0]["norm"] == pytest.approx(2.0, rel=0.05)  # twice the variance of the noise
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in prior.of(3))
    last = 2 * float(mean_square((images - mean) / std))
    assert last < logged[-1]["norm"] < 0.8 * logged[0]["norm"]  # after the last step, and before it


def test_norm_is_off_by_default() -> None:
    assert PixelSynthesis().norm_weight == 0
    with pytest.raises(UsageError, match="norm_weight"):
        replace(LOOKS, norm_weight=-1.0)


def test_views_that_agree_cost_nothing() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert float(disagreement(logits, logits + 1)) == pytest.approx(0, abs=1e-6)
    p, q = 0.75, 0.5  # both divergences: 0.75 ln 1.5 + 0.25 ln 0.5 and 0.5 ln (2/3) + 0.5 ln 2
    one = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    other = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    found = disagreement(torch.tensor([[p, 1 - p]]).log(), torch.tensor([[q, 1 - q]]).log())
    assert float(found) == pytest.approx((one + other) / 2, rel=1e-5)


def test_annealing_by_hand() -> None:
    """Two rounds of four steps, one of them warm-up: up, then a half cosine over three."""
    annealing = Annealing(2.0, Cosine(rounds=2, warmup=0.25), steps=8, device=torch.device("cpu"))
    rates = []
    for _ in range(8):
        rates.append(float(annealing.lr))
        annealing.step(torch.zeros(()))
    assert rates == pytest.approx([2.0, 2.0, 1.5, 0.5] * 2)


def test_valid_pixels_before_the_prior() -> None:
    lowest, highest = LIMITS.standard(InputPrior((1.0, 0.0, -1.0), (0.5, 1.0, 2.0)), torch.device("cpu"))
    assert lowest.flatten().tolist() == [-6.0, -2.0, -0.5] and highest.flatten().tolist() == [2.0, 2.0, 1.5]


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="synthesis.bn"):
        replace(LOOKS, centres=Centres())
    for wrong in ({"momentum": 1.0}, {"square_decay": -0.1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            replace(LOOKS, **wrong)
    with pytest.raises(UsageError, match="smoothness.lowest"):
        Smoothness(lowest=0.5, highest=0.4)
    with pytest.raises(UsageError, match="jitter"):
        Views(jitter=0.6)
    with pytest.raises(UsageError, match="psaq_vit"):
        synthesize_pixels(
            captured(NoBatchNorm), PixelSynthesis(), SIZE, seed=0, finished={}, log=lambda *_: None
        )
