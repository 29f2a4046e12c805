"""Gradients of single images against plain autograd, and the mathematics of their similarity."""

from collections.abc import Sequence

import pytest
import torch
from image_networks import SIZE, AfterReLU, PreActivation, Residual, photographs
from student_networks import calibrated
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.blocks import extract
from zsq.graph.frozen import frozen_batch_norm
from zsq.graph.nodes import aten, output_nodes
from zsq.images.gradients import (
    Gradients,
    _between_images_and,
    directions,
    diversity,
    gradient_match,
    gradient_probe,
    gradients_of,
    joined,
    sample_gradients,
    similarity,
    similarity_matrix,
    unit_rows,
)
from zsq.quant.plain import plain_part


class ConvolutionalHead(nn.Module):
    """Its last weighted layer is a convolution, pooled to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.bn(self.conv(x)).relu()).mean((2, 3))
        return y


class SkippedHead(nn.Module):
    """What the last layer gives is not all that the output needs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.fc, self.last = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))
        z: Tensor = self.last(y.relu()) + y
        return z


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rank_one_identity() -> None:
    """Section (f), test 1: the gradient of the last linear layer is a residual times an input."""
    layer = nn.Linear(12, 7).double()
    inputs, targets = rows(8, 12), rows(8, 7, seed=1)
    found = []
    for a, t in zip(inputs, targets, strict=True):
        loss = (t - layer(a)).square().sum() / 2
        found.append(torch.autograd.grad(loss, layer.weight)[0].flatten())
    oracle = unit_rows(torch.stack(found))
    factors = directions(((inputs, targets - layer(inputs).detach()),))
    torch.testing.assert_close(similarity_matrix(factors, factors), oracle @ oracle.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        similarity(
            factors, directions(((inputs.roll(1, 0), (targets - layer(inputs).detach()).roll(1, 0)),))
        ),
        (oracle * oracle.roll(1, 0)).sum(1),
    )


def test_factors_are_the_gradients_of_the_last_layer_of_a_student() -> None:
    teacher, student, units = calibrated(Residual, "W2")  # without quantizers of activations
    x = photographs(8, SIZE)
    factorised = directions(gradient_probe(teacher, student, units, "last_layer")(x, None))
    assert [len(piece) for piece in factorised] == [2]
    source, output = str(units[-1].layers[-1]), units[-1].outputs[-1]
    assert source == output
    reads = next(n for n in teacher.graph.nodes if n.name == source).args[0].name
    part = plain_part(student, [reads], [output])
    given, wanted = extract(student, ["x"], [reads])(x)[0], extract(teacher, ["x"], [output])(x)[0]
    whole = directions(((sample_gradients(part, [given], [wanted]),),))
    torch.testing.assert_close(
        similarity_matrix(factorised, factorised), similarity_matrix(whole, whole), atol=1e-5, rtol=0
    )
    again = gradient_probe(teacher, student, units, "last_layer")(x, teacher(x))
    torch.testing.assert_close(directions(again)[0][1], factorised[0][1], atol=1e-5, rtol=0)


def by_loops(part: fx.GraphModule, weights: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """One backward pass an image."""
    leaves = [w.clone().requires_grad_() for w in weights]
    found = []
    for x, t in zip(inputs, targets, strict=True):
        loss = (t - part(x[None], *leaves)[0][0]).square().sum() / 2
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, create_graph=True)]))
    return torch.stack(found)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradients_of_units_by_sample(index: int) -> None:
    """Every unit against a loop over images; also their derivative in the images."""
    teacher, student, units = (m.double() if isinstance(m, nn.Module) else m for m in calibrated(Residual))
    unit = units[index]
    assert len(units) == 3
    x = photographs(5, SIZE).double().requires_grad_()
    part = plain_part(student, unit.inputs, unit.outputs)
    (given,) = extract(student, ["x"], unit.inputs)(x)
    (wanted,) = extract(teacher, ["x"], unit.outputs)(x)
    found = sample_gradients(part, [given], [wanted])
    oracle = by_loops(part.module, list(part.weights.values()), given, wanted)
    assert found.shape == (5, sum(w.numel() for w in part.weights.values()))
    torch.testing.assert_close(found, oracle)
    mixing = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = [torch.autograd.grad((g * mixing).sum(), x, retain_graph=True)[0] for g in (found, oracle)]
    assert float(slopes[0].abs().max()) > 0
    torch.testing.assert_close(slopes[0], slopes[1])


def test_scopes() -> None:
    teacher, student, units = calibrated(Residual)
    x = photographs(40, SIZE)  # more than one chunk
    every = gradients_of(gradient_probe(teacher, student, units, "all_units"), x)
    last = gradients_of(gradient_probe(teacher, student, units, "last_unit"), x, chunk=7)
    assert len(every) == 3 and len(last) == 1
    torch.testing.assert_close(every[-1][0], last[0][0])
    mean = sum(similarity_matrix((piece,), (piece,)) for piece in directions(every)) / 3
    torch.testing.assert_close(similarity_matrix(directions(every), directions(every)), mean)


@pytest.mark.parametrize("kind", [Residual, PreActivation])
def test_batch_norms_are_in_the_weights_and_change_nothing(kind: type[nn.Module]) -> None:
    """A student of a network with its BatchNorms, and one of the network without: values and slopes."""
    teacher, student, _ = (m.double() if isinstance(m, nn.Module) else m for m in calibrated(kind))
    (output,) = (node.name for node in output_nodes(teacher.graph))
    for network in (teacher, student):
        part, plain = _between_images_and(network, [output]), extract(network, ["x"], [output])
        left = [n for n in part.graph.nodes if n.target is frozen_batch_norm]
        found = [n for n in network.graph.nodes if n.target is aten.batch_norm.default]
        assert len(left) < len(found)  # before convolutions they stay
        assert kind is PreActivation or not left
        x = photographs(5, SIZE).double().requires_grad_()
        results = [(y, torch.autograd.grad(y.square().sum(), x)[0]) for (y,) in (part(x), plain(x))]
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", [ConvolutionalHead, PreActivation])
def test_last_layers_that_do_not_return_the_logits(kind: type[nn.Module]) -> None:
    teacher, student, units = calibrated(kind)
    x = photographs(6, SIZE).requires_grad_()
    gradients = gradient_probe(teacher, student, units, "last_layer")(x, None)
    sizes = {ConvolutionalHead: 8 * 5, PreActivation: 8 * 6}
    assert [[tuple(f.shape) for f in piece] for piece in gradients] == [[(6, sizes[kind])]]
    (slope,) = torch.autograd.grad(gradients[0][0].square().sum(), x)
    assert bool(slope.isfinite().all()) and float(slope.abs().max()) > 0


def test_outputs_without_one_last_layer_are_refused() -> None:
    with pytest.raises(UsageError, match="returns 2 tensors"):
        network = calibrated(TwoHeads)
        gradient_probe(*network, "last_layer")
    teacher, student, units = calibrated(SkippedHead)
    with pytest.raises(UsageError, match="more than what its last layer"):
        gradient_probe(teacher, student, units, "last_layer")
    assert len(gradient_probe(teacher, student, units, "last_unit")(photographs(3, SIZE), None)) == 1


class TwoHeads(AfterReLU):
    """Two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = super().forward(x)
        return self.fc(first), second


def random_directions(count: int, seed: int) -> Gradients:
    return directions(((rows(count, 6, seed=seed), rows(count, 4, seed=seed + 1)),))


def test_gradient_match_range_and_fixed_points() -> None:
    """Section (f), test 4."""
    a, r = rows(9, 6), rows(9, 4, seed=1)
    first, second = directions(((a, r),)), random_directions(9, 5)
    assert 0 <= float(gradient_match(first, second)) <= 2
    assert float(gradient_match(first, first)) == pytest.approx(0, abs=1e-12)
    assert float(gradient_match(first, directions(((a, -r),)))) == pytest.approx(2)
    scaled = directions(((a * 7, r * 0.01),))
    torch.testing.assert_close(gradient_match(scaled, second), gradient_match(first, second))
    assert float(unit_rows(torch.zeros(1, 3)).abs().max()) == 0  # and not NaN


def test_gradient_match_looks_at_the_least_similar() -> None:
    """By hand: similarities 1, 0 and -1 weigh in proportion to 0, 1 and 2 at a focus of 1."""
    ones = torch.ones(3, 1, dtype=torch.float64)
    first = ((ones, torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(3, 1)),)
    others = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64).requires_grad_()
    match = gradient_match(first, ((ones, others),), focus=1.0)
    assert match.item() == pytest.approx(5 / 3, abs=1e-5)
    (slope,) = torch.autograd.grad(match, others)  # weights are constants: only the similarities move
    torch.testing.assert_close(slope[:, 0] * -3, torch.tensor([0.0, 1.0, 2.0]).double(), atol=1e-5, rtol=0.0)
    others = others.detach()
    plain = gradient_match(first, ((ones, others),))
    assert float(plain) == pytest.approx(1) == float(gradient_match(first, ((ones, others),), focus=0.0))


def test_diversity() -> None:
    """Section (f), test 6."""
    a = rows(4, 6)
    same = directions(((a[:1].repeat(2, 1), torch.ones(2, 3, dtype=torch.float64)),))
    assert float(diversity(same, None, threshold=0.0)) == pytest.approx(1)
    assert float(diversity(same, None, threshold=1.0)) == pytest.approx(0, abs=1e-12)
    assert float(diversity(same, None, threshold=0.4)) == pytest.approx(0.6)
    orthogonal = directions(((a[:3], torch.eye(3, dtype=torch.float64)),))
    assert float(diversity(orthogonal, None, threshold=0.0)) == 0  # the diagonal, 1, never counts
    negative = directions(((a[:1].repeat(2, 1), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)),))
    assert float(diversity(negative, None, threshold=0.0)) == pytest.approx(1)
    # image 0 is in the bank too, under an index of the diagonal's length
    assert float(diversity(orthogonal, orthogonal, threshold=0.0)) == pytest.approx(1)


def test_no_gradient_reaches_the_second_member() -> None:
    leaf, bank = rows(3, 4).requires_grad_(), rows(2, 4, seed=1).requires_grad_()
    ones = torch.ones(5, 1, dtype=torch.float64)
    images, others = directions(((leaf, ones[:3]),)), directions(((bank, ones[:2]),))
    diversity(images, others, threshold=0.0).backward()
    assert bank.grad is None and leaf.grad is not None
    # by hand: only the first member of the largest pair of each row moves
    matrix = similarity_matrix(images, joined([images, others])).detach()
    matrix[range(3), range(3)] = 0
    best = matrix.abs().argmax(1)
    fixed = torch.cat([images[0][0], others[0][0]]).detach()
    oracle = leaf.detach().clone().requires_grad_()
    (unit_rows(oracle) * fixed[best]).sum(1).abs().mean().backward()
    torch.testing.assert_close(leaf.grad, oracle.grad)
