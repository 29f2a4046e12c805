"""Steps whose numbers are all on the device: the same loops, driven by tables."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from image_networks import SIZE, Residual, captured
from quantization_networks import Residual as QuantizedResidual
from quantization_networks import attached, images
from student_networks import calibrated
from torch import Tensor

import zsq.images.refine_batch as refine_module
import zsq.images.synthesize as synthesize_module
import zsq.recover.learn_unit as learn_unit_module
from zsq.images.batches import Batch
from zsq.images.forward import observe
from zsq.images.gradients import gradient_probe
from zsq.images.losses import InputStatistics
from zsq.images.prior import InputPrior
from zsq.images.refine_batch import refine_batch
from zsq.images.settings import Refinement, Synthesis
from zsq.images.synthesis_loss import SynthesisLoss
from zsq.images.synthesize import synthesize_batch
from zsq.recipe import Calibration, Reconstruction
from zsq.recover.reconstruct import reconstruct
from zsq.replay import Course, Replay, can_record

CPU = torch.device("cpu")
SYNTHESIS = Synthesis(
    num_images=8, batch_size=8, steps=60, latent_size=16, generator_decay_interval=7, cooldown=0.5
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_course_gives_row_after_row() -> None:
    course = Course(CPU, index=torch.arange(6).view(3, 2), rates=torch.tensor([0.5, 0.25, 0.125]))
    seen = []
    for _ in range(3):
        row = course.row()
        seen.append((row["index"].tolist(), row["rates"].item()))
        course.advance()
    assert seen == [([0, 1], 0.5), ([2, 3], 0.25), ([4, 5], 0.125)] and int(course.step) == 3


def test_on_a_cpu_a_step_is_called_as_it_is() -> None:
    weight, calls = torch.ones(2, requires_grad=True), []

    def step() -> tuple[Tensor, Tensor]:
        calls.append(1)
        return (weight * len(calls)).sum(), weight

    again = Replay(step, CPU)
    assert not can_record(CPU)
    found = [again()[0] for _ in range(6)]
    assert [float(f) for f in found] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0] and len(calls) == 6
    assert not any(f.requires_grad for f in found)


def both(monkeypatch: pytest.MonkeyPatch, module: Any, run: Any) -> tuple[Any, Any]:
    """What `run` gives step by step, and with the tables of a device that records."""
    plain = run()
    monkeypatch.setattr(module, "can_record", lambda _: True)
    return plain, run()


@pytest.mark.parametrize("prior", [None, InputPrior((0.1, -0.2, 0.3), (1.5, 0.7, 1.0))])
def test_tables_of_synthesis_are_its_steps(monkeypatch: pytest.MonkeyPatch, prior: InputPrior | None) -> None:
    teacher, logs = captured(Residual), []

    def run() -> Batch:
        log = lambda step, values: logs.append((step, values))  # noqa: E731
        return synthesize_batch(teacher, SYNTHESIS, SIZE, 8, rng=rng(), log=log, prior=prior)

    plain, tables = both(monkeypatch, synthesize_module, run)
    assert (tables.images - plain.images).abs().mean() < 2e-3  # rates rounded to float32
    half = len(logs) // 2
    for (step, values), (other, others) in zip(logs[:half], logs[half:], strict=True):
        assert step == other and values == pytest.approx(others, rel=1e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tables_of_reconstruction_are_its_steps(monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    settings = Reconstruction(
        steps=30, batch_size=16, lr_rounding=0.05, lr_weight_scale=1e-3, precision=precision
    )

    def run() -> Any:
        teacher, student, quantizers, units = attached(QuantizedResidual, "W2A4")
        reconstruct(
            teacher,
            student,
            quantizers,
            units,
            images(64),
            settings=settings,
            calibration=Calibration(),
            seed=0,
            finished={},
            log=lambda *_: None,
        )
        return student(images(16, seed=3))

    # On a CPU the optimizer has no form that counts its steps on the device.
    adam = torch.optim.Adam
    monkeypatch.setattr(
        learn_unit_module.torch.optim, "Adam", lambda *a, capturable, **k: adam(*a, **k), raising=True
    )
    plain, tables = both(monkeypatch, learn_unit_module, run)
    torch.testing.assert_close(tables, plain, rtol=0.0, atol=0.05)
    assert (tables == plain).float().mean() > 0.5


@pytest.mark.parametrize("neighbour", ["searched", "carried"])
def test_tables_of_a_refinement_are_its_steps(neighbour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, units = calibrated(Residual)
    made = synthesize_batch(
        teacher, replace(SYNTHESIS, cooldown=0.0), SIZE, 8, rng=rng(), log=lambda *_: None
    )
    settings = Refinement(
        steps=3, lr_latent=0.01, lr_generator=1e-3, generator_decay_interval=2, neighbour=neighbour
    )
    probe, observer = gradient_probe(teacher, student, units, "last_layer"), observe(teacher, logits=True)
    logs: list[Any] = []

    def run() -> Tensor:
        found, _ = refine_batch(
            observer,
            probe,
            made,
            settings,
            SynthesisLoss(SYNTHESIS, InputStatistics()),
            bank=None,
            rng=rng(1),
            log=lambda step, values: logs.append((step, values)),
        )
        return found.images

    plain, tables = both(monkeypatch, refine_module, run)
    # The search for neighbours follows tiny differences (of rates rounded to float32): few steps, and means.
    assert (tables - plain).abs().mean() < 0.1 * (plain - made.images).abs().mean()
    assert [step for step, _ in logs] == [0, 1, 2] * 2
    assert logs[0][1] == pytest.approx(logs[3][1])
    assert [v["bn"] for _, v in logs[:3]] == pytest.approx([v["bn"] for _, v in logs[3:]], rel=1e-2)
