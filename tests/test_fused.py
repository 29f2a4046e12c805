"""Compiled loops: what PyTorch's operations compute, bit for bit; without a compiler these do it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import Residual, attached, images
from torch import Tensor

import zsq.quant.fused
from zsq.compiled import COMPILER, shared_library
from zsq.quant.affine import fake_quantize_learned
from zsq.quant.choice import Choice, random_choice
from zsq.quant.fused import Kernels, kernels, kernels_for
from zsq.recipe import Calibration, Reconstruction
from zsq.recover.reconstruct import reconstruct
from zsq.recover.unit_tensors import take_mixed
from zsq.student import student_to_bytes

needs_compiler = pytest.mark.skipif(kernels() is None, reason="no C compiler")
SOURCE = Path(zsq.quant.fused.__file__).with_suffix(".c")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh() -> Iterator[None]:
    """`kernels` looks anew, then and afterwards."""
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def bits(x: Tensor | None) -> list[int] | None:
    return None if x is None else x.detach().contiguous().view(torch.int32).flatten().tolist()


def values(shape: tuple[int, ...]) -> Tensor:
    """Random ones, ties, limits, zeros of both signs, the largest and the smallest."""
    x = torch.randn(shape, generator=rng()).mul_(2)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, *(k * 0.15 for k in range(-20, 40))])
    count = min(len(special), x.numel())
    x.view(-1)[:count] = special[:count]
    return x


def both_ways(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, Any]:
    """What it returns with the compiled loops and without."""
    assert kernels() is not None
    with_loops = call()
    with monkeypatch.context() as patch:
        patch.setattr("zsq.quant.fused.kernels", lambda: None)
        return with_loops, call()


SHAPES = [
    ((0,), False),
    ((1,), False),
    ((67,), False),
    ((300, 401), False),
    ((3, 5, 7, 9), True),
    ((4, 6, 1, 1), True),
]


@needs_compiler
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES)
@pytest.mark.parametrize("zero_point", [0, 3])
@pytest.mark.parametrize("as_number", [False, True])
@pytest.mark.parametrize("prob", [None, 0.5, 1.0])
def test_the_same_bits(
    shape: tuple[int, ...],
    channels_last: bool,
    zero_point: int,
    as_number: bool,
    prob: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and both gradients, of incoming ones in any layout, also spread from a number."""
    x, grad = values(shape), torch.randn(shape, generator=rng(1))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    zero = float(zero_point) if as_number else torch.tensor(float(zero_point))
    keep = None if prob is None else random_choice(x, prob, rng(2))
    for wanted in ((True, True), (True, False), (False, True)):
        for incoming in (grad, torch.empty_like(x).copy_(grad), torch.tensor(0.7).expand(shape)):

            def call(wanted: tuple[bool, bool] = wanted, incoming: Tensor = incoming) -> list[Any]:
                a, scale = x.clone().requires_grad_(wanted[0]), torch.tensor(0.3, requires_grad=wanted[1])
                y = fake_quantize_learned(a, scale, zero, qmin=0, qmax=7, keep=keep)
                y.backward(incoming)
                return [bits(y), bits(a.grad), bits(scale.grad)]

            fused, plain = both_ways(monkeypatch, call)
            assert fused == plain


@needs_compiler
def test_infinity_and_nan_spread_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    for grad in (torch.ones(4), torch.tensor([torch.inf, torch.nan, 1.0, 1.0])):

        def call(grad: Tensor = grad) -> list[Tensor]:
            a, scale = x.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
            y = fake_quantize_learned(a, scale, 1.0, qmin=0, qmax=7)
            return [y.detach(), *torch.autograd.grad(y, (a, scale), grad)]

        for a, b in zip(*both_ways(monkeypatch, call), strict=True):
            assert torch.equal(a.nan_to_num(nan=77), b.nan_to_num(nan=77))


@needs_compiler
def test_half_precision_and_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values((50,)).to(torch.bfloat16)

    def call() -> list[Any]:
        a, scale = x.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
        y = fake_quantize_learned(a, scale, torch.tensor(2.0), qmin=0, qmax=7)
        first = torch.autograd.grad(y.square().sum(), (a, scale), create_graph=True)
        second = torch.autograd.grad(first[0].float().sum() + first[1], (a, scale), allow_unused=True)
        return [bits(t.detach().float()) for t in (y, *first, *second)]

    fused, plain = both_ways(monkeypatch, call)
    assert fused == plain


@needs_compiler
def test_threads_share_without_gaps() -> None:
    x = values((70_001,))
    choice = random_choice(x, 0.3, rng())
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            a, scale = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
            y = fake_quantize_learned(a, scale, 1.0, qmin=0, qmax=7, keep=choice)
            y.backward(torch.ones_like(x))
            found.append([bits(y), bits(a.grad)])
    finally:
        torch.set_num_threads(before)
    assert all(other == found[0] for other in found)


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count", [1, 5, 11])
def test_mixed_rows(layout: torch.memory_format, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, other = (torch.randn(11, 3, 5, 7, generator=rng(seed)).to(memory_format=layout) for seed in (0, 1))
    index = torch.randperm(11, generator=rng(2))[:count]
    fused, plain = both_ways(monkeypatch, lambda: take_mixed(x, other, index, 0.4, rng(3)))
    assert torch.equal(fused, plain) and fused.stride() == plain.stride()
    other_layout = other.to(
        memory_format=torch.channels_last if layout is torch.contiguous_format else layout
    )
    assert torch.equal(take_mixed(x, other_layout, index, 0.0, rng(3)), x[index])


@needs_compiler
def test_a_student_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> bytes:
        teacher, student, quantizers, units = attached(Residual, "W3A3")
        reconstruct(
            teacher,
            student,
            quantizers,
            units,
            images(48),
            settings=replace(Reconstruction(), steps=12, batch_size=16),
            calibration=Calibration(),
            seed=3,
            finished={},
            log=lambda *event: None,
        )
        return student_to_bytes(student)

    fused, plain = both_ways(monkeypatch, call)
    assert fused == plain


def test_only_plain_tensors_in_memory() -> None:
    x = torch.zeros(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for refused in ((x.double(),), (x.to(torch.bfloat16),), (x[:, :, ::2],), (x, last), (x.to("meta"),)):
        assert kernels_for(refused) is None
    for taken in ((x,), (last, last), (torch.nn.Parameter(x), x)):
        assert kernels_for(taken) is kernels()


def test_no_compiler(fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """None, one that fails, one that is not there: the log says so, and quantizers compute as ever."""
    x = values((20,))
    for compiler, said in (
        ("", "No C compiler"),
        ("false", "was not compiled"),
        ("/no/such/cc", "No such file"),
    ):
        kernels.cache_clear()
        monkeypatch.setenv(COMPILER, compiler)
        with caplog.at_level(logging.DEBUG, "zsq"):
            assert kernels() is None and kernels_for((x,)) is None
        assert said in caplog.messages[-1]
        assert fake_quantize_learned(x, torch.tensor(0.5), 0.0, qmin=0, qmax=7).max() == 3.5


@needs_compiler
def test_what_differs_is_not_used(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = tmp_path / "fused.c"
    wrong.write_text(SOURCE.read_text(encoding="utf-8").replace("nearbyintf", "floorf"), encoding="utf-8")
    library = shared_library(wrong)
    assert library is not None
    monkeypatch.setattr("zsq.quant.fused.shared_library", lambda source: library)
    with caplog.at_level(logging.DEBUG, "zsq"):
        assert kernels() is None
    assert "differs from PyTorch" in caplog.text
    x = values((64,))
    assert not torch.equal(
        Kernels(library).learned_step(x, torch.tensor(0.5), zsq.quant.fused.Limits(0.0, 0, 7), None),
        fake_quantize_learned(x, torch.tensor(0.5), 0.0, qmin=0, qmax=7),
    )


@needs_compiler
def test_benchmarks_count_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from work import count_work

    fused = kernels()
    assert fused is not None
    x, scale, index = torch.zeros(10, 7), torch.tensor(1.0, requires_grad=True), torch.tensor([1, 2, 3])
    choice = random_choice(x, 0.5, rng())
    step = count_work(lambda: fake_quantize_learned(x, scale, 0.0, qmin=0, qmax=7, keep=choice))
    assert step.moved == 70 * (4 + 1 + 4)
    rows = Choice(choice.draws[:3], 128)
    # 21 elements of both tensors and of the result, their bytes, three numbers
    assert count_work(lambda: fused.mixed_rows(x, x, index, rows)).moved == 21 * (4 + 4 + 4 + 1) + 3 * 8


def test_choices_of_parts() -> None:
    """Bytes of a part of a tensor stay those of the whole: a mask is where they are below the limit."""
    choice = Choice(torch.tensor([0, 127, 128, 255], dtype=torch.uint8), 128)
    assert choice.mask().tolist() == [1, 1, 0, 0]
