"""Section (f), tests 13 to 18."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from quantization_networks import (
    ChannelsLast,
    Residual,
    Single,
    Summing,
    Tokens,
    attached,
    images,
)
from torch import Tensor, fx, nn

import zsq.recover.learn_unit as learn_unit_module
import zsq.recover.reconstruct as reconstruct_module
from zsq.graph.blocks import Unit, extract
from zsq.quant.attach import Quantizers
from zsq.quant.calibrate import calibrate
from zsq.quant.choice import Rows
from zsq.quant.quantizers import ActivationQuantizer, LearnedRounding, WeightQuantizer, quantize_weight
from zsq.quant.rounding import rectified_sigmoid
from zsq.recipe import Calibration, Reconstruction
from zsq.recover.learn_unit import UnitData, beta_at, minibatches
from zsq.recover.losses import output_distance
from zsq.recover.reconstruct import UnitResult, reconstruct
from zsq.recover.unit_tensors import forward_in_chunks, take_mixed
from zsq.student import student_to_bytes

FAST = Reconstruction(
    steps=40, batch_size=16, lr_rounding=0.05, lr_weight_scale=1e-3, lr_activation_scale=1e-3
)
Attached = tuple[fx.GraphModule, fx.GraphModule, Quantizers, tuple[Unit, ...]]


def run(
    parts: Attached,
    *,
    settings: Reconstruction | None = FAST,
    seed: int = 0,
    x: Tensor | None = None,
    finished: dict[str, dict[str, Tensor]] | None = None,
    log: Any = lambda *event: None,
) -> list[UnitResult]:
    teacher, student, quantizers, units = parts
    return reconstruct(
        teacher,
        student,
        quantizers,
        units,
        images(64) if x is None else x,
        settings=settings,
        calibration=Calibration(),
        seed=seed,
        finished={} if finished is None else finished,
        log=log,
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(
            a[k].contiguous().view(-1).view(torch.uint8), b[k].contiguous().view(-1).view(torch.uint8)
        )
        for k in a
    )


# ---- schedule and minibatches


def test_regulariser_schedule() -> None:
    settings = Reconstruction(steps=1000)
    assert [beta_at(step, settings) for step in (0, 1, 199)] == [None, None, None]
    assert beta_at(200, settings) == 20.0
    assert beta_at(600, settings) == pytest.approx(11.0)
    assert beta_at(999, settings) == pytest.approx(2.0 + 18 / 800)
    assert beta_at(1000, settings) == pytest.approx(2.0)
    betas = [beta_at(step, settings) for step in range(200, 1000)]
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(betas))
    assert beta_at(0, replace(settings, warmup=0.0)) == 20.0
    assert {beta_at(step, replace(settings, warmup=1.0)) for step in range(1000)} == {None}
    assert beta_at(0, Reconstruction(steps=1, warmup=0.2)) is None


def test_minibatches_visit_every_image_once_a_pass() -> None:
    batches = minibatches(256, 32, torch.Generator().manual_seed(0))
    passes = [[next(batches) for _ in range(8)] for _ in range(3)]
    for one in passes:
        assert all(len(batch.unique()) == 32 for batch in one)
        assert torch.cat(one).sort().values.tolist() == list(range(256))
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))


def test_minibatches_of_few_images_and_with_a_rest() -> None:
    few = minibatches(5, 32, torch.Generator().manual_seed(0))
    assert all(next(few).sort().values.tolist() == [0, 1, 2, 3, 4] for _ in range(3))
    rest = minibatches(10, 4, torch.Generator().manual_seed(0))
    for _ in range(5):
        one = torch.cat([next(rest), next(rest)])
        assert len(one) == 8 and len(one.unique()) == 8  # two images wait for another pass
    assert next(minibatches(1, 1, torch.Generator())).tolist() == [0]


def test_minibatches_are_a_function_of_their_generator() -> None:
    def first(seed: int) -> list[int]:
        found: list[int] = next(minibatches(100, 10, torch.Generator().manual_seed(seed))).tolist()
        return found

    assert first(1) == first(1) != first(2)


# ---- one run of the whole network


def test_every_unit_improves_on_held_out_images_and_the_teacher_stays() -> None:
    settings = replace(FAST, steps=100, lr_rounding=0.02)
    nearest, learned = attached(Residual, "W2A4"), attached(Residual, "W2A4")
    before = state(learned[0])
    x, held_out = images(128), images(128, seed=7)
    run(nearest, settings=None, x=x)
    results = run(learned, settings=settings, x=x)
    assert same(before, state(learned[0])) and all(p.grad is None for p in learned[0].parameters())
    assert [r.name for r in results] == [u.name for u in learned[3]]
    assert [r.layers for r in results] == [len(u.layers) for u in learned[3]]
    # The error of the output, images through the whole student, at every unit with 2-bit weights.
    for unit in learned[3][1:]:
        errors = []
        wanted = extract(learned[0], ["x"], unit.outputs)(held_out)[0]
        for parts in (nearest, learned):
            with torch.no_grad():
                got = extract(parts[1], ["x"], unit.outputs)(held_out)[0]
            errors.append(float((got - wanted).square().sum()))
        assert errors[1] < (1.0 if unit.name == "fc" else 0.85) * errors[0], unit.name
    assert all(r.snr > r.snr_nearest for r in results[1:])


def test_what_is_left_is_a_plain_student() -> None:
    parts = attached(Residual, "W3A3", ends="same")
    run(parts)
    _, student, quantizers, _ = parts
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    assert not any(isinstance(m, LearnedRounding) for m in student.modules())
    for name in quantizers.weights.values():
        quantizer = student.get_submodule(name)
        assert isinstance(quantizer, WeightQuantizer) and int(quantizer.codes.max()) < 8
        assert all(len(row.unique()) <= 8 for row in quantizer().flatten(1))
    for name in quantizers.activations.values():
        activation = student.get_submodule(name)
        assert type(activation) is ActivationQuantizer and float(activation.scale) > 0
    assert torch.equal(student(images(5)), student(images(5)))  # nothing drops any more


@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_learning_in_half_precision(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers compute in bfloat16 while a unit is learned; what comes of it is as good, and in float32."""
    types: set[torch.dtype] = set()
    snr = {}
    for precision in ("float32", "bfloat16"):
        parts = attached(kind, "W3A4")
        settings = replace(FAST, steps=60, precision=precision)
        with monkeypatch.context() as patch:
            if precision == "bfloat16":
                patch.setattr(
                    learn_unit_module,
                    "output_distance",
                    lambda output, target, **axis: (
                        types.add(output.dtype),
                        output_distance(output, target, **axis),
                    )[1],
                )
            snr[precision] = [result.snr for result in run(parts, settings=settings)]
        assert {value.dtype for value in parts[1].state_dict().values()} <= {torch.float32, torch.uint8}
        assert parts[1](images(4)).dtype == torch.float32
    assert torch.bfloat16 in types
    assert snr["bfloat16"] != snr["float32"]
    assert snr["bfloat16"] == pytest.approx(snr["float32"], abs=1.0)  # decibels


def test_one_seed_gives_one_result() -> None:
    runs = [attached(Residual, "W3A3") for _ in range(3)]
    for parts, seed in zip(runs, (3, 3, 4), strict=True):
        run(parts, seed=seed)
    a, b, c = (student_to_bytes(parts[1]) for parts in runs)
    assert a == b != c


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    runs = [attached(Summing, "W3A3") for _ in range(2)]
    for number, parts in enumerate(runs):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        run(parts, settings=replace(FAST, steps=3))
        assert torch.equal(torch.get_rng_state(), before)
    assert student_to_bytes(runs[0][1]) == student_to_bytes(runs[1][1])


def test_settings_none_only_calibrates() -> None:
    parts, plain = attached(Residual, "W4A4"), attached(Residual, "W4A4")
    results = run(parts, settings=None)
    calibrate(plain[1], [images(64).contiguous(memory_format=torch.channels_last)], Calibration())
    assert student_to_bytes(parts[1]) == student_to_bytes(plain[1])
    assert all(r.snr == r.snr_nearest for r in results)


@pytest.mark.parametrize("kind", [Residual, Summing, Tokens, ChannelsLast])
@pytest.mark.parametrize("bits", ["W3A4", "W3"])
def test_all_kinds_of_units_improve(kind: type[nn.Module], bits: str) -> None:
    results = run(attached(kind, bits, ends="same"), settings=replace(FAST, steps=40, lr_rounding=0.1))
    assert sum(r.snr for r in results) > sum(r.snr_nearest for r in results)
    # what one unit learns is paid for by no other
    assert results[-1].snr > results[-1].snr_nearest - 1


@pytest.mark.parametrize("kind", [Residual, Summing])
def test_a_unit_changes_only_its_own(kind: type[nn.Module]) -> None:
    """Also where later units read tensors, and call quantizers, of earlier ones."""
    parts = attached(kind, "W3A3", ends="same")
    _, student, quantizers, units = parts
    owners: dict[str, set[str]] = {}
    for unit in units:
        part = extract(student, unit.inputs, unit.outputs)
        owners[unit.name] = {
            n for n, m in part.named_modules() if isinstance(m, (WeightQuantizer, ActivationQuantizer))
        }
    if kind is Summing:
        assert any(a & b for a, b in itertools.combinations(owners.values(), 2))
    finished: set[str] = set()
    num_changed: list[int] = []
    last = state(student)

    def check(unit: str, step: int, steps: int, values: dict[str, float]) -> None:
        nonlocal last
        if step != -1:
            return
        now = state(student)
        allowed = {f"{n}." for n in owners[unit] - finished}
        changed = {
            k
            for k in now
            if not torch.equal(
                now[k].nan_to_num(-1.0) if now[k].is_floating_point() else now[k],
                last[k].nan_to_num(-1.0) if last[k].is_floating_point() else last[k],
            )
        }
        assert all(any(k.startswith(a) for a in allowed) for k in changed), unit
        num_changed.append(len(changed))
        finished.update(owners[unit])
        last = now

    run(parts, settings=replace(FAST, steps=4), log=check)
    assert any(num_changed)
    assert finished == {*quantizers.weights.values(), *quantizers.activations.values()}


# ---- what a unit sees


def test_inputs_and_targets_of_every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets and clean inputs are the teacher's, quantized inputs those of the finished student."""
    parts = attached(Summing, "W3A3", ends="same")
    teacher, student, _, units = parts
    x = images(70).contiguous(memory_format=torch.channels_last)  # two chunks, as units compute
    seen: list[UnitData] = []
    original = learn_unit_module.learn_unit

    def record(*args: Any, **options: Any) -> None:
        seen.append(args[2])
        original(*args, **options)

    monkeypatch.setattr(reconstruct_module, "learn_unit", record)
    run(parts, x=x, settings=replace(FAST, steps=2))
    assert len(seen) == len(units) and any(len(unit.inputs) > 1 for unit in units)
    first = seen[0]  # sees the images
    assert torch.equal(first.teacher_inputs[0], x) and torch.equal(first.student_inputs[0], x)
    with torch.no_grad():
        for unit, data in zip(units, seen, strict=True):
            for got, names, source in (
                (data.teacher_inputs, unit.inputs, teacher),
                (data.student_inputs, unit.inputs, student),
                (data.targets, unit.outputs, teacher),
            ):
                wanted = [x] if names == ("x",) else forward_in_chunks(extract(source, ["x"], names), [x])
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), unit.name


def test_every_step_sees_distinct_images_and_mixes_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    original = take_mixed

    def record(
        x: Tensor, other: Tensor, index: Tensor, prob: float, rng: torch.Generator, rows: Rows
    ) -> Tensor:
        assert prob == 0.25 and rows == Rows(0, 16, 16)
        calls.append((x[index], other[index]))
        return original(x, other, index, prob, rng, rows)

    monkeypatch.setattr(learn_unit_module, "take_mixed", record)
    x = images(48)
    settings = replace(FAST, steps=6, input_mix_prob=0.25)
    run(attached(Residual, "W4A4"), x=x, settings=settings)
    first_unit = calls[:6]
    for batches in (first_unit[:3], first_unit[3:]):
        together = torch.cat([student for student, _ in batches])
        assert sorted(map(float, together.flatten(1).sum(1))) == sorted(map(float, x.flatten(1).sum(1)))
    later = calls[-1]
    assert later[0].shape == later[1].shape and not torch.equal(*later)


def test_few_images() -> None:
    for count in (1, 5):
        results = run(attached(Residual, "W4A4"), x=images(count), settings=replace(FAST, steps=3))
        assert all(abs(r.snr) < 200 for r in results)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        (Residual, {"stem.conv": 1, "block1": 1, "fc": -1}),
        (Tokens, {"embed": 1, "up": -1, "fc": -1}),
        (ChannelsLast, {"stem": 1, "block": 1, "fc": -1}),
    ],
)
def test_channel_axis(kind: type[nn.Module], axes: dict[str, int]) -> None:
    teacher, _, _, units = attached(kind, "W4A4")
    channels = {"stem": 6, "stem.conv": 6, "block1": 6, "embed": 6, "up": 6, "block": 6, "fc": 7}
    found = {unit.name: unit for unit in units}
    for name, axis in axes.items():
        unit = found[name]
        assert reconstruct_module._channel_axis(teacher, unit) == axis
        with torch.no_grad():
            (output,) = extract(teacher, ["x"], unit.outputs[-1:])(images(3))
        assert output.shape[axis] == channels[name]


def test_loss_is_distance_plus_weighted_regulariser() -> None:
    """Weight exactly lambda: with no learning rate, the first step with a regulariser shows both terms."""
    logged: dict[str, dict[int, dict[str, float]]] = {}

    def log(unit: str, step: int, steps: int, values: dict[str, float]) -> None:
        logged.setdefault(unit, {})[step] = values

    still = Reconstruction(
        steps=10,
        lr_rounding=0.0,
        lr_weight_scale=0.0,
        lr_activation_scale=0.0,
        drop_prob=0.0,
        input_mix_prob=0.0,
        rounding_weight=0.25,
    )
    parts = attached(Residual, "W4A4")
    teacher, _, quantizers, units = parts
    run(parts, x=images(32), settings=still, log=log)
    stem = logged["stem.conv"]
    assert [stem[s]["loss"] - stem[s]["reconstruction"] for s in (0, 1)] == [0.0, 0.0]
    weight = dict(teacher.named_parameters())["stem.conv.weight"]
    h = rectified_sigmoid(
        LearnedRounding(weight, quantize_weight(weight, bits=8, axis=0)).rounding_logits.detach()
    )
    for step in (2, 6, 9):
        beta = beta_at(step, still)
        assert beta is not None
        regulariser = float((1 - (2 * h - 1).abs().pow(beta)).sum())
        assert stem[step]["loss"] - stem[step]["reconstruction"] == pytest.approx(
            0.25 * regulariser, rel=1e-4
        )


# ---- convergence


def test_roundings_settle_and_soft_equals_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student, quantizers, units = attached(Single, "W4A4", ends="same")
    kept: list[LearnedRounding] = []
    original = LearnedRounding.harden

    def harden(self: LearnedRounding) -> WeightQuantizer:
        kept.append(self)
        return original(self)

    monkeypatch.setattr(LearnedRounding, "harden", harden)
    settings = Reconstruction(steps=800, lr_rounding=0.05, lr_weight_scale=1e-4)
    x = images(64)
    run((teacher, student, quantizers, units), settings=settings, x=x)
    (learned,) = kept
    h = rectified_sigmoid(learned.rounding_logits.detach())
    settled = (h < 1e-3) | (h > 1 - 1e-3)
    assert float(settled.float().mean()) > 0.999
    with torch.no_grad():
        hard = student(x)
        part = extract(student, ["x"], units[0].outputs)
        part.set_submodule(next(iter(quantizers.weights.values())), learned)
        (soft,) = part(x)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-3 * float(hard.abs().max()))


# ---- resuming


@pytest.mark.parametrize("kind", [Residual, Summing])
@pytest.mark.parametrize("bits", ["W3A3", "W4"])
def test_finished_units_are_taken_over_bit_for_bit(kind: type[nn.Module], bits: str) -> None:
    settings = replace(FAST, steps=3)
    finished: dict[str, dict[str, Tensor]] = {}
    undisturbed = attached(kind, bits)
    results = run(undisturbed, settings=settings, finished=finished)
    expected = student_to_bytes(undisturbed[1])
    names = list(finished)
    assert names == [f"unit-{i:03d}" for i in range(len(undisturbed[3]))]
    for count in range(1, len(names) + 1):
        parts = attached(kind, bits)
        some = {name: finished[name] for name in names[:count]}
        steps: list[tuple[Any, ...]] = []
        again = run(
            parts, settings=settings, finished=some, log=lambda *event, to=steps: to.append(event[:2])
        )
        assert student_to_bytes(parts[1]) == expected
        assert again == results  # numbers of the record included
        assert list(some) == names
        assert {unit for unit, step in steps if step >= 0} == {u.name for u in parts[3][count:]}


def test_distance_of_units_with_several_outputs() -> None:
    """All outputs of a unit count: the first loss, on clean inputs, is the sum of their distances."""
    parts = attached(Summing, "W3", ends="same")
    teacher, student, _, units = parts
    unit = next(u for u in units if len(u.outputs) > 1)
    inputs = extract(teacher, ["x"], unit.inputs)(images(64))
    targets = extract(teacher, unit.inputs, unit.outputs)(*inputs)
    part = extract(student, unit.inputs, unit.outputs)
    weights = dict(teacher.named_parameters())
    for name, module in list(part.named_modules()):
        if isinstance(module, WeightQuantizer):  # what reconstruction starts with
            weight = weights[name.replace("weight_quantizer", "weight")]
            part.set_submodule(name, LearnedRounding(weight, module))
    with torch.no_grad():
        expected = [
            float(output_distance(o, t, channel_axis=1)) for o, t in zip(part(*inputs), targets, strict=True)
        ]
    assert min(expected) > 0
    first: dict[str, float] = {}

    def log(name: str, step: int, steps: int, values: dict[str, float]) -> None:
        if step == 0:
            first[name] = values["reconstruction"]

    run(parts, settings=replace(FAST, steps=1, batch_size=64, input_mix_prob=1.0), log=log)
    assert first[unit.name] == pytest.approx(sum(expected), rel=1e-4)  # float32 sums in another order
