"""Bounds that spare a search of ranges most of its candidates: no result may change."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zsq.quant import error_bounds, ranges
from zsq.quant.affine import choose_qparams
from zsq.quant.error_bounds import MANY_VALUES, may_be_best

NUM = 100
NORMAL = torch.randn(MANY_VALUES, generator=torch.Generator().manual_seed(0))
VALUES = {
    "with zeros": NORMAL.relu(),
    "heavy tails": NORMAL**3,
    "silu": torch.nn.functional.silu(3 * NORMAL),
    "few levels": NORMAL.round().clamp(-2, 2),
    "an outlier": torch.cat([NORMAL[1:], torch.tensor([1e4])]),
    "far from zero": 1000 + NORMAL / 1000,
    "huge": NORMAL * 5e37,
    "tiny": NORMAL * 1e-30,
    "float64": NORMAL.double(),
}


def mean_errors(values: Tensor, scales: Tensor, lowest: Tensor, highest: Tensor, exponent: float) -> Tensor:
    """By definition, in float64."""
    x, s = values.double(), scales.double().view(-1, 1)
    levels = (x / s).round().clamp(lowest.double().view(-1, 1), highest.double().view(-1, 1)) * s
    return (x - levels).abs().pow(exponent).mean(1)


def shrunken(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and limits of ranges that shrink about 0."""
    scale, zero = choose_qparams(values.min(), values.max(), qmin=0, qmax=2**bits - 1, symmetric=False)
    ratios = 1 - torch.arange(NUM) / NUM
    return scale * ratios, (-zero).expand(NUM), (2**bits - 1 - zero).expand(NUM)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", sorted(set(VALUES) - {"huge", "tiny"}))
@pytest.mark.parametrize("exponent", [1.0, 2.4])
def test_the_best_is_among_those_that_may_be(kind: str, bits: int, exponent: float) -> None:
    arguments = (VALUES[kind], *shrunken(VALUES[kind], bits), exponent)
    found, errors = may_be_best(*arguments), mean_errors(*arguments)
    assert found == sorted(set(found)) and int(errors.argmin()) in found
    near = errors <= errors.min() * (1 + 1e-6)
    assert set(near.nonzero()[:, 0].tolist()) <= set(found)


def test_most_are_spared() -> None:
    for bits, most in ((2, 5), (4, 10), (8, 30)):
        assert len(may_be_best(NORMAL, *shrunken(NORMAL, bits), 2.4)) <= most


def test_none_above_a_known_error() -> None:
    arguments = (NORMAL, *shrunken(NORMAL, 4), 2.4)
    lowest = float(mean_errors(*arguments).min())
    assert may_be_best(*arguments, known=lowest) == may_be_best(*arguments)
    assert may_be_best(*arguments, known=lowest / 2) == []


@pytest.mark.parametrize(
    "values", [NORMAL[: MANY_VALUES - 1], torch.ones(MANY_VALUES), NORMAL.half(), NORMAL.bfloat16()]
)
def test_all_where_there_is_no_histogram(values: Tensor) -> None:
    one = torch.ones(3, dtype=values.dtype)
    assert may_be_best(values, one, -one, one, 2.4) == [0, 1, 2]


@pytest.mark.parametrize("kind", sorted(VALUES))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_search_with_bounds_has_the_bits_of_one_without(
    kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = VALUES[kind]
    searches: list[Callable[[], tuple[Tensor, Tensor]]] = [
        lambda: ranges.error_minimising(values, bits=bits, signed=True, symmetric=True),
        lambda: ranges.error_minimising(values, bits=bits, signed=False, symmetric=False),
        lambda: ranges.error_minimising_ends(values, bits=bits),
    ]
    if kind == "huge":  # beyond what a range may be, with and without bounds
        searches = searches[:1]
    bounded = [search() for search in searches]
    monkeypatch.setattr(error_bounds, "MANY_VALUES", len(values) + 1)
    for search, found in zip(searches, bounded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(search(), found, strict=True))
