"""The estimate of the drop: predictors by hand, the curve, constants that are those of the rows."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization_networks import Residual, images, teacher
from safetensors.torch import save_file
from test_speed import BENCHMARKS, NETS
from torch import nn

import zsq
from zsq.amounts import drop_error_text, drop_text
from zsq.architectures import network_from_file
from zsq.estimate import (
    FIT,
    Fit,
    Predictors,
    estimated_drop,
    feature,
    predictors,
    predictors_from_logits,
    views,
)

MIDDLE = Predictors(disagreement=0.2, flips=0.1, confidence=0.7, weakest_unit=12.0)
TINY: dict[str, Any] = {
    "synthesis.num_images": 8,
    "synthesis.steps": 2,
    "synthesis.latent_size": 8,
    "num_holdout": 4,
    "reconstruction.steps": 2,
}


class Masked(nn.Module):
    """A class that is never named."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(1, torch.tensor([2]), -math.inf)


def test_views_are_of_the_images() -> None:
    x = torch.arange(2 * 3 * 8 * 16, dtype=torch.float32).view(2, 3, 8, 16)
    found = views(x)
    assert torch.equal(found["plain"], x) and torch.equal(found["mirrored"], x.flip(3))
    assert torch.equal(found["shifted"][:, :, 1:, 2:], x[:, :, :-1, :-2])
    assert float((found["noisy"] - x).std()) == pytest.approx(0.2 * float(x.std()), rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(views(x).values(), found.values(), strict=True))


def test_predictors_by_hand() -> None:
    teacher_logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    student_logits = torch.tensor(
        [[1.0, 1.5], [5.0, 6.0]]
    )  # errors -1, 1.5 and 5, 5; about their means -1.25, 1.25, 0, 0
    plain = {"plain": (teacher_logits, student_logits)}
    found = predictors_from_logits(plain, {"a": 9.0, "b": 7.0})
    assert found.disagreement == 0.5 and found.weakest_unit == 7.0
    deviation = math.sqrt(2 * 1.25**2 / 3)
    wanted = sum(math.erfc(margin / (2 * deviation)) / 2 for margin in (2.0, 1.0)) / 2
    assert found.flips == pytest.approx(wanted)
    assert found.confidence == pytest.approx((1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2)
    same = predictors_from_logits({**plain, "other": (teacher_logits, teacher_logits + 3)}, {})
    assert same.disagreement == 0.25 and same.flips == pytest.approx(wanted / 2)


def test_predictors_of_networks() -> None:
    network = teacher(Residual).module
    found = predictors(network, network, images(5), {"a": 30.0})
    assert found is not None and found.disagreement == 0 and found.flips == pytest.approx(0, abs=1e-6)
    assert predictors(nn.Identity(), nn.Identity(), images(5), {}) is None
    masked = nn.Sequential(network, Masked())
    assert predictors(masked, masked, images(5), {}) is None


def test_the_curve_is_monotone_and_its_interval_holds_it() -> None:
    worse = {
        "disagreement": replace(MIDDLE, disagreement=0.4),
        "flips": replace(MIDDLE, flips=0.3),
        "weakest_unit": replace(MIDDLE, weakest_unit=5.0),
    }
    one = estimated_drop(MIDDLE, FIT)
    assert 0 <= one["low"] <= one["points"] <= one["high"] <= 100
    for name in FIT.features:
        if name in worse:
            assert estimated_drop(worse[name], FIT)["points"] > one["points"]
    for extreme in (Predictors(0, 0, 1, 200), Predictors(1, 0.5, 0, -200)):
        assert json.loads(json.dumps(estimated_drop(extreme, FIT), allow_nan=False))
    by_hand = Fit(("flips",), (-2.0, 1.5), 2.0, 1.0, 0.5, 90.0, 3, 9)
    share = 0.2
    z = -2 + 1.5 * math.log(share / (1 - share))
    assert feature("flips", MIDDLE) == pytest.approx(math.log(0.25))
    assert estimated_drop(MIDDLE, by_hand)["points"] == pytest.approx(100 / (1 + math.exp(-z)), abs=0.005)
    assert drop_text(estimated_drop(MIDDLE, by_hand)).endswith("points (0.0 to 4.5)")
    assert "3 networks that the fit did not see" in drop_error_text(estimated_drop(MIDDLE, by_hand))


def test_a_run_says_it_only_for_images_like_those_of_the_fit() -> None:
    def drop(recipe: str, **overrides: Any) -> Any:
        run = zsq.quantize(teacher(Residual), recipe=recipe, bits="W4A4", budget="quick", overrides=overrides)
        return run.record["results"]["estimated_without_data"].get("drop")

    found = drop("genie", **TINY)
    assert found["low"] <= found["points"] <= found["high"]
    assert found["known_error"]["networks"] == FIT.networks
    assert (
        drop(
            "zeroq", **{k: v for k, v in TINY.items() if k.startswith(("synthesis.n", "synthesis.s", "num"))}
        )
        is None
    )
    assert drop("noise-nearest", **{"synthesis.num_images": 8}) is None
    assert drop("best", **TINY) is None  # students agree more on images of classes
    assert drop("genie", **TINY, **{"synthesis.variety": "on"}) is None


def test_the_constants_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import estimate

    rows = [json.loads(line) for line in (BENCHMARKS / "results/estimate.jsonl").read_text().splitlines()]
    known = estimate.Rows(rows)
    assert (len(rows), len(known.names)) == (FIT.rows, FIT.networks)
    found = estimate.fitted(known.features(FIT.features), known.drops)
    np.testing.assert_allclose(found, FIT.coefficients, atol=0.002)
    predicted = estimate.left_out(known, estimate.by_curve(FIT.features))
    assert float(np.abs(predicted - known.drops).mean()) == pytest.approx(FIT.error, abs=0.02)
    alone = np.abs(estimate.left_out(known, estimate.affine) - known.drops).mean()
    assert FIT.error < float(alone)  # than agreement alone
    assert repr(FIT) in (BENCHMARKS / "results/estimate.md").read_text()


def test_the_script_recovers_a_curve_and_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import estimate

    rng = np.random.default_rng(0)
    rows = []
    for index in range(12):
        found = Predictors(*(float(v) for v in rng.uniform([0.05, 0.02, 0.3, 2], [0.9, 0.45, 0.9, 30])))
        drop = estimated_drop(found, Fit(("flips",), (-2.0, 1.0), 1.0, 0, 0, 0, 0, 0))["points"]
        row = {"network": "abc"[index % 3], "float": 90.0, "top1": 90.0 - drop}
        rows.append({**row, "agreement": 100 * (1 - found.disagreement), "predictors": asdict(found)})
    known = estimate.Rows(rows)
    np.testing.assert_allclose(estimate.fitted(known.features(["flips"]), known.drops), (-2, 1), atol=0.1)
    monkeypatch.setattr(estimate, "CANDIDATES", (("disagreement",), ("flips",)))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    estimate.main(["fit", "--rows", str(file), "--write", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "Taken: flips" in text and "12 rows of 3 networks" in text and "| a | 90.00 | 4 |" in text


def test_rows_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import estimate

    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    save_file(network_from_file(f"{tmp_path}/nets.py:tiny").state_dict(), tmp_path / "tiny.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=pixels, labels=np.arange(20) % 5)
    bench = f"""
bits = ["W8A8"]
[[networks]]
name = "tiny"
model = "{tmp_path}/nets.py:tiny"
weights = "{tmp_path}/tiny.safetensors"
input_size = [3, 8, 8]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
data = "{tmp_path}/test.npz"
[[recipes]]
name = "genie"
"""
    (tmp_path / "networks.toml").write_text(bench)
    monkeypatch.setattr(estimate, "NETWORKS", tmp_path / "networks.toml")
    monkeypatch.setattr(estimate, "COUNTS", {False: (8, 2, 2, 20)})
    monkeypatch.setattr(estimate, "LEARNED", ("W4A4",))
    monkeypatch.setattr(estimate, "NEAREST", ("W3A3",))
    file = tmp_path / "rows.jsonl"
    estimate.main(["measure", "--rows", str(file)])
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["recipe"], first["bits"], second["recipe"]) == ("learned", "W4A4", "nearest")
    assert first["float"] == second["float"] and 0 <= second["predictors"]["disagreement"] <= 1
    before = file.read_bytes()
    estimate.main(["measure", "--rows", str(file)])
    assert file.read_bytes() == before
