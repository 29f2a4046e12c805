"""Fine-tuning on tiny networks: what is trained, what stays, what a continued training gives."""

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from quantization_networks import CLASSES, Residual, Tokens, attached, images
from torch import Tensor, fx, nn

from zsq.distributed import Group
from zsq.errors import JobError, UsageError
from zsq.graph.blocks import Unit
from zsq.images.settings import LowPass
from zsq.quant.attach import Quantizers
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.recipe import Calibration, Reconstruction
from zsq.recover import network_outputs
from zsq.recover.fine_tune import PIECE, FineTuningResult, Finished, fine_tune, lr_at
from zsq.recover.network_outputs import Observed, looked_at, parts_of_loss
from zsq.recover.reconstruct import reconstruct
from zsq.recover.settings import (
    Agreement,
    ClassLabels,
    Distillation,
    FeatureAlignment,
    FineTuning,
    MapAlignment,
    Perturbation,
)
from zsq.recover.tuning_step import clip_to_share
from zsq.student import student_to_bytes

IMAGES = images(24, seed=5)
Networks = tuple[fx.GraphModule, fx.GraphModule, Quantizers, tuple[Unit, ...]]
TINY = FineTuning(epochs=3, iterations=4, batch_size=8, lr=1e-4, lr_decays=0)
STEADY = replace(TINY, epochs=6, batch_size=24, augment=False)  # all images in every step
ALL = replace(
    TINY,
    ranges="minmax",
    low_pass=LowPass(),
    agreement=Agreement(),
    labels=ClassLabels(threshold=0.9),
    maps=MapAlignment(),
    features=FeatureAlignment(weight=10.0),
    perturbation=Perturbation(),
)


def start(bits: str = "W4A4", kind: type[nn.Module] = Residual, steps: int = 0) -> Networks:
    """Teacher and a student of its own that is calibrated, or with `steps` reconstructed."""
    teacher, student, quantizers, units = _started(bits, kind, steps)
    return teacher, copy.deepcopy(student), quantizers, units


@functools.cache
def _started(bits: str, kind: type[nn.Module], steps: int) -> Networks:
    teacher, student, quantizers, units = attached(kind, bits, ends="same")
    reconstruct(
        teacher,
        student,
        quantizers,
        units,
        IMAGES,
        settings=Reconstruction(steps=steps, batch_size=8) if steps else None,
        calibration=Calibration(),
        seed=0,
        finished={},
        log=lambda *_: None,
    )
    return teacher, student, quantizers, units


def tune(
    networks: Networks, settings: FineTuning = TINY, finished: Finished | None = None, **options: Any
) -> FineTuningResult:
    teacher, student, quantizers, units = networks
    arguments: dict[str, Any] = {"labels": None, "reconstructed": False, "seed": 0, "log": lambda *_: None}
    return fine_tune(
        teacher,
        student,
        quantizers,
        units,
        IMAGES,
        settings=settings,
        finished={} if finished is None else finished,
        **{**arguments, **options},
    )


def distance(networks: Networks) -> float:
    with torch.no_grad():
        return float((networks[0](IMAGES) - networks[1](IMAGES)).square().mean())


def test_it_comes_closer_to_the_teacher_and_leaves_it_alone() -> None:
    networks = start("W3A3")
    teacher, student, *_ = networks
    before, untouched = distance(networks), copy.deepcopy(teacher.state_dict())
    result = tune(networks, replace(STEADY, epochs=10))
    assert result.epochs == 10 and result.last["loss"] < 0.8 * result.first["loss"]
    assert distance(networks) < before
    assert all(torch.equal(value, untouched[name]) for name, value in teacher.state_dict().items())
    kinds = {type(m) for m in student.modules()} - {nn.Module, type(student)}
    assert kinds == {WeightQuantizer, ActivationQuantizer}
    assert not any(p.requires_grad for p in student.parameters())


def test_running_statistics_stay_and_the_rest_moves() -> None:
    """Section (f), test 16."""
    networks = start()
    student = networks[1]
    before = copy.deepcopy(student.state_dict())
    tune(networks)
    after = student.state_dict()
    running = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert len(running) == 12 and all(torch.equal(before[name], after[name]) for name in running)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for name in ("stem.bn.weight", "block1.first.bn.bias", "fc.bias"):
        assert name in moved
    assert any(name.endswith("codes") for name in moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"distillation": Distillation(weight=1.0, mean="elements")},
        {"distillation": None, "agreement": Agreement(), "lr": 1e-3},
        {"distillation": None, "labels": ClassLabels(), "lr": 1e-3},
        {"maps": MapAlignment(channels="positive")},
        {"features": FeatureAlignment(weight=10.0)},
        {"perturbation": Perturbation(size=0.05)},
        {"labels": ClassLabels(), "clip": 1e-3, "lr": 3e-3},
        {"maps": MapAlignment(weight=5.0), "precision": "bfloat16"},
        {"saturated_gradients": True, "low_pass": LowPass(cutoff=3.0, unit="bins")},
        {"ranges": "minmax"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_loss_and_option_lowers_its_loss(changes: dict[str, Any]) -> None:
    settings = replace(STEADY, **changes)
    result = tune(start("W3A3"), settings)
    parts = {
        name
        for name in ("distillation", "agreement", "labels", "maps", "features")
        if getattr(settings, name)
    }
    parts |= {"perturbed"} if settings.perturbation else set()
    assert set(result.first) == {"loss", *parts}
    for means in (result.first, result.last):
        assert means["loss"] == pytest.approx(sum(means[name] for name in parts), rel=1e-5)
    assert result.last["loss"] < result.first["loss"]


def test_maps_come_closer_with_their_loss_than_without() -> None:
    """Section (f), test 20."""
    found = []
    for weight in (0.0, 200.0):
        networks = start("W2A4")
        tune(networks, replace(STEADY, maps=MapAlignment(weight=weight)))
        found.append(_map_gap(networks))
    assert found[1] < found[0]


def _map_gap(networks: Networks) -> float:
    teacher, student, _, units = networks
    settings = FineTuning(maps=MapAlignment(weight=1.0))
    labels = teacher(IMAGES).argmax(1)
    names = looked_at(teacher.graph, units, settings)
    both = [Observed(network, names, settings)(IMAGES, labels) for network in (student, teacher)]
    return float(parts_of_loss(*both, labels, settings, (8, 8))["maps"].detach())


def test_equal_networks_have_no_loss() -> None:
    """Section (f), tests 6 and 7: the teacher beside itself."""
    teacher, _, _, units = start()
    labels = torch.zeros(24, dtype=torch.int64)
    settings = replace(ALL, labels=None, agreement=None)
    shown = Observed(teacher, looked_at(teacher.graph, units, settings), settings)(IMAGES, labels)
    parts = parts_of_loss(shown, shown.constant(), labels, settings, (8, 8))
    assert set(parts) == {"distillation", "features", "maps"}
    assert all(float(part.detach()) == pytest.approx(0.0, abs=1e-6) for part in parts.values())
    elements = replace(settings, distillation=Distillation(weight=20.0, mean="elements"))
    other = replace(shown.constant(), logits=shown.logits.detach().flip(0))
    by_batch, by_element = (
        float(parts_of_loss(shown, other, labels, s, (8, 8))["distillation"].detach())
        for s in (settings, elements)
    )
    assert by_batch == pytest.approx(CLASSES * by_element) and by_element > 0


def test_from_a_reconstructed_student() -> None:
    """Without a step it is that student, bit for bit; then weights leave what the codes stood for."""
    networks = start("W3A3", steps=5)
    student = networks[1]
    before = student_to_bytes(student)
    tune(networks, replace(TINY, lr=0.0, weight_decay=0.0), reconstructed=True)
    assert student_to_bytes(student) == before
    scales = {n: m.scale.clone() for n, m in student.named_modules() if isinstance(m, WeightQuantizer)}
    codes = {n: m.codes.clone() for n, m in student.named_modules() if isinstance(m, WeightQuantizer)}
    result = tune(networks, replace(STEADY, lr=1e-3, epochs=10), reconstructed=True)
    assert result.last["loss"] < result.first["loss"]
    for name, scale in scales.items():
        quantizer: Any = student.get_submodule(name)
        assert torch.equal(quantizer.scale, scale)
    assert any(not torch.equal(student.get_submodule(n).codes, c) for n, c in codes.items())  # type: ignore[arg-type]


def test_ranges_of_minima_and_maxima_or_kept() -> None:
    for ranges, reconstructed, kept in (
        ("kept", False, True),
        ("kept", True, True),
        ("minmax", False, False),
        ("minmax", True, True),  # it has learned its ranges
    ):
        networks = start("W4A4", steps=2 if reconstructed else 0)
        before = {n: q.scale.clone() for n, q in _activation_quantizers(networks[1]).items()}
        settings = replace(TINY, epochs=1, iterations=1, ranges=ranges)  # type: ignore[arg-type]
        tune(networks, settings, reconstructed=reconstructed)
        after = {n: q.scale for n, q in _activation_quantizers(networks[1]).items()}
        assert all(torch.equal(after[n], before[n]) == kept for n in before), (ranges, reconstructed)


def test_ranges_are_those_of_the_images_as_they_are_seen() -> None:
    """One batch of all images, no augmentation: the lowest and highest value that arrives."""
    networks = start("W8A8")
    student, quantizers = networks[1], networks[2]
    tune(
        networks,
        replace(
            TINY,
            epochs=1,
            iterations=1,
            batch_size=24,
            augment=False,
            lr=0.0,
            weight_decay=0.0,
            ranges="minmax",
        ),
    )
    first = quantizers.activations[next(iter(quantizers.activations))]
    seen: list[Tensor] = []
    quantizer = student.get_submodule(first)
    handle = quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    student(IMAGES)
    handle.remove()
    assert isinstance(quantizer, ActivationQuantizer)
    expected = (seen[0].max() - seen[0].min()) / 255
    assert float(quantizer.scale.detach()) == pytest.approx(float(expected), rel=1e-3)


def _activation_quantizers(student: fx.GraphModule) -> dict[str, ActivationQuantizer]:
    return {n: m for n, m in student.named_modules() if isinstance(m, ActivationQuantizer)}


def test_all_layers_have_the_bits_of_the_scheme() -> None:
    """Section (f), test 15."""
    networks = start("W3A3")
    tune(networks)
    quantizers = [m for m in networks[1].modules() if isinstance(m, (WeightQuantizer, ActivationQuantizer))]
    assert len(quantizers) > 8 and {m.bits for m in quantizers} == {3}
    for module in quantizers:
        if isinstance(module, WeightQuantizer):
            assert int(module.codes.max()) <= 7


def test_continued_after_any_epoch_the_same_bits() -> None:
    whole = start("W3A3")
    wanted = tune(whole, ALL)
    for stop in (1, 2, 3):
        finished: Finished = {}
        events: list[int] = []

        def interrupt(step: int, _: dict[str, float], seen: list[int] = events, at: int = stop) -> None:
            seen.append(step)
            if step >= at * ALL.iterations:
                raise KeyboardInterrupt

        if stop < ALL.epochs:
            with pytest.raises(KeyboardInterrupt):
                tune(start("W3A3"), ALL, finished, log=interrupt)
        else:
            tune(start("W3A3"), ALL, finished)
        assert int(finished[PIECE]["epochs"]) == stop
        networks, again = start("W3A3"), []
        result = tune(networks, ALL, finished, log=lambda step, _: again.append(step))  # noqa: B023
        assert result == wanted
        assert student_to_bytes(networks[1]) == student_to_bytes(whole[1])
        assert all(step >= stop * ALL.iterations for step in again)


def test_seeds_and_labels_matter() -> None:
    def bits(settings: FineTuning = TINY, **options: Any) -> bytes:
        networks = start("W3A3")
        tune(networks, settings, **options)
        return student_to_bytes(networks[1])

    assert bits() == bits() != bits(seed=1)
    hard = replace(TINY, labels=ClassLabels(weight=50.0))
    own = start("W3A3")[0](IMAGES).argmax(1)
    assert bits(hard) == bits(hard, labels=own) != bits(hard, labels=(own + 1) % CLASSES)
    assert bits(labels=own) == bits(labels=(own + 1) % CLASSES)  # nothing looks at them


def test_parts_switched_off_are_the_base_method() -> None:
    """Section (f), test 19: weights 0 and no filter give the same bits as without the parts."""
    plain, zero = start("W3A3"), start("W3A3")
    tune(plain, TINY)
    tune(zero, replace(TINY, labels=ClassLabels(weight=0.0), low_pass=None))
    assert student_to_bytes(plain[1]) == student_to_bytes(zero[1])


def test_perturbed_images_are_moved_by_the_step_up_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Section (f), test 17: each pixel by the size, and the loss grows."""
    seen: list[Tensor] = []
    call = Observed.__call__

    def spy(self: Observed, x: Tensor, labels: Tensor, *, maps: bool = True) -> Any:
        seen.append(x.detach().clone())
        return call(self, x, labels, maps=maps)

    monkeypatch.setattr(network_outputs.Observed, "__call__", spy)
    settings = replace(TINY, epochs=1, lr=1e-6, perturbation=Perturbation(size=0.03))
    result = tune(start("W3A3"), settings)
    assert len(seen) == 8 + 4 * 4  # of both networks on images and moved ones; the loss before
    images_, again, moved, moved_again = seen[8:12]
    assert torch.equal(images_, again) and torch.equal(moved, moved_again)
    gap = (moved - images_).abs()
    assert float(gap.max()) == pytest.approx(0.03, rel=1e-3) and float((gap > 0.029).float().mean()) > 0.9
    assert result.first["perturbed"] > result.first["distillation"]


def test_the_teacher_runs_once_where_images_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    call = Observed.__call__

    def spy(self: Observed, x: Tensor, labels: Tensor, *, maps: bool = True) -> Any:
        counts.append(len(x))
        return call(self, x, labels, maps=maps)

    monkeypatch.setattr(network_outputs.Observed, "__call__", spy)
    slow = replace(TINY, lr=1e-6)
    tune(start(), replace(slow, augment=False, maps=MapAlignment(), low_pass=LowPass()))
    assert counts == [24, *[8] * (4 + 12)]  # the teacher once, then the student: before, and 12 steps
    counts.clear()
    tune(start(), slow)
    assert counts == [8] * 32


def test_cached_and_fresh_teacher_outputs_agree() -> None:
    """The step of size 0 makes the same images fresh in every step."""
    cached, fresh = start("W3A3"), start("W3A3")
    settings = replace(TINY, augment=False, maps=MapAlignment(), features=FeatureAlignment(weight=1.0))
    first = tune(cached, settings)
    second = tune(fresh, replace(settings, perturbation=Perturbation(size=0.0, weight=0.0)))
    for name, value in first.last.items():
        if name != "loss":
            assert second.last[name] == pytest.approx(value, rel=2e-2, abs=1e-6)


def test_learning_rate_decays_at_most_so_often() -> None:
    settings = FineTuning(lr=1.0, lr_decay=0.1, lr_decay_epochs=20, lr_decays=3, epochs=400)
    rates = [lr_at(epoch, settings) for epoch in (0, 19, 20, 39, 40, 59, 60, 399)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_transformers_train_too() -> None:
    networks = start("W4A4", Tokens)
    result = tune(networks, replace(STEADY, maps=MapAlignment(weight=1.0)))
    assert result.last["loss"] < result.first["loss"]


def test_wrong_settings_and_divergence() -> None:
    for make, text in (
        (lambda: FineTuning(distillation=None), "has no loss"),
        (lambda: FineTuning(epochs=0), "fine_tuning.epochs is 0"),
        (lambda: FineTuning(momentum=1.0), "fine_tuning.momentum"),
        (lambda: FineTuning(crop_scale=0.0), "fine_tuning.crop_scale"),
        (lambda: FineTuning(clip=0.0), "fine_tuning.clip is 0.0"),
        (lambda: FineTuning(ranges="ema"), "fine_tuning.ranges"),  # type: ignore[arg-type]
        (lambda: ClassLabels(threshold=1.5), "labels.threshold"),
        (lambda: Distillation(temperature=0.0), "distillation.temperature"),
    ):
        with pytest.raises(UsageError, match=text):
            make()
    with pytest.raises(JobError, match="Fine-tuning diverged: from step 3 of 12"):
        tune(start(), replace(TINY, lr=1e30))


def test_an_epoch_that_makes_it_worse_is_undone() -> None:
    """The rate falls to a third until it does not; what comes out is what that rate gives from the start."""
    rates: list[float] = []
    settings = replace(TINY, ranges="minmax", lr=0.1)
    networks, slower = start("W3A3"), start("W3A3")
    result = tune(networks, settings, log=lambda step, values: rates.append(values["lr"]))
    assert result.lr_factor < 1 and result.last["loss"] < 2 * result.first["loss"]
    assert rates[0] == 0.1 and rates[-1] == pytest.approx(0.1 * result.lr_factor)
    if rates[-6] == rates[-1]:  # no epoch but the first was undone
        again = tune(slower, replace(settings, lr=rates[-1]))
        assert again.lr_factor == 1 and again.last == pytest.approx(result.last, rel=1e-6)


def test_gradients_are_scaled_to_a_share_of_the_weights() -> None:
    """All by one factor, and only where they are larger."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    gradients = [torch.randn(4, 3), torch.randn(5)]  # the third has none
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    moved = torch.cat([p.detach().flatten() for p in parameters[:2]]).norm()
    clip_to_share(parameters, 0.01, lr=1.0)
    clipped = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert clipped.norm() == pytest.approx(0.01 * float(moved), rel=1e-5)
    whole = torch.cat([g.flatten() for g in gradients])
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm())
    before = clipped.clone()
    clip_to_share(parameters, 0.01, lr=0.5)  # twice as large would do
    assert torch.equal(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), before)
    for parameter in parameters[:2]:
        parameter.grad = torch.zeros_like(parameter)
    clip_to_share(parameters, 0.01, lr=1.0)
    assert all(p.grad is None or not p.grad.any() for p in parameters)


def test_clipped_steps_move_the_weights_no_further_than_their_share() -> None:
    share, steps = 1e-4, 4
    settings = replace(
        TINY, epochs=1, iterations=steps, lr=1.0, momentum=0.0, weight_decay=0.0, clip=share, undo_rise=1e9
    )
    networks = start()
    before = {n: p.detach().clone() for n, p in networks[1].named_parameters()}
    tune(networks, settings)
    distances = [(p - before[n]).norm() for n, p in networks[1].named_parameters()]
    norm = torch.stack([p.norm() for p in networks[0].parameters()]).norm()
    assert 0 < float(torch.stack(distances).norm()) <= 1.01 * steps * share * float(norm)


class TwoHalves(Group):
    """Process `rank` of two, alone in this test: adds nothing, so its gradients are its own share's."""

    def add(self, tensors: Any) -> None:
        return


def test_shares_of_a_minibatch_add_up() -> None:
    """One step of each half from the same start: changes of BatchNorm add up to that of one process."""
    settings = replace(TINY, epochs=1, iterations=1, weight_decay=0.0, momentum=0.0)
    changes = []
    for group in (Group(), TwoHalves(0, 2), TwoHalves(1, 2)):
        networks = start()
        before = networks[1].get_parameter("stem.bn.weight").clone()
        tune(networks, settings, group=group)
        changes.append(networks[1].get_parameter("stem.bn.weight") - before)
    whole, first, second = changes
    assert bool(whole.any()) and torch.allclose(first + second, whole, atol=1e-6)
