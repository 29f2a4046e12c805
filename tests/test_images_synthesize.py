"""The synthesis loop: it lowers the loss, keeps every image, repeats itself and leaves the teacher alone."""

import warnings
from dataclasses import replace
from typing import Literal

import pytest
import torch
from image_networks import SIZE, AfterReLU, NoBatchNorm, PreActivation, Residual, captured, trained
from torch import Tensor, fx, nn

from zsq.errors import JobError, UsageError
from zsq.graph.capture import capture
from zsq.images.batches import Batch, batch_sizes
from zsq.images.forward import observe
from zsq.images.losses import BatchNormStatistics, InputStatistics
from zsq.images.schedules import WINDOW, Convergence, Plateau, cooling, schedule
from zsq.images.settings import Synthesis
from zsq.images.sources import LatentGenerator
from zsq.images.synthesize import synthesize, synthesize_batch

SHORT = Synthesis(num_images=8, batch_size=8, steps=3, latent_size=16)


@pytest.fixture(scope="module")
def residual() -> fx.GraphModule:
    return captured(Residual)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_batch(
    teacher: fx.GraphModule, settings: Synthesis, size: tuple[int, int, int] = SIZE, seed: int = 0
) -> tuple[Batch, list[tuple[int, dict[str, float]]]]:
    logged: list[tuple[int, dict[str, float]]] = []
    batch = synthesize_batch(
        teacher, settings, size, settings.num_images, rng=rng(seed), log=lambda s, v: logged.append((s, v))
    )
    return batch, logged


@pytest.mark.parametrize(
    ("kind", "precision", "swings"),
    [
        (Residual, "float32", True),
        (Residual, "bfloat16", True),
        (PreActivation, "float32", False),
        (AfterReLU, "float32", True),
    ],
)
def test_loss_falls_tenfold(
    kind: type[nn.Module], precision: Literal["float32", "bfloat16"], swings: bool
) -> None:
    teacher = captured(kind)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = Synthesis(num_images=32, steps=150, latent_size=32, precision=precision, swing=swings)
    batch, logged = one_batch(teacher, settings)
    assert batch.images.shape == (32, *SIZE) and batch.images.dtype == torch.float32
    assert logged[0][0] == 0 and logged[-1][0] == 149 and len(logged) <= 22
    forward = observe(teacher)(batch.images)
    assert BatchNormStatistics()(forward) < logged[0][1]["bn"] / 10
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in teacher.parameters())


def test_images_are_those_of_the_final_generator(residual: fx.GraphModule) -> None:
    batch, logged = one_batch(residual, replace(SHORT, swing=False))
    torch.testing.assert_close(batch.generator(batch.latents), batch.images)
    forward = observe(residual)(batch.images)
    loss = BatchNormStatistics()(forward) + InputStatistics()(forward)
    assert float(loss) < logged[-1][1]["loss"]  # one more step than the last that was logged
    assert not batch.images.requires_grad and not any(p.requires_grad for p in batch.generator.parameters())


def test_first_step_moves_by_the_published_learning_rates(residual: fx.GraphModule) -> None:
    batch, _ = one_batch(residual, replace(SHORT, steps=1))
    stream = rng()
    latents = torch.randn(8, 16, generator=stream)
    start = LatentGenerator(SIZE, latent_size=16, rng=stream)
    # the first step of Adam moves everything by lr * g / (|g| + 1e-8)
    assert float((batch.latents - latents).abs().median()) == pytest.approx(0.1, rel=1e-3)
    for (name, new), old in zip(batch.generator.named_parameters(), start.parameters(), strict=True):
        assert float((new - old.detach()).abs().max()) <= 0.01 * 1.001, name
    moved = batch.generator.linear_weight - start.linear_weight.detach()
    assert float(moved.abs().median()) == pytest.approx(0.01, rel=1e-3)


def test_learning_rates_at_the_end(residual: fx.GraphModule) -> None:
    settings = replace(SHORT, steps=80, generator_decay_interval=2, plateau_patience=100)
    _, logged = one_batch(residual, settings)
    assert logged[-1][1]["lr_generator"] == pytest.approx(0.01 * 0.95**40)  # 1.3e-3, as after 4000 steps
    assert logged[-1][1]["lr_latent"] == pytest.approx(0.1)
    assert Synthesis().steps // Synthesis().generator_decay_interval == 40


def test_schedule_shrinks_with_the_steps_if_asked() -> None:
    assert schedule(Synthesis()) == schedule(Synthesis(steps=400)) == (100, 100)
    assert schedule(Synthesis(schedule_steps=4000)) == (100, 100)
    assert schedule(Synthesis(steps=8000, schedule_steps=4000)) == (100, 100)
    assert schedule(Synthesis(steps=400, schedule_steps=4000)) == (10, 10)
    assert schedule(Synthesis(steps=7, schedule_steps=4000)) == (1, 1)


@pytest.mark.parametrize("patience", [1, 3, 20])
def test_plateau_is_the_rule_of_torch(patience: int) -> None:
    losses = torch.cat(
        (torch.linspace(3, 1, 30), 1 + 0.01 * torch.rand(300, generator=rng()), torch.tensor([0.5]))
    )
    losses[40] = losses[39] * (1 - 0.9e-4)  # not enough of a fall
    losses[100] = torch.nan
    plateau = Plateau(0.1, factor=0.1, patience=patience, lowest=1e-4, device=torch.device("cpu"))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=patience, min_lr=1e-4)
    seen = set()
    for loss in losses:
        plateau.step(loss)
        oracle.step(loss.item())
        assert float(plateau.lr) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
        seen.add(round(optimizer.param_groups[0]["lr"], 6))
    assert seen == {0.1, 0.01, 0.001, 0.0001}


def test_latents_take_the_learning_rate_of_the_plateau(residual: fx.GraphModule) -> None:
    batch, logged = one_batch(residual, replace(SHORT, lr_latent=0.0, lr_latent_min=0.0))
    assert torch.equal(batch.latents, torch.randn(8, 16, generator=rng()))
    # a constant loss: the first step sets the mark, the patience of 5 is over at the sixth step after it
    settings = replace(SHORT, steps=9, plateau_patience=5, bn_weight=0.0, image_weight=0.0)
    _, logged = one_batch(residual, settings)
    assert [v["lr_latent"] for _, v in logged] == pytest.approx([0.1] * 6 + [0.01] * 3)


def test_fused_adam_reads_a_tensor_learning_rate_anew() -> None:
    lr, parameter = torch.tensor(0.1), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": lr}], fused=True)
    parameter.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), -0.1))
    lr.zero_()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), -0.1))


@pytest.mark.parametrize("size", [(1, 12, 12), (3, 9, 13), (4, 7, 5)])
def test_other_image_sizes(size: tuple[int, int, int]) -> None:
    teacher = capture(trained(Residual(size[0]), size), size)
    batch, logged = one_batch(teacher, replace(SHORT, steps=20), size)
    assert batch.images.shape == (8, *size)
    assert logged[-1][1]["loss"] < logged[0][1]["loss"]


def test_no_image_is_dropped() -> None:
    assert batch_sizes(1024, 128) == (128,) * 8
    assert batch_sizes(1056, 128) == (128,) * 8 + (32,)
    assert batch_sizes(100, 128) == (100,)
    assert batch_sizes(129, 128) == (65, 64)
    assert batch_sizes(261, 128) == (87, 87, 87)
    assert batch_sizes(3, 128) == (3,)
    assert batch_sizes(5, 2) == (3, 2)
    for num_images in range(2, 70):
        for batch_size in range(2, 40):
            sizes = batch_sizes(num_images, batch_size)
            assert sum(sizes) == num_images and min(sizes) >= 2, (num_images, sizes)
            assert max(sizes) <= batch_size or batch_size == 2  # an odd number in pairs: one batch of three


def test_same_seed_same_bits_and_resuming(residual: fx.GraphModule) -> None:
    settings = replace(SHORT, num_images=26, batch_size=9)
    names = []

    def run(finished: dict[str, dict[str, Tensor]], seed: int = 0) -> Tensor:
        return synthesize(
            residual,
            settings,
            SIZE,
            seed=seed,
            finished=finished,
            log=lambda name, step, steps, values: names.append((name, step, steps)),
        )

    finished: dict[str, dict[str, Tensor]] = {}
    images = run(finished)
    assert images.shape == (26, *SIZE) and list(finished) == [f"synthesis-00{k}" for k in range(3)]
    assert names[-1] == ("synthesis-002", 2, 3)
    half = {"synthesis-001": finished["synthesis-001"]}
    assert torch.equal(run(half), images)
    assert torch.equal(run({}), images)
    assert not torch.equal(run({}, seed=1), images)
    assert not torch.equal(images[:9], images[9:18])


def test_global_randomness_is_not_used(residual: fx.GraphModule) -> None:
    before = torch.random.get_rng_state()
    one_batch(residual, SHORT)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_teacher_that_still_wants_gradients() -> None:
    teacher = captured(Residual)
    for parameter in teacher.parameters():
        parameter.requires_grad_(True)
    one_batch(teacher, SHORT)
    assert all(p.grad is None for p in teacher.parameters())


def test_errors_of_the_user(residual: fx.GraphModule) -> None:
    with pytest.raises(UsageError, match="no BatchNorm"):
        one_batch(capture(NoBatchNorm().eval(), SIZE), SHORT)
    for name, value in (
        ("num_images", 1),
        ("batch_size", 1),
        ("steps", 0),
        ("plateau_factor", 1.0),
        ("converged", 1.0),
    ):
        with pytest.raises(UsageError, match=f"synthesis.{name}"):
            Synthesis(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        Synthesis(precision="int8")  # type: ignore[arg-type]
    with pytest.raises(JobError, match="diverged"), warnings.catch_warnings():
        one_batch(residual, replace(SHORT, lr_latent=float("inf")))


def test_ends_early_when_converged(residual: fx.GraphModule) -> None:
    settings = replace(SHORT, steps=400, converged=0.9)
    batch, logged = one_batch(residual, settings)
    last = logged[-1][0]
    assert 99 <= last < 399 and (last + 1) % WINDOW == 0
    _, same = one_batch(residual, replace(settings, steps=last + 1, converged=0.0))
    assert same[-1][1] == pytest.approx(logged[-1][1])
    _, whole = one_batch(residual, replace(SHORT, steps=120))
    assert whole[-1][0] == 119


def test_cooldown_takes_both_learning_rates_to_zero(residual: fx.GraphModule) -> None:
    settings = replace(SHORT, steps=20, cooldown=0.5)
    assert [cooling(step, settings) for step in (0, 9, 10, 15, 20)] == [1, 1, 1, 0.5, 0]
    assert {cooling(step, SHORT) for step in range(4)} == {1}
    _, logged = one_batch(residual, settings)
    rates = [(values["lr_latent"], values["lr_generator"]) for _, values in logged]
    assert rates[8] == pytest.approx((0.1, 0.01)) and rates[14] == pytest.approx((0.05, 0.005))
    assert rates[19] == (0, 0)


def test_convergence_compares_windows() -> None:
    falling, level = Convergence(0.1), Convergence(0.1)
    assert not any(falling.reached(step, torch.tensor(0.99**step)) for step in range(4 * WINDOW))
    reached = [step for step in range(4 * WINDOW) if level.reached(step, torch.tensor(1.0))]
    assert reached[0] == 2 * WINDOW - 1
    nan = Convergence(0.1)
    assert not any(nan.reached(step, torch.tensor(torch.nan)) for step in range(2 * WINDOW))


def test_later_batches_start_from_the_first_generator(residual: fx.GraphModule) -> None:
    settings = replace(SHORT, num_images=24, steps=60, reuse_steps=5)
    steps: dict[str, list[int]] = {}
    losses: dict[str, float] = {}

    def run(settings: Synthesis, finished: dict[str, dict[str, Tensor]]) -> Tensor:
        def log(name: str, step: int, total: int, values: dict[str, float]) -> None:
            steps.setdefault(name, []).append(total)
            losses.setdefault(name, values["bn"])

        return synthesize(residual, settings, SIZE, seed=0, finished=finished, log=log)

    finished: dict[str, dict[str, Tensor]] = {}
    images = run(settings, finished)
    assert {name: set(totals) for name, totals in steps.items()} == {
        "synthesis-000": {60},
        "synthesis-001": {5},
        "synthesis-002": {5},
    }
    assert losses["synthesis-001"] < losses["synthesis-000"] / 2  # before the first step
    first_and_last = {name: finished[name] for name in ("synthesis-000", "synthesis-002")}
    assert torch.equal(run(settings, first_and_last), images)  # in any order after the first
    assert not torch.equal(images[8:16], images[16:])
    plain: dict[str, dict[str, Tensor]] = {}
    run(replace(settings, reuse_steps=0), plain)
    assert all(list(batch) == ["images"] for batch in plain.values())
    assert torch.equal(plain["synthesis-000"]["images"], images[:8])
