"""Integer codes of 2..8 bits packed to their true width: 3-bit codes take 3 bits each, not a byte.

The bits form one stream, least significant first: code i holds bits i * bits .. (i + 1) * bits - 1 of it, and
bit k of the stream is bit k % 8 (value 2^(k % 8)) of byte k // 8. Two 4-bit codes a and b make the byte
a + 16 b. Codes run in row-major order; unused bits of the last byte are 0. Signed codes are packed as
code - qmin by the caller.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zsq.quant.affine import integer_limits

_GROUP = 8  # eight codes of b bits fill b bytes exactly


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes that `num_codes` codes of `bits` bits take."""
    integer_limits(bits, signed=False)
    return math.ceil(num_codes * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes 0 .. 2^bits - 1.

    Args:
        codes: uint8, any shape.
        bits: width of a code, 2..8.

    Returns:
        uint8, 1-D, packed_size(number of codes, bits) bytes.

    Raises:
        ValueError: bits outside 2..8, another dtype, or a code that does not fit.
    """
    _, highest = integer_limits(bits, signed=False)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be torch.uint8, got {codes.dtype}")
    codes = codes.reshape(-1)
    if codes.numel() and int(codes.max()) > highest:
        raise ValueError(f"codes of {bits} bits must be at most {highest}, got {int(codes.max())}")
    if bits == 8:
        return codes.clone()
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % _GROUP)).view(-1, _GROUP)
    words = torch.zeros(padded.shape[0], dtype=torch.int64, device=codes.device)
    for position in range(_GROUP):
        words |= padded[:, position].to(torch.int64) << (position * bits)
    packed = torch.empty(padded.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for position in range(bits):
        packed[:, position] = (words >> (8 * position)) & 0xFF
    return packed.view(-1)[: packed_size(codes.numel(), bits)].clone()


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes that `pack` packed.

    Args:
        packed: uint8, 1-D, from `pack`.
        bits: width of a code, 2..8.
        shape: shape of the codes.

    Returns:
        uint8 codes of `shape`.

    Raises:
        ValueError: bits outside 2..8, another dtype, or a length that does not belong to `shape`.
    """
    num_codes = math.prod(shape)
    expected = packed_size(num_codes, bits)
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be torch.uint8, got {packed.dtype}")
    if packed.shape != (expected,):
        raise ValueError(
            f"codes of {bits} bits and shape {tuple(shape)} take {expected} bytes, "
            f"got a tensor of shape {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.clone().view(tuple(shape))
    padded = torch.nn.functional.pad(packed, (0, -expected % bits)).view(-1, bits)
    words = torch.zeros(padded.shape[0], dtype=torch.int64, device=packed.device)
    for position in range(bits):
        words |= padded[:, position].to(torch.int64) << (8 * position)
    codes = torch.empty(padded.shape[0], _GROUP, dtype=torch.uint8, device=packed.device)
    for position in range(_GROUP):
        codes[:, position] = (words >> (position * bits)) & (2**bits - 1)
    return codes.view(-1)[:num_codes].clone().view(tuple(shape))
