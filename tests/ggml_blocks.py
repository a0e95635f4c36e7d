"""Q4_K, Q5_K and Q6_K blocks decoded without the `gguf` library, from ggml's C sources.

Layouts: ggml-common.h, block_q4_K, block_q5_K, block_q6_K; arithmetic: ggml-quants.c, dequantize_row_q4_K and its
siblings, get_scale_min_k4 (github.com/ggml-org/ggml). One weight at a time, in float32 and in C's order of operations.

BLOCKS     type -> (bytes of a block, its decoder)
decoded    the bytes of (rows, blocks of a row) -> (rows, features)
"""

from collections.abc import Callable

import numpy as np

Bytes = np.ndarray
F = np.float32


def half(block: Bytes, at: int) -> np.float32:
    return F(block[at : at + 2].view("<f2")[0])


def scale_and_minimum(packed: list[int], j: int) -> tuple[int, int]:
    """Six bits each, of sub-block j; the last four sub-blocks keep their upper two bits in the first eight bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
    minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
    return scale, minimum


def four_bits(quants: list[int], j: int, i: int) -> int:
    """Of weight i of sub-block j: 32 bytes serve two sub-blocks, the first in the lower halves."""
    byte = quants[32 * (j // 2) + i]
    return byte >> 4 if j % 2 else byte & 15


def _affine(block: Bytes, quants_at: int, fifth_bits: list[int] | None) -> np.ndarray:
    """d * scale * quant - dmin * minimum, 8 sub-blocks of 32."""
    d, dmin = half(block, 0), half(block, 2)
    packed, quants = block[4:16].tolist(), block[quants_at:].tolist()
    out = np.empty(256, np.float32)
    for j in range(8):
        scale, minimum = scale_and_minimum(packed, j)
        step, offset = d * F(scale), dmin * F(minimum)
        for i in range(32):
            quant = four_bits(quants, j, i)
            if fifth_bits is not None:
                quant += 16 * (fifth_bits[i] >> j & 1)
            out[32 * j + i] = step * F(quant) - offset
    return out


def q4_k(block: Bytes) -> np.ndarray:
    """d, dmin (f16), 12 bytes of scales and minima, 128 bytes of quants."""
    return _affine(block, 16, None)


def q5_k(block: Bytes) -> np.ndarray:
    """d, dmin (f16), 12 bytes of scales and minima, 32 bytes with bit j for sub-block j, 128 bytes of low bits."""
    return _affine(block, 48, block[16:48].tolist())


def q6_k(block: Bytes) -> np.ndarray:
    """128 bytes of low bits, 64 of upper bits, 16 signed scales, d (f16); quants are 6 bits minus 32."""
    low, high = block[:128].tolist(), block[128:192].tolist()
    scales, d = block[192:208].view(np.int8).tolist(), half(block, 208)
    out = np.empty(256, np.float32)
    for at in range(256):
        of, part, i = at // 128, at % 128 // 32, at % 32  # half of the block, quarter of the half, weight
        byte = low[64 * of + 32 * (part % 2) + i]
        quant = (byte >> 4 if part >= 2 else byte & 15) | (high[32 * of + i] >> 2 * part & 3) << 4
        out[at] = d * F(scales[at // 16]) * F(quant - 32)
    return out


BLOCKS: dict[str, tuple[int, Callable[[Bytes], np.ndarray]]] = {
    "Q4_K": (144, q4_k),
    "Q5_K": (176, q5_k),
    "Q6_K": (210, q6_k),
}


def decoded(kind: str, rows: Bytes) -> np.ndarray:
    size, decode = BLOCKS[kind]
    blocks = rows.reshape(-1, size)
    return np.stack([decode(np.ascontiguousarray(block)) for block in blocks]).reshape(len(rows), -1)
