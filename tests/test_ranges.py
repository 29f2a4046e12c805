import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq.quant import ranges
from zsq.quant.affine import MIN_SCALE, choose_qparams, fake_quantize, integer_limits
from zsq.quant.ranges import error_minimising, error_minimising_ends, minmax, percentile


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_minmax_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 5.0], [0.5, 0.25, 4.0]])
    assert [value.item() for value in minmax(x)] == [-2.0, 5.0]
    assert [value.tolist() for value in minmax(x, 0)] == [[-2.0, 0.25], [5.0, 4.0]]
    assert [value.tolist() for value in minmax(x, -1)] == [[0.5, -2.0, 4.0], [1.0, 0.25, 5.0]]


def test_percentile_by_hand() -> None:
    x = torch.arange(101.0).view(1, 101).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    lo, hi = percentile(x, 0.98, axis=0)
    torch.testing.assert_close(lo, torch.tensor([2.0, -98.0]))
    torch.testing.assert_close(hi, torch.tensor([98.0, -2.0]))
    assert [value.item() for value in percentile(x, 1.0)] == [-100.0, 100.0]
    assert percentile(x, 0.9)[0].shape == ()
    for fraction in (0.5, 0.0, 1.01, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            percentile(x, fraction)


def candidates(x: Tensor, bits: int, signed: bool, symmetric: bool, exponent: float, num: int) -> Tensor:
    """Brute force: the mean error of one channel at each ratio, from the definition."""
    qmin, qmax = integer_limits(bits, signed)
    scale, zero_point = choose_qparams(x.min(), x.max(), qmin=qmin, qmax=qmax, symmetric=symmetric)
    errors = [
        (x - fake_quantize(x, scale * (1 - i / num), zero_point, qmin=qmin, qmax=qmax))
        .abs()
        .pow(exponent)
        .mean()
        for i in range(num)
    ]
    return torch.stack(errors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("signed", "symmetric"), [(False, False), (True, False), (True, True), (False, True)]
)
def test_search_finds_the_best_candidate_of_each_channel(bits: int, signed: bool, symmetric: bool) -> None:
    x = normal(5, 3, 4, 4) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1.0], dtype=torch.float64).view(5, 1, 1, 1)
    x[3], x[4] = x[3].abs(), x[4] ** 3  # one channel without negatives, one with long tails
    scale, zero_point = error_minimising(x, bits=bits, signed=signed, symmetric=symmetric, axis=0)
    assert scale.shape == zero_point.shape == (5,)
    qmin, qmax = integer_limits(bits, signed)
    for channel, (s, z) in zip(x, zip(scale, zero_point, strict=True), strict=True):
        errors = candidates(channel, bits, signed, symmetric, 2.4, 100)
        error = (channel - fake_quantize(channel, s, z, qmin=qmin, qmax=qmax)).abs().pow(2.4).mean()
        torch.testing.assert_close(error, errors.min(), rtol=1e-9, atol=0.0)  # float64; equal up to rounding
        alone = error_minimising(channel, bits=bits, signed=signed, symmetric=symmetric)
        torch.testing.assert_close(torch.stack(alone), torch.stack((s, z)))


def test_search_as_the_card_writes_it() -> None:
    """s = ratio (max - min) / (2^b - 1), zp = round(-ratio min / s), min <= 0 <= max."""
    x = normal(200, seed=3)
    scale, zero_point = error_minimising(x, bits=3, signed=False, symmetric=False)
    best = (math.inf, 0.0, 0.0)
    for i in range(100):
        ratio = 1 - i / 100
        s = ratio * float(x.max() - x.min()) / 7
        z = round(-ratio * float(x.min()) / s)
        quantized = (((x / s).round() + z).clamp(0, 7) - z) * s
        best = min(best, (float((x - quantized).abs().pow(2.4).mean()), s, float(z)))
    assert scale.item() == pytest.approx(best[1], rel=1e-12) and zero_point.item() == best[2]


def test_search_exponent_and_ratios() -> None:
    x = normal(400)
    wide, _ = error_minimising(x, bits=2, signed=True, symmetric=True, exponent=8.0)
    narrow, _ = error_minimising(x, bits=2, signed=True, symmetric=True, exponent=1.0)
    assert wide > narrow
    scale, _ = error_minimising(x, bits=2, signed=True, symmetric=True, num_ratios=1)
    torch.testing.assert_close(scale, x.abs().max())  # codes to 1


def test_search_in_blocks_is_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(7, 50).float()
    whole = error_minimising(x, bits=4, signed=False, symmetric=False, axis=0)
    monkeypatch.setattr(ranges, "_BLOCK", 100)
    parts = error_minimising(x, bits=4, signed=False, symmetric=False, axis=0)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    whole = error_minimising(x, bits=4, signed=False, symmetric=False)
    monkeypatch.undo()
    parts = error_minimising(x, bits=4, signed=False, symmetric=False)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_large_tensors_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MAX_SAMPLES", 1000)
    x = normal(8, 10, 20, 20).relu_()
    kept = ranges._thinned(x.reshape(1, -1))
    assert 500 < kept.numel() <= 1000
    # stride 33 shares no factor with 32,000: every channel and every column is seen
    assert len({index // 400 % 10 for index in range(0, 32_000, 33)}) == 10
    assert torch.equal(kept, x.reshape(1, -1)[:, ::33])
    thinned = error_minimising(x, bits=4, signed=False, symmetric=True)
    again = error_minimising(x, bits=4, signed=False, symmetric=True)
    assert torch.equal(thinned[0], again[0])
    monkeypatch.undo()
    full = error_minimising(x, bits=4, signed=False, symmetric=True)
    torch.testing.assert_close(thinned[0], full[0], rtol=0.1, atol=0.0)  # 1 of 33 values seen


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_channels(signed: bool, symmetric: bool) -> None:
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [2e-30, -1e-30]])
    scale, zero_point = error_minimising(x, bits=4, signed=signed, symmetric=symmetric, axis=0)
    assert scale[0] == MIN_SCALE and scale[2] == MIN_SCALE
    qmin, qmax = integer_limits(4, signed)
    y = fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=0)
    torch.testing.assert_close(y, x)
    one, _ = error_minimising(torch.tensor([0.3]), bits=4, signed=signed, symmetric=symmetric)
    assert one.shape == () and one > 0


def mean_error(x: Tensor, pair: tuple[Tensor, Tensor], bits: int, exponent: float = 2.4) -> float:
    y = fake_quantize(x, *pair, qmin=0, qmax=2**bits - 1)
    return float((x - y).abs().pow(exponent).mean())


def test_both_ends_are_searched_on_their_own() -> None:
    """A BatchNorm after a ReLU: most values are one negative number, the others a long tail."""
    x = normal(5_000).exp_().sub_(3)
    x[::2] = -3
    together = error_minimising(x, bits=4, signed=False, symmetric=False)
    apart = error_minimising_ends(x, bits=4)
    assert mean_error(x, apart, 4) < 0.9 * mean_error(x, together, 4)
    scale, zero_point = apart
    assert (
        scale.shape == zero_point.shape == () and 0 <= zero_point <= 15 and zero_point == zero_point.round()
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_two_ends_are_never_worse_than_one_ratio(seed: int, bits: int) -> None:
    x = normal(500, seed=seed).add_(seed / 2)
    pairs = [
        error_minimising(x, bits=bits, signed=False, symmetric=False),
        error_minimising_ends(x, bits=bits),
    ]
    together, apart = (mean_error(x, pair, bits) for pair in pairs)
    assert apart <= together * (1 + 1e-9)


def test_one_end_at_zero_is_left_there() -> None:
    for x in (normal(300).abs_(), -normal(300).abs_(), torch.zeros(5)):
        ends, ratio = (
            error_minimising_ends(x, bits=3),
            error_minimising(x, bits=3, signed=False, symmetric=False),
        )
        assert ends[0] == ratio[0] and ends[1] == ratio[1]


def test_bad_arguments() -> None:
    x = normal(4, 4)
    with pytest.raises(ValueError, match="got 9"):
        error_minimising(x, bits=9, signed=False, symmetric=False)
    for bad in ({"num_ratios": 0}, {"exponent": 0.0}):
        with pytest.raises(ValueError, match="need num_ratios"):
            error_minimising(x, bits=4, signed=False, symmetric=False, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        error_minimising(x / 0.0 * 0.0, bits=4, signed=False, symmetric=False)
    for function in (minmax, lambda empty: percentile(empty, 0.9)):
        with pytest.raises(ValueError, match="at least one value"):
            function(torch.empty(0, 3))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
    per_channel=st.booleans(),
    magnitude=st.integers(-6, 6),
    data=st.data(),
)
def test_search_never_loses_to_minmax(
    shape: list[int],
    bits: int,
    signed: bool,
    symmetric: bool,
    per_channel: bool,
    magnitude: int,
    data: st.DataObject,
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1)) if per_channel else None
    x = normal(*shape, seed=bits) * 10.0**magnitude
    qmin, qmax = integer_limits(bits, signed)
    pairs = (
        error_minimising(x, bits=bits, signed=signed, symmetric=symmetric, axis=axis),
        choose_qparams(*minmax(x, axis), qmin=qmin, qmax=qmax, symmetric=symmetric),
    )
    found, plain = (
        (x - fake_quantize(x, *pair, qmin=qmin, qmax=qmax, axis=axis)).abs().pow(2.4).mean() for pair in pairs
    )
    assert found <= plain * (1 + 1e-9)
    assert pairs[0][0].shape == pairs[1][0].shape and bool((pairs[0][0] <= pairs[1][0]).all())
