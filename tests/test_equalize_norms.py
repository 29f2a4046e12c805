"""LayerNorm channels of one range: the function stays, the ranges become equal, quantizers lose less."""

import pytest
import torch
from graph_networks import SIZE, graph_of, images, outputs
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.blocks import extract
from zsq.graph.capture import capture
from zsq.graph.equalize_norms import channel_ranges, equalize_norms, norm_layers
from zsq.graph.nodes import aten
from zsq.models import Teacher
from zsq.pipeline import quantize
from zsq.quant.attach import attach
from zsq.quant.calibrate import calibrate
from zsq.quant.scheme import Scheme
from zsq.recipe import Calibration, GivenImages, NormEqualization, Recipe

NORMS = {"transformer": 5, "gated": 2, "resnet": 0}


def uneven(name: str) -> fx.GraphModule:
    """A network whose LayerNorms have channels of very different factors and shifts."""
    graph = graph_of(name)
    module = fx.GraphModule(graph, graph.graph, "Uneven")
    rng = torch.Generator().manual_seed(0)
    for pair in norm_layers(module.graph):
        node = next(n for n in module.graph.nodes if n.name == pair.norm)
        owner = module.get_submodule(str(node.args[2].target).rpartition(".")[0])
        owner.weight = nn.Parameter(torch.exp(torch.randn(8, generator=rng)), requires_grad=False)
        owner.bias = nn.Parameter(3 * torch.randn(8, generator=rng), requires_grad=False)
    return module


@pytest.mark.parametrize("name", NORMS)
def test_the_function_stays_and_ranges_become_equal(name: str) -> None:
    module, x = uneven(name), images(8)
    pairs = norm_layers(module.graph)
    assert len(pairs) == NORMS[name]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    ranges = channel_ranges(module, x)
    found = equalize_norms(module, ranges)
    wanted = outputs(module, x)[0]
    torch.testing.assert_close(outputs(found, x)[0], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    for lo, hi in channel_ranges(found, x).values():
        torch.testing.assert_close(lo, lo.mean().expand_as(lo), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(hi, hi.mean().expand_as(hi), rtol=1e-3, atol=1e-3)
        assert float(lo.mean()) <= 1e-3 and float(hi.mean()) >= -1e-3  # with 0, which quantizers represent
    for pair in pairs:
        widths = [hi - lo for lo, hi in (ranges[pair.norm], channel_ranges(found, x)[pair.norm])]
        assert float(widths[1].mean()) == pytest.approx(float(widths[0].mean()), rel=1e-3)


def test_few_bits_of_activations_lose_less() -> None:
    module, x = uneven("transformer"), images(16)
    noise = []
    for teacher in (module, equalize_norms(module, channel_ranges(module, x))):
        student, _ = attach(teacher, Scheme(weight_bits=8, activation_bits=4, ends="same"))
        calibrate(student, [x], Calibration(num_images=16))
        first = norm_layers(module.graph)[0].layers[0]
        got, wanted = (
            extract(m, [m.graph.find_nodes(op="placeholder")[0].name], [first]) for m in (student, teacher)
        )
        with torch.no_grad():
            noise.append(float((got(x)[0] - wanted(x)[0]).square().mean()))
    assert noise[1] < 0.5 * noise[0]


class Readers(nn.Module):
    """LayerNorms that something else than layers reads, or layers that also read zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.padded, self.head = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 5),
        )
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.embed(x).permute(0, 2, 3, 1))
        x = x + self.padded(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.norm2(x).flatten(1, 2)
        x = self.norm3(y).reshape(x.shape[0], 16, 8)
        return self.head(x)[:, 3] + self.head(y)[:, 0]  # type: ignore[no-any-return]


def test_other_readers_are_left_alone() -> None:
    graph = capture(Readers().eval().requires_grad_(False), SIZE)
    assert norm_layers(graph.graph) == []
    assert sum(n.target is aten.layer_norm.default for n in graph.graph.nodes) == 3
    assert channel_ranges(graph, images(2)) == {}


def test_a_recipe_with_it() -> None:
    teacher = Teacher(uneven("transformer"), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    recipe = Recipe(
        name="test",
        paper="none",
        synthesis=GivenImages(num_images=0),
        norm_equalization=NormEqualization(num_images=8),
        reconstruction=None,
        num_holdout=0,
    )
    run = quantize(teacher, recipe=recipe, bits="W8A8", budget="paper", images=images(16))
    assert run.record["recipe"]["norm_equalization"] == {"kind": "NormEqualization", "num_images": 8}
    wanted, got = outputs(teacher.module, images(16))[0], outputs(run.student, images(16))[0]
    assert float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())) > 25
    with pytest.raises(UsageError, match="num_images"):
        NormEqualization(num_images=0)
