"""Biases that take up what quantization adds to mean outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import Residual, Tokens, attached, images, teacher
from test_recipes import shrunk
from torch import Tensor, nn

from zsq.graph.blocks import extract
from zsq.pipeline import quantize
from zsq.recipe import Calibration
from zsq.recipes.genie import GENIE
from zsq.recover.mean_shift import PIECE, correct_means
from zsq.recover.reconstruct import reconstruct
from zsq.run import load_run
from zsq.student import student_to_bytes


def calibrated(kind: type[nn.Module], x: Tensor, finished: dict[str, Any], *, correct: bool) -> Any:
    parts = attached(kind, "W3A3")
    reconstruct(
        *parts,
        x,
        settings=None,
        calibration=Calibration(),
        seed=0,
        finished=finished,
        log=lambda *_: None,
    )
    if correct:
        correct_means(parts[0], parts[1], parts[3], x, finished=finished)
    return parts


@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_mean_outputs_come_closer_to_the_teachers(kind: type[nn.Module]) -> None:
    x, unseen = images(64), images(64, seed=5)
    gaps: dict[bool, list[float]] = {}
    for correct in (False, True):
        original, student, _, units = calibrated(kind, x, {}, correct=correct)
        name = next(n.name for n in original.graph.nodes if n.op == "placeholder")
        for unit in units:
            with torch.no_grad():
                a, b = (extract(network, [name], unit.outputs)(unseen)[0] for network in (original, student))
            axes = [0, *range(2, a.ndim)] if a.ndim != 3 else [0, 1]
            gaps.setdefault(correct, []).append(float((a - b).mean(axes).square().sum()))
    assert sum(gaps[True]) < 0.5 * sum(gaps[False])


def test_a_resumed_run_has_the_same_bits() -> None:
    finished: dict[str, Any] = {}
    whole = calibrated(Residual, images(16), finished, correct=True)[1]
    for kept in (sorted(finished), [key for key in finished if key != PIECE]):
        some = {key: finished[key] for key in kept}
        assert student_to_bytes(calibrated(Residual, images(16), some, correct=True)[1]) == student_to_bytes(
            whole
        )


def test_at_8_bits_biases_are_corrected_in_place_of_learning(tmp_path: Path) -> None:
    model = teacher(Residual)

    def run(bits: str, **overrides: str) -> Any:
        settings = {f"reconstruction.{name}": value for name, value in overrides.items()}
        return quantize(model, recipe=shrunk(GENIE), budget="paper", bits=bits, overrides=settings)

    corrected, plain, learned = run("W8A8"), run("W8A8", at_8_bits="nothing"), run("W4A4")
    names = [dict(found.student.named_parameters()) for found in (corrected, plain, learned)]
    assert [any("corrected_biases" in name for name in found) for found in names] == [True, False, False]
    corrected.save(tmp_path / "run")
    x = images(4, seed=9)
    assert torch.equal(load_run(tmp_path / "run").student(x), corrected.student(x))
    errors = [float((found.student(x) - model.module(x)).square().mean()) for found in (corrected, plain)]
    assert errors[0] < 1.5 * errors[1]  # of 10 images: no worse than noise
