"""Refinement: neighbours that are worst, images that get better, networks that nothing changes."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from image_networks import SIZE, Residual
from student_networks import batch_of, bits_of, calibrated
from torch import Tensor, nn

from zsq.errors import JobError, UsageError
from zsq.images.batches import Batch, batch_from_piece
from zsq.images.forward import Observer, observe
from zsq.images.gradients import (
    Gradients,
    Probe,
    detached,
    directions,
    gradient_match,
    gradient_probe,
    similarity,
)
from zsq.images.losses import InputStatistics
from zsq.images.neighbours import find_neighbours, to_edge
from zsq.images.refine import refine
from zsq.images.refine_batch import LARGEST_HOLD, held, refine_batch
from zsq.images.settings import Filter, Refinement, Synthesis
from zsq.images.synthesis_loss import SynthesisLoss
from zsq.images.synthesize import synthesize

SYNTHESIS = Synthesis(num_images=12, batch_size=12, steps=30, latent_size=16)
SETTINGS = Refinement(steps=3, lr_latent=0.01, lr_generator=1e-3)
Networks = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def networks() -> Networks:
    return calibrated(Residual)


@pytest.fixture(scope="module")
def batch(networks: Networks) -> Batch:
    """A batch that synthesis has made."""
    finished: dict[str, dict[str, Tensor]] = {}
    synthesize(
        networks[0], SYNTHESIS, SIZE, seed=0, finished=finished, log=lambda *_: None, keep_sources=True
    )
    return batch_from_piece(finished["synthesis-000"], torch.device("cpu"))


@pytest.fixture(scope="module")
def probe(networks: Networks) -> Probe:
    return gradient_probe(*networks, "last_layer")


@pytest.fixture(scope="module")
def observer(networks: Networks) -> Observer:
    return observe(networks[0], logits=True)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(latents: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(latents.shape, generator=rng)


def directions_of(probe: Probe, batch: Batch) -> Any:
    return lambda latents: directions(probe(batch.generator(latents), None))


def refined(
    observer: Observer,
    probe: Probe,
    batch: Batch,
    settings: Refinement,
    bank: Gradients | None = None,
    seed: int = 0,
    synthesis: Synthesis = SYNTHESIS,
) -> tuple[Tensor, Gradients, list[dict[str, float]]]:
    logged: list[dict[str, float]] = []
    made, found = refine_batch(
        observer,
        probe,
        batch,
        settings,
        SynthesisLoss(synthesis, InputStatistics()),
        bank=bank,
        rng=rng(seed),
        log=lambda step, values: logged.append(values),
    )
    return made.images, found, logged


def test_the_loss_of_synthesis_weighs_what_it_was(observer: Observer, probe: Probe, batch: Batch) -> None:
    """With `bn_relative` and its two parts ten times as large, nothing but that loss changes."""
    plain = replace(SETTINGS, bn_relative=True, match_weight=0.0, diversity_weight=0.0, steps=1)
    _, _, (first, *_) = refined(observer, probe, batch, replace(plain, bn_relative=False))
    images, _, (relative, *_) = refined(observer, probe, batch, plain)
    assert relative["loss"] == pytest.approx(1.0, rel=1e-5) and relative["bn"] == pytest.approx(first["bn"])
    tenfold = replace(SYNTHESIS, bn_weight=10 * SYNTHESIS.bn_weight, image_weight=10 * SYNTHESIS.image_weight)
    again, _, (scaled, *_) = refined(observer, probe, batch, plain, synthesis=tenfold)
    assert scaled["bn"] == pytest.approx(10 * first["bn"]) and scaled["loss"] == pytest.approx(1.0)
    torch.testing.assert_close(again, images)


def test_the_weight_of_a_held_loss() -> None:
    one = torch.tensor(1.0)
    weight = one
    for _ in range(2):
        weight = held(weight, one, torch.tensor(1.1), one)
    assert float(weight) == pytest.approx(1.1**8) and float(weight) > 2
    assert float(held(weight, one, torch.tensor(0.5), one)) == 1.0  # no lighter than it began
    assert float(held(1e4 * one, one, torch.tensor(2.0), one)) == LARGEST_HOLD
    for unit in (1e-3, 1e3):  # neither the loss's unit nor its weight's matters
        now = held(unit * weight, unit * one, unit * torch.tensor(1.3), unit * one)
        torch.testing.assert_close(now, unit * held(weight, one, torch.tensor(1.3), one))


def test_a_held_loss_stays_where_it_was(observer: Observer, probe: Probe, batch: Batch) -> None:
    """Against terms that are fifty times as heavy as published; without it they win."""
    heavy = replace(SETTINGS, match_weight=50.0, diversity_weight=50.0, steps=40)
    _, _, free = refined(observer, probe, batch, heavy)
    _, _, kept = refined(observer, probe, batch, replace(heavy, bn_hold=True))
    assert kept[0] == free[0]  # it begins with the weight that was set
    start = free[0]["bn"]
    assert free[-1]["bn"] > 1.3 * start
    assert kept[-1]["bn"] < 1.15 * start < free[-1]["bn"]
    assert kept[-1]["match"] + kept[-1]["diversity"] < kept[0]["match"] + kept[0]["diversity"]
    # Relative to its start, the weight begins there: 1 / start in place of 1
    both = replace(heavy, bn_hold=True, bn_relative=True, steps=1)
    _, _, (first, *_) = refined(observer, probe, batch, both)
    expected = 1 + 50 * (first["match"] + first["diversity"])
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    without = replace(heavy, bn_weight=0.0, steps=3)  # nothing to hold
    images, _, _ = refined(observer, probe, batch, without)
    again, _, _ = refined(observer, probe, batch, replace(without, bn_hold=True))
    assert torch.equal(images, again)


# ---- the search


def test_similarity_has_no_slope_at_distance_zero(networks: Networks) -> None:
    """Section (f), test 2: the published search follows rounding noise."""
    batch = batch_of(6)
    generator, latents = batch.generator.double(), batch.latents.double()
    teacher, student, units = (m.double() if hasattr(m, "double") else m for m in calibrated(Residual))
    probe = gradient_probe(teacher, student, units, "last_layer")

    def at(latents: Tensor) -> Gradients:
        return directions(probe(generator(latents).double(), None))

    own = detached(at(latents))
    for distance, degenerate in ((0.0, True), (0.1, False)):
        start = torch.randn(latents.shape, generator=rng(), dtype=torch.float64)
        offsets = (distance * start / start.norm(dim=1, keepdim=True)).requires_grad_()
        (slope,) = torch.autograd.grad(similarity(at(latents + offsets), own).sum(), offsets)
        assert (float(slope.norm()) < 1e-12) is degenerate


def test_searched_neighbours_are_the_least_similar(batch: Batch, probe: Probe) -> None:
    """Section (f), test 3."""
    at = directions_of(probe, batch)
    own = detached(at(batch.latents))

    def mean_similarity(seed: int, **options: Any) -> float:
        settings = replace(SETTINGS, radius=2.0, **options)
        offsets = find_neighbours(batch.latents, at, own, settings, normal(batch.latents, rng(seed)))
        torch.testing.assert_close(offsets.norm(dim=1), torch.full((12,), 2.0), rtol=1e-5, atol=0)
        assert not offsets.requires_grad
        with torch.no_grad():
            return float(similarity(at(batch.latents + offsets), own).mean())

    def random_similarity(seed: int) -> float:
        drawn = torch.randn(batch.latents.shape, generator=rng(seed))
        with torch.no_grad():
            there = at(batch.latents + 2.0 * drawn / drawn.norm(dim=1, keepdim=True))
            return float(similarity(there, own).mean())

    at_random = sorted(random_similarity(seed) for seed in range(32))
    by_steps = [
        sum(mean_similarity(seed, neighbour_steps=steps) for seed in range(8)) / 8 for steps in (1, 2, 3, 4)
    ]
    published = sum(mean_similarity(seed, neighbour="published") for seed in range(8)) / 8
    assert by_steps[0] < at_random[0]
    assert by_steps[0] < published
    assert all(more <= fewer + 1e-3 for fewer, more in zip(by_steps, by_steps[1:], strict=False))
    assert by_steps[-1] < by_steps[0]


def test_latents_without_slope_get_a_random_neighbour() -> None:
    ones = torch.ones(3, 2)
    offsets = find_neighbours(
        torch.zeros(3, 4),
        lambda z: ((ones + 0 * z.sum(),),),
        ((ones,),),
        replace(SETTINGS, radius=0.5),
        drawn := torch.randn(3, 4, generator=rng()),
    )
    torch.testing.assert_close(offsets, 0.5 * drawn / drawn.norm(dim=1, keepdim=True))


# ---- one batch


def test_starts_from_the_images_that_it_is_given(observer: Observer, probe: Probe, batch: Batch) -> None:
    """Section (f), tests 9 and 10: with all weights 0 nothing moves."""
    still = replace(SETTINGS, bn_weight=0, match_weight=0, diversity_weight=0)
    images, _, logged = refined(observer, probe, batch, still)
    assert torch.equal(images, batch.images) and not logged
    first: list[Tensor] = []

    def watching(images: Tensor, logits: Tensor | None) -> Gradients:
        first.append(images.detach().clone())
        return probe(images, logits)

    refined(observer, watching, batch, SETTINGS)
    assert torch.equal(first[0], batch.images)


def test_radius_zero_leaves_the_match_out(observer: Observer, probe: Probe, batch: Batch) -> None:
    """Section (f), test 13."""
    without, _, _ = refined(observer, probe, batch, replace(SETTINGS, match_weight=0))
    at_zero, _, logged = refined(observer, probe, batch, replace(SETTINGS, radius=0))
    with_match, _, _ = refined(observer, probe, batch, SETTINGS)
    assert torch.equal(without, at_zero) and set(logged[0]) == {"loss", "bn", "diversity"}
    assert not torch.equal(without, with_match)


def test_gradient_reaches_the_latents_through_the_student(batch: Batch, probe: Probe) -> None:
    """Section (f), test 8; through both members of the pair."""
    latents = batch.latents.clone().requires_grad_()
    at = directions_of(probe, batch)
    offsets = find_neighbours(
        batch.latents, at, detached(at(batch.latents)), SETTINGS, normal(batch.latents, rng())
    )
    own, there = at(latents), at(latents + offsets)
    slopes = [
        torch.autograd.grad(gradient_match(a, b), latents, retain_graph=True)[0]
        for a, b in ((own, there), (detached(own), there), (own, detached(there)))
    ]
    for slope in slopes:
        assert bool(slope.isfinite().all()) and float(slope.norm()) > 0
    torch.testing.assert_close(slopes[0], slopes[1] + slopes[2], rtol=1e-3, atol=1e-7)


def test_offsets_reach_the_edge() -> None:
    direction = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-20, 0.0]])
    otherwise = torch.tensor([[1.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    expected = torch.tensor([[1.2, 1.6], [0.0, 2.0], [-2.0, 0.0]])
    torch.testing.assert_close(to_edge(direction, 2.0, otherwise=otherwise), expected)


def test_carried_neighbours_become_less_similar(observer: Observer, probe: Probe, batch: Batch) -> None:
    """With images that stay: random at first, then less alike than random ones; no pass more than without."""
    calls: list[int] = []

    def counting(images: Tensor, logits: Tensor | None) -> Gradients:
        calls.append(len(images))
        return probe(images, logits)

    still = replace(SETTINGS, steps=6, lr_latent=1e-12, lr_generator=1e-12, neighbour="carried", radius=2.0)
    _, _, logged = refined(observer, counting, batch, still)
    matches = [values["match"] for values in logged]
    assert len(calls) == 2 * 6 + 1  # images, neighbours; the images at the end
    assert min(matches[1:]) > matches[0]
    found = find_neighbours(
        batch.latents,
        directions_of(probe, batch),
        detached(directions_of(probe, batch)(batch.latents)),
        replace(still, neighbour="searched"),
        normal(batch.latents, rng()),
    )
    with torch.no_grad():
        at = directions_of(probe, batch)
        searched = float(gradient_match(at(batch.latents), at(batch.latents + found)))
    assert matches[-1] > 0.9 * searched


@pytest.mark.parametrize(
    ("scope", "neighbour"),
    [
        ("last_layer", "searched"),
        ("last_layer", "carried"),
        ("last_unit", "searched"),
        ("all_units", "searched"),
    ],
)
def test_refinement_raises_the_worst_similarity(
    scope: Any, neighbour: Any, networks: Networks, observer: Observer, batch: Batch
) -> None:
    """Section (f), test 5: estimated anew, with other random starts, at the refined latents."""
    probe = gradient_probe(*networks, scope)
    keep: dict[str, Any] = {}

    def worst(latents: Tensor, network: Any) -> float:
        def at(z: Tensor) -> Gradients:
            return directions(probe(network(z), None))

        own, total = detached(at(latents)), 0.0
        for seed in range(4):
            offsets = find_neighbours(latents, at, own, settings, normal(latents, rng(100 + seed)))
            with torch.no_grad():
                total += float(similarity(at(latents + offsets), own).mean()) / 4
        return total

    steps = 40 if scope == "last_layer" else 8
    settings = Refinement(
        steps=steps, lr_latent=0.03, lr_generator=3e-3, bn_weight=0, diversity_weight=0, gradients=scope
    )
    before = worst(batch.latents, batch.generator)
    refined(observer, probe, Trained(batch, keep), replace(settings, neighbour=neighbour))
    after = worst(keep["latents"].detach(), keep["generator"])
    assert after > before + 0.005


class Trained(Batch):
    """A batch that hands out copies and remembers them, so that a test sees what was trained."""

    def __init__(self, batch: Batch, keep: dict[str, Any]) -> None:
        object.__setattr__(self, "images", batch.images)
        object.__setattr__(self, "latents", Remembering(batch.latents, keep, "latents"))
        object.__setattr__(self, "generator", Remembering(batch.generator, keep, "generator"))


class Remembering:
    def __init__(self, value: Any, keep: dict[str, Any], name: str) -> None:
        self.value, self.keep, self.name = value, keep, name

    def clone(self) -> Tensor:
        self.keep[self.name] = self.value.clone()
        return self.keep[self.name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.keep[self.name] = copy.deepcopy(self.value, memo)
        return self.keep[self.name]


def test_nothing_but_the_images_changes(networks: Networks, observer: Observer, batch: Batch) -> None:
    """Section (f), test 7."""
    teacher, student, _ = networks
    before = [bits_of(module) for module in (teacher, student, batch.generator)]
    latents = batch.latents.clone()
    state = torch.random.get_rng_state()
    for scope in ("last_layer", "all_units"):
        images, _, _ = refined(observer, gradient_probe(*networks, scope), batch, replace(SETTINGS, steps=2))
        assert not torch.equal(images, batch.images)
    after = [bits_of(module) for module in (teacher, student, batch.generator)]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    for module in (teacher, student, batch.generator):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert torch.equal(batch.latents, latents) and torch.equal(torch.random.get_rng_state(), state)


def test_learning_rates(observer: Observer, probe: Probe, batch: Batch) -> None:
    published = Refinement(
        steps=40, generator_decay_interval=1, lr_latent=0, lr_latent_min=0, match_weight=0, diversity_weight=0
    )
    every, _, _ = refined(observer, probe, batch, published)
    slowly, _, _ = refined(observer, probe, batch, replace(published, generator_decay_interval=100))
    moved = [float((images - batch.images).square().mean()) for images in (every, slowly)]
    assert 0 < moved[0] < moved[1]  # the published decay freezes the generator


def test_divergence_is_a_job_error(observer: Observer, probe: Probe, batch: Batch) -> None:
    with pytest.raises(JobError, match="diverged"):
        refined(observer, probe, batch, replace(SETTINGS, lr_latent=float("inf")))


# ---- several batches


def several(
    networks: Networks,
    settings: Refinement = SETTINGS,
    finished: dict[str, dict[str, Tensor]] | None = None,
    *,
    keep_sources: bool = False,
) -> tuple[Tensor, list[str]]:
    teacher, student, units = networks
    steps: list[str] = []
    images = refine(
        teacher,
        gradient_probe(teacher, student, units, settings.gradients),
        [lambda seed=seed: batch_of(8, seed=seed) for seed in range(3)],  # type: ignore[misc]
        settings,
        SYNTHESIS,
        seed=7,
        finished={} if finished is None else finished,
        log=lambda name, step, values: steps.append(name),
        keep_sources=keep_sources,
    )
    return images, steps


@pytest.mark.parametrize(
    ("scope", "neighbour"), [("last_layer", "searched"), ("last_layer", "carried"), ("all_units", "searched")]
)
def test_killed_and_resumed(scope: Any, neighbour: Any, networks: Networks) -> None:
    settings = replace(SETTINGS, steps=2, gradients=scope, neighbour=neighbour)
    whole: dict[str, dict[str, Tensor]] = {}
    images, steps = several(networks, settings, whole)
    assert images.shape == (24, *SIZE) and set(steps) == {"refined-000", "refined-001", "refined-002"}
    again, steps = several(networks, settings, {name: whole[name] for name in ("refined-000", "refined-001")})
    assert torch.equal(again, images) and set(steps) == {"refined-002"}
    alone, _ = several(networks, replace(settings, bank_size=0))
    assert torch.equal(alone[:8], images[:8]) and not torch.equal(alone[8:16], images[8:16])


@pytest.mark.parametrize("relative", [False, True])
def test_swinging_is_drawn_anew_for_every_batch_and_resumes(relative: bool, networks: Networks) -> None:
    settings = replace(SETTINGS, swing=True, bn_relative=relative)
    whole: dict[str, dict[str, Tensor]] = {}
    images, _ = several(networks, settings, whole)
    again, _ = several(networks, settings, {"refined-000": whole["refined-000"]})
    assert torch.equal(again, images)
    still, _ = several(networks, replace(settings, swing=False))
    assert all(not torch.equal(*pair) for pair in zip(images.split(8), still.split(8), strict=True))


def test_without_strided_convolutions_nothing_swings() -> None:
    networks = calibrated(Unstrided)
    swinging, _ = several(networks, replace(SETTINGS, swing=True))
    still, _ = several(networks)
    assert torch.equal(swinging, still)


class Unstrided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.bn(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_the_bank_is_bounded_and_without_history(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section (f), test 12."""
    import zsq.images.refine as module

    banks: list[Gradients | None] = []
    original = module.refine_batch

    def watching(*args: Any, bank: Gradients | None, **options: Any) -> tuple[Batch, Gradients]:
        banks.append(bank)
        return original(*args, bank=bank, **options)

    monkeypatch.setattr(module, "refine_batch", watching)
    several(networks, replace(SETTINGS, bank_size=10))
    assert banks[0] is None
    for bank, size in zip(banks[1:], (8, 10), strict=True):
        assert bank is not None
        for factor in bank[0]:
            assert len(factor) == size and not factor.requires_grad
            assert factor.untyped_storage().nbytes() == 4 * factor.numel()  # not a view of something larger


class Saved:
    """A tensor that a graph keeps for its backward pass; counted while it lives."""

    live, peak = 0, 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Saved.live += self.size
        Saved.peak = max(Saved.peak, Saved.live)

    def __del__(self) -> None:
        Saved.live -= self.size


def test_memory_does_not_grow_with_the_batches(networks: Networks) -> None:
    """Section (f), test 12, measured: bytes that graphs hold, when a batch begins and at most meanwhile."""
    before: list[int] = []
    peaks: list[int] = []

    def begin(seed: int) -> Batch:
        before.append(Saved.live)
        peaks.append(Saved.peak)
        Saved.peak = 0
        return batch_of(8, seed=seed)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        refine(
            networks[0],
            gradient_probe(*networks, "last_layer"),
            [lambda seed=seed: begin(seed) for seed in range(6)],  # type: ignore[misc]
            replace(SETTINGS, steps=2),
            SYNTHESIS,
            seed=0,
            finished={},
            log=lambda *_: None,
        )
    bank = 6 * 8 * (16 + 5) * 4  # bytes
    assert before == [0] * 6
    assert peaks[1] > 100 * bank and max(peaks[1:]) < peaks[1] + 8 * bank


def test_sources_are_kept_for_another_refinement(networks: Networks) -> None:
    """From what is kept the images follow; batches that were kept without it are made again."""
    whole: dict[str, dict[str, Tensor]] = {}
    images, _ = several(networks, finished=whole)
    again, steps = several(networks, finished=whole, keep_sources=True)
    assert torch.equal(again, images) and set(steps) == set(whole)
    for piece, made in zip(whole.values(), images.split(8), strict=True):
        batch = batch_from_piece(piece, torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(batch.generator(batch.latents), made)
    _, steps = several(networks, finished=whole)
    assert not steps


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="no more rounds than steps"):
        Refinement(steps=2, rounds=3)
    for name, value in (("steps", 0), ("neighbour_steps", 0), ("radius", -1.0), ("plateau_factor", 1.0)):
        with pytest.raises(UsageError, match=f"refinement.{name}"):
            Refinement(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="searched, carried or published"):
        Refinement(neighbour="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="last_layer, last_unit or all_units"):
        Refinement(gradients="first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="filter.keep"):
        Filter(keep=0)
