"""A student in plain operations: the same values and gradients, with weights as arguments."""

import pytest
import torch
from image_networks import SIZE, Residual, photographs
from student_networks import bits_of, calibrated

from zsq.graph.blocks import extract
from zsq.quant.affine import fake_quantize_learned
from zsq.quant.plain import merge_calls, plain_part, store_weights, straight_through
from zsq.quant.quantizers import WeightQuantizer


def test_same_bits_as_the_student() -> None:
    teacher, student, units = calibrated(Residual)
    before = bits_of(student)
    names = [name for unit in units for name in unit.outputs]
    image = next(n.name for n in teacher.graph.nodes if n.op == "placeholder")
    part = plain_part(student, [image], names)
    x = photographs(6, SIZE)
    for got, wanted in zip(
        part.module(x, *part.weights.values()), extract(student, [image], names)(x), strict=True
    ):
        assert torch.equal(got, wanted)
    assert len(part.weights) == 4  # three convolutions and the linear layer
    after = bits_of(student)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_stored_weights_are_those_of_the_quantizers() -> None:
    teacher, student, units = calibrated(Residual)
    before = bits_of(student)
    image = next(n.name for n in teacher.graph.nodes if n.op == "placeholder")
    part = extract(student, [image], units[-1].outputs)
    merge_calls(part.graph)
    store_weights(part)
    called = [part.get_submodule(str(n.target)) for n in part.graph.nodes if n.op == "call_module"]
    assert called and not any(isinstance(module, WeightQuantizer) for module in called)
    x = photographs(6, SIZE)
    assert torch.equal(part(x)[0], extract(student, [image], units[-1].outputs)(x)[0])
    after = bits_of(student)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_part_that_needs_more_is_refused() -> None:
    _, student, units = calibrated(Residual)
    with pytest.raises(ValueError, match="are not computed from"):
        plain_part(student, [units[-1].nodes[0]], [units[0].outputs[0], units[-1].outputs[0]])


def test_straight_through_is_the_student_s_quantizer() -> None:
    x = torch.linspace(-3, 9, 1001, requires_grad=True)
    weights = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    scale, zero_point = torch.tensor(0.37), torch.tensor(4.0)
    results = []
    for function in (straight_through, lambda *a: fake_quantize_learned(*a[:3], qmin=a[3], qmax=a[4])):
        y = function(x, scale, zero_point, 0, 15)
        (slope,) = torch.autograd.grad((y * weights).sum(), x)
        results.append((y.detach(), slope))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
