"""Random choice and QDrop (section (f), test 12)."""

import itertools
import math

import pytest
import torch
from quantization_networks import Residual, attached, images
from torch import Tensor, nn

from zsq.graph.blocks import extract
from zsq.quant.affine import fake_quantize_learned
from zsq.quant.calibrate import calibrate
from zsq.quant.choice import Choice, random_choice
from zsq.quant.dropping import DroppingQuantizer, dropping
from zsq.quant.quantizers import ActivationQuantizer
from zsq.recipe import Calibration
from zsq.recover.unit_tensors import take_mixed


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within_bounds(mask: Tensor, prob: float) -> bool:
    """Whether the share of chosen elements is within six standard deviations of a binomial count."""
    n, count = mask.numel(), int(mask.sum())
    return abs(count - n * prob) <= 6 * math.sqrt(n * prob * (1 - prob)) + 1e-3


@pytest.mark.parametrize("prob", [0.0, 1 / 256, 0.125, 0.25, 0.5, 0.75, 1.0])
def test_random_choice_has_its_probability_wherever_in_a_draw(prob: float) -> None:
    mask = random_choice(torch.empty(400, 504), prob, rng()).mask()
    assert mask.dtype == torch.float32 and mask.shape == (400, 504)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    eighths = mask.view(-1, 8).unbind(1)  # eight elements share a draw
    assert within_bounds(mask, prob) and all(within_bounds(part, prob) for part in eighths)
    for first, second in itertools.pairwise(eighths):
        assert within_bounds(first * second, prob * prob)  # and know nothing of each other
        assert within_bounds(first[1:] * second[:-1], prob * prob)  # nor do neighbouring draws
    if prob in (0.0, 1.0):
        assert mask.unique().tolist() == [prob]


def test_random_choice_is_a_function_of_its_generator() -> None:
    x = torch.empty(3, 5, 7)  # odd: part of the last draw is not used
    a, b, c = (random_choice(x, 0.5, rng(seed)).draws for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    generator = rng(1)
    assert torch.equal(random_choice(x, 0.5, generator).draws, a)
    assert not torch.equal(random_choice(x, 0.5, generator).draws, a)
    assert random_choice(torch.empty(()), 1.0, rng()).mask().item() == 1
    assert random_choice(torch.empty(0, 3), 0.5, rng()).draws.shape == (0, 3)


def test_random_choice_has_the_memory_format_of_its_argument() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert random_choice(x, 0.5, rng()).draws.is_contiguous()
    chosen = random_choice(x.contiguous(memory_format=torch.channels_last), 0.5, rng())
    assert chosen.draws.is_contiguous(memory_format=torch.channels_last)
    assert chosen.mask().is_contiguous(memory_format=torch.channels_last)
    assert random_choice(x[:, :, :, ::2], 0.5, rng()).draws.shape == (2, 3, 4, 3)


def test_mix_takes_every_element_from_one_of_the_two() -> None:
    x, other, every = torch.zeros(100, 100), torch.ones(100, 100), torch.arange(100)
    mixed = take_mixed(x, other, every, 0.3, rng())
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    assert within_bounds(mixed, 77 / 256)
    for prob, expected in ((0.0, x), (1.0, other)):
        assert torch.equal(take_mixed(x, other, every, prob, rng()), expected)
    assert not take_mixed(x.clone().requires_grad_(), other, every, 0.5, rng()).requires_grad
    other = torch.arange(100.0)[:, None].expand(100, 100).contiguous()
    index = torch.tensor([7, 3, 7])
    assert torch.equal(take_mixed(x, other, index, 1.0, rng()), other[index])
    assert len(take_mixed(x, other, torch.zeros(150, dtype=torch.int64), 0.5, rng())) == 150


def reference(x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int, kept: Tensor) -> Tensor:
    """torch.where between the value itself and a clip with a straight-through rounding."""
    clipped = (x / scale).clamp(0 - zero_point, qmax - zero_point)
    quantized = scale * (clipped + (clipped.round() - clipped).detach())
    return torch.where(kept, x, quantized)


@pytest.mark.parametrize("zero_point", [0.0, 3.0])
@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("wanted", ["both", "x", "scale"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("as_number", [False, True])
def test_keeping_elements_against_autograd(
    zero_point: float, prob: float, wanted: str, layout: torch.memory_format, as_number: bool
) -> None:
    x = torch.randn(3, 4, 6, 5, generator=rng()).mul_(3).to(memory_format=layout)
    x.requires_grad_(wanted != "scale")
    scale = torch.tensor(0.7, requires_grad=wanted != "x")
    zero, grad = torch.tensor(zero_point), torch.randn(3, 4, 6, 5, generator=rng(1))
    keep = random_choice(x, prob, rng(2))
    kept = keep.mask() == 1
    y = fake_quantize_learned(x, scale, zero_point if as_number else zero, qmin=0, qmax=7, keep=keep)
    expected = reference(x, scale, zero, 7, kept)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[kept], x[kept])
    inputs = [t for t in (x, scale) if t.requires_grad]
    ours, theirs = (torch.autograd.grad(value, inputs, grad) for value in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of 360 float32 in another order


def all_of(x: Tensor) -> Choice:
    return Choice(torch.full_like(x, 255, dtype=torch.uint8), 256)


def test_kept_values_pass_as_they_are() -> None:
    x = torch.tensor([0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -2.5, 0.1])
    y = fake_quantize_learned(x, torch.tensor(0.5), torch.tensor(0.0), qmin=0, qmax=3, keep=all_of(x))
    assert torch.equal(y, x)


def quantizer(scale: float = 0.5) -> ActivationQuantizer:
    made = ActivationQuantizer(bits=2)
    made.set_range(torch.tensor(scale), torch.tensor(2.0))
    return made


@pytest.mark.parametrize("prob", [0.25, 0.5, 0.9])
def test_dropping_leaves_its_share_untouched_and_draws_anew(prob: float) -> None:
    inner = quantizer()
    dropper = DroppingQuantizer(inner, prob=prob, rng=rng())
    x = torch.randn(200, 200, generator=rng(1))  # no value is a level by chance
    first, second = dropper(x), dropper(x)
    assert within_bounds((first == x).int(), prob)
    assert torch.equal(first[first != x], inner(x)[first != x])
    assert not torch.equal(first, second)
    assert within_bounds(((first == x) & (second == x)).int(), prob * prob)


def test_the_context_drops_and_always_restores() -> None:
    part = nn.Sequential(quantizer(), nn.Sequential(nn.ReLU(), quantizer()))
    originals = part[0], part[1][1]  # type: ignore[index]
    x = torch.randn(50, 40, generator=rng(1))
    with pytest.raises(KeyboardInterrupt), dropping(part, 0.5, rng()):
        assert isinstance(part[0], DroppingQuantizer) and part[0].quantizer is originals[0]
        assert bool((part[0](x) == x).any())
        raise KeyboardInterrupt
    assert part[0] is originals[0] and part[1][1] is originals[1]  # type: ignore[index]
    assert not bool((part[0](x) == x).any())
    with dropping(part, 0.0, rng()):
        assert part[0] is originals[0]


def test_readers_of_one_tensor_draw_their_own_masks_and_share_the_scale() -> None:
    teacher, student, quantizers, units = attached(Residual, "W4A4")
    unit = next(u for u in units if u.name == "block2")  # its input feeds a convolution and the shortcut's
    part = extract(student, unit.inputs, unit.outputs)
    (name,) = (n for n in quantizers.activations.values() if n.rpartition(".")[2] == unit.inputs[0])
    assert [n.target for n in part.graph.nodes if n.op == "call_module"].count(name) == 2
    x = extract(teacher, ["x"], unit.inputs)(images(8))
    calibrate(part, x, Calibration())
    shared = part.get_submodule(name)
    assert isinstance(shared, ActivationQuantizer)
    seen: list[Tensor] = []
    with dropping(part, 0.5, rng()):
        dropper = part.get_submodule(name)
        assert isinstance(dropper, DroppingQuantizer) and dropper.quantizer.scale is shared.scale
        handle = dropper.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        part(*x)
        handle.remove()
    kept = [s == x[0] for s in seen]
    assert len(seen) == 2 and not torch.equal(*kept)
    assert sum(p is shared.scale for p in part.parameters()) == 1
