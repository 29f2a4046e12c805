import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsq.quant.packing import pack, packed_size, unpack


def codes_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_pack_by_hand() -> None:
    assert pack(codes_of(1, 2, 15), 4).tolist() == [1 + 16 * 2, 15]
    assert pack(codes_of(3, 0, 1, 2, 1), 2).tolist() == [3 + 16 * 1 + 64 * 2, 1]
    # 3 bits: 5, 3, 6 are 101, 011, 110 from the low end: byte 0 = 10 011 101, byte 1 = 1
    assert pack(codes_of(5, 3, 6), 3).tolist() == [0b10_011_101, 0b1]
    assert pack(codes_of(200, 7), 8).tolist() == [200, 7]


@settings(deadline=None, derandomize=True, max_examples=80)
@given(bits=st.integers(2, 8), length=st.integers(0, 70), seed=st.integers(0, 100))
def test_round_trip(bits: int, length: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (length,), generator=rng, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(length * bits / 8),)
    assert packed.numel() == packed_size(length, bits)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)
    # oracle: Python's integers hold the stream
    stream = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == stream.to_bytes(packed.numel(), "little")


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5, 7), (2, 1, 3, 3)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_shapes_and_layouts(shape: tuple[int, ...], bits: int) -> None:
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, shape, generator=rng, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, shape), codes)
    if len(shape) > 1:
        flipped = codes.transpose(0, -1)
        assert torch.equal(unpack(pack(flipped, bits), bits, flipped.shape), flipped)


def test_results_own_their_memory() -> None:
    codes = codes_of(1, 2, 3)
    for bits in (4, 8):
        packed = pack(codes, bits)
        unpack(packed, bits, (3,)).zero_()
        assert torch.equal(packed, pack(codes, bits))
        packed.zero_()
        assert codes.tolist() == [1, 2, 3]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at most 7, got 8"):
        pack(codes_of(1, 8), 3)
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"got {bits}"):
            pack(codes_of(0), bits)
        with pytest.raises(ValueError, match=f"got {bits}"):
            unpack(codes_of(0), bits, (1,))
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(3), 4)
    with pytest.raises(ValueError, match="uint8"):
        unpack(torch.zeros(2), 4, (3,))
    for wrong in (codes_of(0), codes_of(0, 0, 0), codes_of(0, 0).view(1, 2)):
        with pytest.raises(ValueError, match="take 2 bytes"):
            unpack(wrong, 4, (3,))
