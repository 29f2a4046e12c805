"""Class activation maps in a reconstruction: slopes, the unit they belong to, and what they change."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from quantization_networks import Residual, Summing, Tokens, attached, images

from zsq.errors import UsageError
from zsq.graph.blocks import extract
from zsq.quant.quantizers import WeightQuantizer
from zsq.recipe import Calibration, Reconstruction
from zsq.recover.reconstruct import reconstruct
from zsq.recover.settings import MapAlignment
from zsq.recover.student_losses import map_distance
from zsq.recover.unit_maps import UnitMaps, map_unit, unit_maps

IMAGES = images(16, seed=7)


def test_slopes_by_hand_and_the_distance_of_the_maps() -> None:
    """After the last block come a global average and a linear layer: slope k is its weight over H W."""
    teacher, _, _, units = attached(Residual, "W2A4")
    index = map_unit(teacher.graph, units)
    assert units[index].name == "block2"
    image = next(n.name for n in teacher.graph.nodes if n.op == "placeholder")
    with torch.no_grad():
        (features,) = extract(teacher, [image], units[index].outputs)(IMAGES)
        classes = teacher(IMAGES).argmax(1)
    weight = teacher.get_parameter("fc.weight").detach()[classes] / 16
    for channels in ("all", "positive"):
        settings = MapAlignment(weight=3.0, channels=channels)  # type: ignore[arg-type]
        found = unit_maps(teacher, units[index], features, (8, 8), settings)
        slopes = weight.clamp(min=0) if channels == "positive" else weight
        rows = torch.tensor([3, 1, 8])
        other = features.flip(1)[rows]
        maps, wanted = (torch.einsum("nk,nkhw->nhw", slopes[rows], x).relu() for x in (other, features[rows]))
        got = found(other, features[rows], rows)
        assert float(got) == pytest.approx(3 * float(map_distance(maps, wanted, (8, 8))), rel=1e-4)
        assert float(got) > 0 and float(found(features[rows], features[rows], rows)) == 0


def learned(maps: MapAlignment | None, seen: list[int] | None = None) -> tuple[dict[str, Any], Any]:
    """Codes by unit after a short reconstruction."""
    teacher, student, quantizers, units = attached(Residual, "W2A4")
    results = reconstruct(
        teacher,
        student,
        quantizers,
        units,
        IMAGES,
        settings=replace(Reconstruction(steps=30, batch_size=8, lr_rounding=0.05), maps=maps),
        calibration=Calibration(),
        seed=0,
        finished={},
        log=lambda *_: None,
    )
    codes = {n: m.codes.clone() for n, m in student.named_modules() if isinstance(m, WeightQuantizer)}
    return codes, results


def test_only_the_unit_of_the_maps_is_learned_otherwise() -> None:
    plain, _ = learned(None)
    unweighted, _ = learned(MapAlignment(weight=0.0))
    aligned, _ = learned(MapAlignment(weight=1000.0))
    assert all(torch.equal(plain[name], unweighted[name]) for name in plain)
    different = {name for name in plain if not torch.equal(plain[name], aligned[name])}
    assert different and all(name.startswith(("block2.", "fc.")) for name in different)
    assert any(name.startswith("block2.") for name in different)


def test_gradients_reach_the_output_alone() -> None:
    slopes = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = UnitMaps(slopes, (8, 8), MapAlignment())(output, output.detach().flip(2), torch.tensor([0, 2]))
    found.backward()
    assert output.grad is not None and bool(output.grad.any()) and slopes.grad is None


def test_models_without_such_a_unit() -> None:
    teacher, _, _, units = attached(Tokens, "W4A4")
    with pytest.raises(UsageError, match=r"reconstruction\.maps=none"):
        map_unit(teacher.graph, units[-1:])
    several, _, _, parts = attached(Summing, "W4A4")
    with pytest.raises(UsageError, match="logits that follow from its output alone"):
        unit_maps(several, parts[1], IMAGES, (8, 8), MapAlignment())
