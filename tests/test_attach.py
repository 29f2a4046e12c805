"""Quantizers on a copy of the teacher."""

import pytest
import torch
from graph_networks import NETWORKS, chained, graph_of, images, network, outputs, same
from torch import fx

from zsq.graph.blocks import split
from zsq.graph.capture import capture
from zsq.graph.fold import fold_batch_norms
from zsq.graph.nodes import weight_node
from zsq.graph.tensors import get_tensor
from zsq.quant.attach import Quantizers, attach
from zsq.quant.calibrate import calibrate
from zsq.quant.placement import place
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer, quantize_weight
from zsq.quant.scheme import Scheme
from zsq.recipe import Calibration

W4A4, W8A8 = Scheme(weight_bits=4, activation_bits=4), Scheme(weight_bits=8, activation_bits=8)
W4 = Scheme(weight_bits=4, activation_bits=None)


def calibrated(teacher: fx.GraphModule, scheme: Scheme) -> tuple[fx.GraphModule, Quantizers]:
    student, quantizers = attach(teacher, scheme)
    calibrate(student, [images(16)], Calibration(num_images=16, method="minmax"))
    return student, quantizers


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_stay_close_to_the_teacher(name: str) -> None:
    teacher = graph_of(name)
    student, _ = calibrated(teacher, W8A8)
    for wanted, got in zip(outputs(teacher, images(16)), outputs(student, images(16)), strict=True):
        assert float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())) > 25


@pytest.mark.parametrize("name", NETWORKS)
def test_chained_units_of_the_student_are_the_student(name: str) -> None:
    teacher = graph_of(name)
    student, _ = calibrated(teacher, W4A4)
    for max_layers in (2, 8):
        units = split(teacher.graph, max_layers=max_layers)
        assert same(chained(student, units, images(3)), outputs(student, images(3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_shares_nothing_with_the_teacher(name: str) -> None:
    teacher = capture(network(name), (3, 16, 16))
    before = outputs(teacher, images(2))
    student, _ = calibrated(teacher, W4A4)
    held = [*student.parameters(), *student.buffers()]
    own = {t.data_ptr() for t in (*teacher.parameters(), *teacher.buffers())}
    assert not own & {t.data_ptr() for t in held}
    with torch.no_grad():
        for tensor in held:
            tensor.zero_()
    assert same(outputs(teacher, images(2)), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_rounded_to_nearest(name: str) -> None:
    teacher = graph_of(name)
    student, quantizers = attach(teacher, W4)
    placement = place(teacher.graph, W4)
    nodes = {n.name: n for n in teacher.graph.nodes}
    assert list(quantizers.weights) == list(placement.weights) and quantizers.activations == {}
    for layer, quantizer_name in quantizers.weights.items():
        quantizer = student.get_submodule(quantizer_name)
        assert isinstance(quantizer, WeightQuantizer) and quantizer.bits == placement.weights[layer]
        read = weight_node(nodes[layer])
        assert read is not None
        weight = get_tensor(teacher, str(read.target))
        oracle = quantize_weight(weight, bits=quantizer.bits, axis=quantizer.axis)
        assert torch.equal(quantizer(), oracle()) and int(quantizer.codes.max()) < 2**quantizer.bits
    assert all(weight_node(n) is None for n in student.graph.nodes)  # no layer reads a float weight


@pytest.mark.parametrize("name", NETWORKS)
def test_readers_of_one_tensor_share_one_module(name: str) -> None:
    teacher = graph_of(name)
    placement = place(teacher.graph, W4A4)
    student, quantizers = attach(teacher, W4A4)
    assert list(quantizers.activations) == list(placement.activations)
    calls: dict[str, list[fx.Node]] = {}
    for node in student.graph.nodes:
        if node.op == "call_module" and node.args:
            calls.setdefault(str(node.target), []).append(node)
    assert set(calls) == set(quantizers.activations.values())
    for tensor, target in quantizers.activations.items():
        quantizer = student.get_submodule(target)
        assert isinstance(quantizer, ActivationQuantizer) and quantizer.bits == placement.activations[tensor]
        assert {str(n.args[0]) for n in calls[target]} == {tensor}
        # Each reader has a call of its own.
        assert [[u.name for u in n.users] for n in calls[target]] == [[r] for r in placement.readers[tensor]]


def test_has_no_ranges_before_calibration() -> None:
    student, quantizers = attach(graph_of("resnet"), W4A4)
    assert all(get_tensor(student, f"{q}.scale").isnan() for q in quantizers.activations.values())
    assert outputs(student, images(1))[0].isnan().all()
    calibrate(student, [images(4)], Calibration(num_images=4))
    assert outputs(student, images(1))[0].isfinite().all()


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_same_call_same_bits(name: str) -> None:
    (a, names_a), (b, names_b) = (calibrated(graph_of(name), W4A4) for _ in range(2))
    assert names_a == names_b and str(a.graph) == str(b.graph)
    assert list(a.state_dict()) == list(b.state_dict())
    assert same(list(a.state_dict().values()), list(b.state_dict().values()))
    assert same(outputs(a, images(3)), outputs(b, images(3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_state_dict_holds_everything(name: str) -> None:
    student, _ = calibrated(graph_of(name), W4A4)
    other, _ = attach(graph_of(name), W4A4)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(student.state_dict())
    assert same(outputs(other, images(3)), outputs(student, images(3)))


def test_holds_no_float_weights_and_nothing_unused() -> None:
    student, quantizers = attach(graph_of("resnet"), W4A4)
    read = {str(n.target) for n in student.graph.nodes if n.op == "get_attr"}
    inside = tuple(f"{name}." for name in (*quantizers.weights.values(), *quantizers.activations.values()))
    for name in student.state_dict():
        assert name in read or name.startswith(inside), name
    assert "conv1.weight" not in student.state_dict() and "fc.bias" in student.state_dict()


def test_is_frozen_and_in_eval_mode() -> None:
    student, _ = attach(graph_of("resnet"), W4A4)
    assert not any(module.training for module in student.modules())
    assert not any(p.requires_grad for p in student.parameters())


def test_a_layer_that_is_used_twice_has_two_quantizers() -> None:
    student, quantizers = attach(graph_of("reused"), W4A4)
    names = [name for name in quantizers.weights.values() if name.startswith("conv.")]
    assert len(names) == len(set(names)) == 2
    assert len({id(student.get_submodule(name)) for name in names}) == 2


def test_parameters_of_the_outermost_module() -> None:
    _, quantizers = attach(graph_of("functional"), W4A4)
    assert list(quantizers.weights.values()) == ["weight_quantizer", "weight2_quantizer", "classes_quantizer"]


def test_folded_teachers_give_students_without_batch_norm() -> None:
    folded, _ = fold_batch_norms(graph_of("resnet"))
    student, _ = calibrated(folded, W8A8)
    assert not any("bn" in name for name in student.state_dict())
    wanted, got = outputs(graph_of("resnet"), images(16))[0], outputs(student, images(16))[0]
    assert float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())) > 25
