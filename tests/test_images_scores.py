"""Scores of images against closed forms and against computing everything anew."""

import math

import pytest
import torch
from image_networks import SIZE, AfterReLU, PreActivation, Residual, captured, photographs
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.images.filters import least_sensitive, lowest, quotas
from zsq.images.forward import observe
from zsq.images.scores import (
    bn_distance,
    bn_sensitivity,
    energy,
    gives_logits,
    logits_of,
    mean_patch_entropy,
    norm_sums,
    patch_entropy,
    patch_nodes,
)


def test_energy() -> None:
    assert energy(torch.zeros(2, 10)).tolist() == pytest.approx([-math.log(10)] * 2)
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    known, unknown = energy(logits).tolist()
    assert known == pytest.approx(-math.log(math.exp(9) + 2)) and known < unknown
    assert energy(logits + 1).tolist() == pytest.approx([known - 1, unknown - 1])
    assert energy(2 * logits, 2.0)[0] == pytest.approx(2 * known)


def distance_anew(graph: fx.GraphModule, images: Tensor) -> float:
    """The distance as GenQ writes it, from the statistics of the whole batch."""
    total = 0.0
    for norm in observe(graph)(images).norms:
        x = norm.features.double().transpose(0, 1).flatten(1)
        unit = (norm.var.double() + norm.eps).sqrt()
        mean = (x.mean(1) - norm.mean) / unit
        spread = (x.std(1, correction=0) - norm.var.double().sqrt()) / unit
        total += float(mean.square().sum() + spread.square().sum())
    return total


@pytest.mark.parametrize("network", [Residual, PreActivation, AfterReLU])
def test_sensitivity_is_that_of_leaving_out(network: type[nn.Module]) -> None:
    graph = captured(network)
    images = photographs(9, SIZE)
    images[4] = 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    sums = norm_sums(observe(graph), images)
    everything = distance_anew(graph, images)
    assert float(bn_distance(sums)) == pytest.approx(everything, rel=1e-5)
    without = [distance_anew(graph, torch.cat([images[:i], images[i + 1 :]])) for i in range(9)]
    found = bn_sensitivity(sums)
    expected = torch.tensor([everything - d for d in without], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * everything)
    assert int(found.argmax()) == 4 and found[4] > 0
    with pytest.raises(ValueError, match="two images"):
        bn_sensitivity(norm_sums(observe(graph), images[:1]))


def test_noise_is_left_out() -> None:
    """A fifth of the images is noise: nearly all that goes, goes there; and the set comes nearer."""
    graph = captured(Residual)
    clean, noise = photographs(40, SIZE), torch.randn(10, *SIZE, generator=torch.Generator().manual_seed(1))
    sums = norm_sums(observe(graph), torch.cat([clean, noise]))
    kept = least_sensitive(sums, torch.zeros(50, dtype=torch.int64), 40)
    assert len(kept) == 40 and kept.tolist() == sorted(set(kept.tolist()))
    assert int((kept >= 40).sum()) <= 2
    assert bn_distance([s.only(kept) for s in sums]) < bn_distance(sums)


def test_every_class_keeps_its_share() -> None:
    rng = torch.Generator().manual_seed(0)
    for count in range(1, 30):
        classes = torch.randint(0, 5, (30,), generator=rng)
        sizes, kept = torch.bincount(classes), quotas(classes, count)
        assert int(kept.sum()) == count
        assert float((kept - sizes * count / 30).abs().max()) < 1
        chosen = lowest(torch.rand(30, generator=rng), classes, count)
        assert torch.equal(torch.bincount(classes[chosen], minlength=len(sizes)), kept)
    graph = captured(Residual)
    classes = torch.arange(12) % 3
    kept = least_sensitive(norm_sums(observe(graph), photographs(12, SIZE)), classes, 6)
    assert torch.bincount(classes[kept]).tolist() == [2, 2, 2]


def test_lowest_by_hand() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    assert lowest(scores, torch.zeros(6, dtype=torch.int64), 3).tolist() == [1, 3, 5]
    assert lowest(scores, torch.tensor([0, 1, 0, 1, 0, 1]), 2).tolist() == [4, 5]


def test_entropy_of_patches() -> None:
    """Uniform cosines have the entropy of their interval; equal ones that of the kernel."""
    angles = torch.linspace(0, math.pi / 2, 60)
    fan = torch.stack([angles.cos(), angles.sin()], 1)
    rng = torch.Generator().manual_seed(0)
    far = torch.randn(60, 512, generator=rng)  # cosines near 0
    same = torch.ones(60, 2)
    scaled = fan * (1 + torch.rand(60, 1, generator=rng))
    narrow = patch_entropy(far[None])
    spread, alike, other = patch_entropy(torch.stack([fan, same, scaled]))
    cosine_of_kernel = 0.5 * math.log(2 * math.pi * math.e * 0.01**2)
    assert alike < cosine_of_kernel + 0.1  # half of the kernel lies beyond 1
    assert alike < narrow < spread <= math.log(1.01) and other == pytest.approx(float(spread), abs=1e-4)
    # normal cosines of deviation 1 / sqrt(512), widened by the kernel
    deviation = math.sqrt(1 / 512 + 0.01**2)
    assert float(narrow) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * deviation**2), abs=0.03)


class Tokens(nn.Module):
    """Patches of 2 x 2 pixels, a class token, one LayerNorm; the head reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 4)
        self.token = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1)
        return self.head(self.norm(tokens)[:, 0])


def test_patches_of_a_network() -> None:
    network = Tokens().eval().requires_grad_(False)
    graph = capture(network, (3, 12, 12))
    assert len(patch_nodes(graph.graph)) == 1
    x = photographs(3, (3, 12, 12))
    patches = network.embed(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mean_patch_entropy(graph, x), patch_entropy(patches))
    with pytest.raises(UsageError, match="LayerNorm"):
        patch_nodes(captured(Residual).graph)


def test_classifiers_are_told_apart() -> None:
    graph = captured(Residual)
    x = photographs(70, SIZE)
    assert gives_logits(graph.graph) and not gives_logits(captured(AfterReLU).graph)
    torch.testing.assert_close(logits_of(graph, x), graph(x))
