"""What only a CUDA device shows; skipped without one."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_networks import SIZE, Residual, captured
from quantization_networks import Residual as QuantizedResidual
from quantization_networks import images, teacher
from test_recipes import shrunk
from torch import Tensor

import zsq.replay as replay_module
from zsq.evaluate import accuracy
from zsq.images.losses import channel_statistics
from zsq.images.prompts import TextToImage
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize_batch
from zsq.kernels import reproducible
from zsq.models import Teacher
from zsq.out_of_memory import in_chunks, return_unused
from zsq.pipeline import quantize, synthesize_images
from zsq.quant.choice import random_choice
from zsq.recipe import GivenImages, Reconstruction
from zsq.recipes import RECIPES
from zsq.recipes.best import BEST
from zsq.recipes.genie import GENIE
from zsq.recipes.sadag import SADAG
from zsq.replay import Replay
from zsq.run import Run, load_run
from zsq.student import student_to_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
BEST_REFINED = replace(BEST, refinement=SADAG.refinement)
WITHOUT_PIPELINE = [name for name, r in RECIPES.items() if not isinstance(r.synthesis, TextToImage)]


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(QuantizedResidual)


def run(model: Teacher, recipe: Any, **options: Any) -> Run:
    given = images(16) if isinstance(recipe.synthesis, GivenImages) else None
    return quantize(model, recipe=recipe, budget="paper", images=given, seed=1, device="cuda", **options)


# ---- recorded steps


def test_what_recorded_steps_used_goes_back_to_the_device() -> None:
    """First of all, as a recording that fails leaves its pool open, and PyTorch then gives nothing back."""
    return_unused(CUDA)
    held = torch.cuda.memory_reserved()

    def record() -> int:
        weight = torch.ones(2**20, device=CUDA)
        step = Replay(lambda: (weight.mul(2.0).add_(1.0),), CUDA)
        results = [step()[0] for _ in range(6)]
        assert float(results[-1][0]) == 3.0
        return torch.cuda.memory_reserved()

    assert record() > held
    return_unused("cuda")
    assert torch.cuda.memory_reserved() <= held


def test_a_recorded_step_goes_on_from_step_to_step() -> None:
    draw = torch.Generator(CUDA).manual_seed(3)
    weight = torch.ones(4, device=CUDA, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1, device=CUDA), fused=True, capturable=True)

    def step() -> tuple[Tensor, Tensor]:
        loss = (weight * torch.rand(4, device=CUDA, generator=draw)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss, weight

    again = Replay(step, CUDA, generators=[draw])
    recorded = [float(again()[0]) for _ in range(12)]
    assert again._graph is not None
    draw.manual_seed(3)
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer.state.clear()
    assert recorded == [float(step()[0].detach()) for _ in range(12)]


def test_a_step_that_waits_is_called_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    total = torch.zeros((), device=CUDA)

    def step() -> tuple[Tensor]:
        total.add_(1.0 if total.item() < 3 else 10.0)
        return (total,)

    again = Replay(step, CUDA)
    with caplog.at_level(logging.INFO, logger="zsq.replay"):
        assert [float(again()[0]) for _ in range(6)] == [1.0, 2.0, 3.0, 13.0, 23.0, 33.0]
    assert "cannot be recorded" in caplog.text
    assert float(torch.rand(3, device=CUDA).sum()) > 0  # the device still works


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_synthesis_has_the_bits_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    network = captured(Residual).to(CUDA)
    settings = Synthesis(num_images=8, batch_size=8, steps=20, latent_size=16, precision=precision)

    def made() -> Tensor:
        rng = torch.Generator().manual_seed(0)
        with reproducible(CUDA):
            return synthesize_batch(network, settings, SIZE, 8, rng=rng, log=lambda *_: None).images

    recorded = made()
    monkeypatch.setattr(replay_module, "WARM_UP", 10**9)
    assert torch.equal(recorded, made())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [GENIE, SADAG, BEST_REFINED], ids=["genie", "sadag", "best refined"])
def test_recorded_run_has_the_bits_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, model: Teacher, recipe: Any, precision: Any
) -> None:
    small = shrunk(recipe)
    learning = replace(small.reconstruction, steps=20, precision=precision)
    refinement = small.refinement and replace(small.refinement, steps=8, warmup_steps=20)
    small = replace(small, reconstruction=learning, refinement=refinement)
    recorded = run(model, small, bits="W2A4")
    monkeypatch.setattr(replay_module, "WARM_UP", 10**9)
    plain = run(model, small, bits="W2A4")
    assert torch.equal(recorded.images, plain.images)
    assert student_to_bytes(recorded.student) == student_to_bytes(plain.student)


# ---- kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channel_statistics(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(5, 7, 6, 4, device=CUDA).mul(3).add(1).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    mean, std = channel_statistics(x)
    wide = x.detach().double().requires_grad_()
    var, wanted = torch.var_mean(wide, dim=(0, 2, 3), correction=1)
    torch.testing.assert_close(mean.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std.double(), var.sqrt(), rtol=1e-5, atol=1e-5)
    weights = torch.randn(7, device=CUDA), torch.randn(7, device=CUDA)
    (got,) = torch.autograd.grad((mean * weights[0]).sum() + (std * weights[1]).sum(), x)
    (slope,) = torch.autograd.grad((wanted * weights[0]).sum() + (var.sqrt() * weights[1]).sum(), wide)
    torch.testing.assert_close(got.double(), slope, rtol=2e-2, atol=2e-3 if dtype == torch.bfloat16 else 1e-6)


def test_choices_have_their_probability() -> None:
    draw = torch.Generator(CUDA).manual_seed(0)
    x = torch.empty(64, 16, 8, 8, device=CUDA)
    chosen = random_choice(x, 0.25, draw).mask()
    assert abs(float(chosen.mean()) - 0.25) < 0.01 and set(chosen.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(chosen, random_choice(x, 0.25, draw).mask())


def test_convolutions_are_in_float32_and_repeat() -> None:
    x, w = torch.randn(8, 64, 28, 28, device=CUDA), torch.randn(64, 64, 3, 3, device=CUDA)
    exact = torch.conv2d(x.double(), w.double(), padding=1)
    with reproducible(CUDA):
        found = torch.conv2d(x, w, padding=1)
        assert torch.equal(found, torch.conv2d(x, w, padding=1))
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5


def test_too_little_memory_halves_the_chunk() -> None:
    free = torch.cuda.mem_get_info()[0]

    def call(rows: slice) -> int:
        torch.empty((rows.stop - rows.start) * (free // 3), dtype=torch.uint8, device=CUDA)
        return rows.stop - rows.start

    sizes = [found for _, found in in_chunks(call, 6, 4, "the test")]
    assert sum(sizes) == 6 and max(sizes) < 4
    return_unused(CUDA)  # for whoever else uses the device


# ---- whole runs


@pytest.mark.parametrize("name", WITHOUT_PIPELINE)
def test_every_recipe_gives_the_same_bits_again(name: str, model: Teacher, tmp_path: Path) -> None:
    recipe = shrunk(RECIPES[name])
    first, again = run(model, recipe), run(model, recipe)
    assert torch.equal(first.images, again.images)
    assert student_to_bytes(first.student) == student_to_bytes(again.student)
    assert first.record["device"] == "cuda"
    first.save(tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert torch.equal(loaded.student(images(3)), first.student(images(3)))
    on_device = loaded.student.to(CUDA)(images(3).to(CUDA)).cpu()
    torch.testing.assert_close(on_device, first.student(images(3)), rtol=0.0, atol=0.2)


def test_an_interrupted_run_ends_with_the_same_bits(model: Teacher, tmp_path: Path) -> None:
    recipe = shrunk(SADAG)
    whole = run(model, recipe, out=tmp_path / "whole")

    def stop(event: Any) -> None:
        if event.stage == "reconstruct" and event.done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, out=tmp_path / "cut", progress=stop)
    resumed = run(model, recipe, out=tmp_path / "cut")
    assert student_to_bytes(resumed.student) == student_to_bytes(whole.student)
    assert torch.equal(resumed.images, whole.images)


def test_tensors_between_units_may_be_in_files(model: Teacher, tmp_path: Path) -> None:
    recipe = replace(shrunk(GENIE), reconstruction=Reconstruction(steps=8, batch_size=5))
    inside, outside = run(model, recipe), run(model, recipe, memory=1)
    assert student_to_bytes(inside.student) == student_to_bytes(outside.student)


def test_images_alone_and_accuracy(model: Teacher) -> None:
    found = synthesize_images(model, recipe=shrunk(GENIE), budget="paper", device="cuda")
    assert found.device.type == "cpu" and bool(found.isfinite().all())
    network = model.module.to(CUDA)
    labels = network(found.to(CUDA)).argmax(1).cpu()
    assert accuracy(network, [(found, labels)], device="cuda").top1 == 100.0
    model.module.cpu()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zsq.cli import main

    out = tmp_path / "run"
    small = ["--set", "synthesis.num_images=16", "--set", "synthesis.steps=10"]
    small += ["--set", "reconstruction.steps=8"]
    command = ["quantize", "digits", "--budget", "quick", "--device", "cuda", "--out", str(out), *small]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0, capsys.readouterr().err
    assert load_run(out).record["device"] == "cuda"
