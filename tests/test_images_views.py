"""Swing convolution: which layers swing, by how much, and that nothing else changes."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from image_networks import SIZE, AfterReLU, PreActivation, Residual, captured, photographs
from torch import fx, nn

from zsq.images.views import draw_shifts, shift, shift_layer, swing


@pytest.fixture(scope="module")
def residual() -> fx.GraphModule:
    return captured(Residual)


@pytest.mark.parametrize("offset", range(-3, 4))
@pytest.mark.parametrize("axis", [-1, -2])
def test_shift_is_padding_by_reflection_and_cropping(offset: int, axis: int) -> None:
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = F.pad(x, (3, 3, 3, 3), mode="reflect")
    starts = (3 + offset * (axis == -2), 3 + offset * (axis == -1))
    expected = padded[:, :, starts[0] : starts[0] + 5, starts[1] : starts[1] + 6]
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).detach().requires_grad_()
        got = shift(leaf, offset, axis)
        assert torch.equal(got, expected)
        assert torch.autograd.gradcheck(lambda t: shift(t, offset, axis), leaf)


def test_shift_at_the_limit() -> None:
    x = torch.arange(2.0).view(1, 1, 1, 2)
    assert shift(x, 1, -1).flatten().tolist() == [1, 0] and shift(x, -1, -1).flatten().tolist() == [1, 0]
    with pytest.raises(ValueError, match="cannot shift by 2 along an axis of 2"):
        shift(x, 2, -1)


def test_no_shift_is_the_plain_network(residual: fx.GraphModule) -> None:
    images = photographs(4, SIZE)
    view, count = swing(residual)
    assert count == 2
    assert torch.equal(view(images, [[0, 0], [0, 0]]), residual(images))


def test_nine_different_outputs_of_one_shape(residual: fx.GraphModule) -> None:
    images = photographs(4, SIZE)
    view, count = swing(residual)
    rng = torch.Generator().manual_seed(0)
    outputs = {}
    for _ in range(100):
        dy, dx = draw_shifts(1, rng)[0]
        outputs[dy, dx] = view(images, [[dy, dx], [0, 0]])
    assert sorted(outputs) == [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == 9
    assert all(o.shape == (4, 5) for o in outputs.values())


def test_strided_convolution_sees_the_shifted_input() -> None:
    convolution = nn.Conv2d(3, 4, 3, 2, 1)
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight, bias = graph.get_attr("weight"), graph.get_attr("bias")
    graph.output(graph.call_function(torch.ops.aten.conv2d.default, (x, weight, bias, [2, 2], [1, 1])))
    view, count = swing(fx.GraphModule(convolution, graph))
    images = photographs(2, SIZE)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    assert count == 1
    for dy, dx in ((-1, 0), (1, 1), (0, -1)):
        expected = convolution(padded[:, :, 1 + dy : 13 + dy, 1 + dx : 13 + dx])
        assert torch.equal(view(images, [[dy, dx]]), expected)


def convolution_graph(target: object, *args: object) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(1, 1, 3, 3))
    graph.output(graph.call_function(target, (x, graph.get_attr("weight"), *args)))  # type: ignore[arg-type]
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    ("target", "args", "swings"),
    [
        (torch.ops.aten.conv2d.default, (), False),
        (torch.ops.aten.conv2d.default, (None, [1, 1]), False),
        (torch.ops.aten.conv2d.default, (None, [1, 2]), True),
        (torch.ops.aten.conv2d.padding, (None, [2, 2], "valid"), True),
        (torch.ops.aten.conv2d.padding, (None, [1, 1], "same"), False),
        (torch.ops.aten.convolution.default, (None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1), True),
        (torch.ops.aten.convolution.default, (None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1), False),
        (torch.ops.aten.conv_transpose2d.input, (None, [2, 2]), False),
    ],
)
def test_all_kinds_of_convolution(target: object, args: tuple[object, ...], swings: bool) -> None:
    network = convolution_graph(target, *args)
    view, count = swing(network)
    assert count == int(swings)
    images = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    assert view(images, [[1, 1]] * count).shape == network(images).shape


def test_input_smaller_than_the_jitter() -> None:
    network = convolution_graph(torch.ops.aten.conv2d.default, None, [2, 2], [1, 1])
    view, _ = swing(network, jitter=2)
    for size in ((1, 1), (1, 2), (3, 1)):
        images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
        assert view(images, [[2, -2]]).shape == network(images).shape


@pytest.mark.parametrize("kind", [Residual, PreActivation, AfterReLU])
def test_teacher_is_untouched_and_shared(kind: type[nn.Module]) -> None:
    network = captured(kind)
    code = network.code
    state = {name: value.clone() for name, value in network.state_dict().items()}
    view, count = swing(network)
    assert count == (2 if kind is Residual else 1)
    view(photographs(2, SIZE), draw_shifts(count, torch.Generator().manual_seed(0)))
    assert network.code == code
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    pointers = {t.data_ptr() for t in (*network.parameters(), *network.buffers())}
    assert {t.data_ptr() for t in (*view.parameters(), *view.buffers())} <= pointers


def test_same_seed_same_shifts() -> None:
    def draws(seed: int) -> list[object]:
        rng = torch.Generator().manual_seed(seed)
        return [draw_shifts(3, rng) for _ in range(5)]

    assert draws(0) == draws(0) != draws(1)
    flat = torch.tensor(draw_shifts(9000, torch.Generator().manual_seed(0), jitter=2))
    counts = flat.add(2).flatten().bincount()
    assert len(counts) == 5 and (counts - 3600).abs().max() < 5 * 54  # 5 standard deviations of 18000 draws


def test_gradient_through_the_view(residual: fx.GraphModule) -> None:
    view = copy.deepcopy(swing(residual)[0]).double()
    images = photographs(2, SIZE).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: view(x, [[1, -1], [-1, 1]]), images, fast_mode=True)


@pytest.mark.parametrize("size", [(2, 3), (3, 3), (1, 4), (8, 7)])
@pytest.mark.parametrize("jitter", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shifts_that_the_host_does_not_know_are_the_same(
    size: tuple[int, int], jitter: int, layout: torch.memory_format
) -> None:
    for offsets in itertools.product(range(-jitter, jitter + 1), repeat=2):
        x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
        known, unknown = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = shift_layer(known, [list(offsets)], 0, jitter)
        z = shift_layer(unknown, torch.tensor([offsets]), 0, jitter)
        assert torch.equal(y, z) and z.is_contiguous(memory_format=layout)
        slope = torch.randn_like(y)
        wanted, got = (torch.autograd.grad(a, b, slope)[0] for a, b in ((y, known), (z, unknown)))
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-14)  # of up to four terms, in any order


def test_swing_takes_shifts_as_a_tensor() -> None:
    view, count = swing(captured(Residual))
    x, shifts = torch.randn(2, *SIZE), draw_shifts(count, torch.Generator().manual_seed(1))
    assert torch.equal(view(x, shifts), view(x, torch.tensor(shifts)))
