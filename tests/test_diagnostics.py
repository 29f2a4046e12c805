"""Figures of finished runs: those of the parts, from the run alone and its teacher."""

from pathlib import Path

import pytest
import torch
from image_networks import SIZE, Residual, photographs
from torch import Tensor, nn

import zsq
from zsq.diagnostics import Diagnostics, diagnose
from zsq.errors import UsageError
from zsq.models import Teacher
from zsq.recipe import GaussianNoise

QUICK = {"synthesis.num_images": 12, "synthesis.steps": 2, "reconstruction.steps": 2, "num_holdout": 0}


def teacher(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(Residual().eval(), input_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize("recipe", ["genie", "dfq"])
def test_a_run_that_was_read_back(recipe: str, tmp_path: Path) -> None:
    """With BatchNorm as it is, and with it folded and weights equalised."""
    model = teacher()
    run = zsq.quantize(
        model, recipe=recipe, bits="W3A3", overrides=QUICK if recipe == "genie" else {}, out=tmp_path / "run"
    )
    images = photographs(9, SIZE, seed=3)
    found = diagnose(zsq.load_run(tmp_path / "run"), model, images, power_steps=2)
    assert found == diagnose(run, model, images, power_steps=2)
    assert found.others.num_images == found.generalisation.num_others == 9
    assert found.own.num_images == len(run.images)
    # the same loss, computed for the network as a whole and unit by unit with inputs of the student
    assert found.others.loss == pytest.approx(found.generalisation.other_loss, rel=1e-4)
    assert found.others.eigenvalue is not None and -1.001 <= found.alignment.of_means <= 1.001
    assert Diagnostics.to_json(found)["generalisation"]["gap"] == found.generalisation.gap


def test_its_own_images_are_aligned() -> None:
    model = teacher()
    settings = QUICK | {"reconstruction": "none"}
    run = zsq.quantize(model, recipe="genie", bits="W3A3", overrides=settings)
    found = diagnose(run, model, run.images)
    assert found.own == found.others and found.generalisation.gap == 0
    assert found.alignment.of_means == pytest.approx(1, abs=1e-5)


def test_another_teacher() -> None:
    recipe = zsq.Recipe(name="noise", paper="", synthesis=GaussianNoise(num_images=4), reconstruction=None)
    run = zsq.quantize(teacher(), recipe=recipe, bits="W3A3", overrides={"num_holdout": 0})
    with pytest.raises(UsageError, match="Give the model that was quantized"):
        diagnose(run, teacher(1), photographs(3, SIZE))
    with pytest.raises(UsageError, match="at least one image"):
        diagnose(run, teacher(), photographs(3, SIZE)[:0])


class Tokens(nn.Module):
    """A LayerNorm whose result only a linear layer reads; nothing else is alive between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.linear(x).relu().mean(1))  # type: ignore[no-any-return]


def test_rewritten_layer_norms() -> None:
    """The rewrite is inside units: the teacher as it was is what their outputs compare with."""
    torch.manual_seed(0)
    network = Tokens().eval()
    network.norm.weight.data.copy_(torch.linspace(0.1, 4, 8))
    model = Teacher(network, input_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = {"synthesis.num_images": 8, "num_holdout": 0, "norm_equalization": "on"}
    run = zsq.quantize(model, recipe="noise", bits="W8A8", overrides=settings)
    found = diagnose(run, model, run.images, gradients="last_unit")
    energy = network(run.images).square().sum().item() / 2 / len(run.images)
    assert found.own.loss < 0.01 * energy + 1e-3
