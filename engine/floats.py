"""How safetensors files store numbers, by the names of their types: `to_float32`.

F8_E4M3 has no infinities and the NaNs 0x7f and 0xff, F8_E5M2 is the upper half of a float16 (Micikevicius et al. 2022),
F8_E8M0 is a power of two (OCP Microscaling Formats 1.0).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.errors import DamagedFile, clipped
from engine.matrices import Array

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _e4m3() -> Array:
    """The 256 numbers: sign, four bits of exponent with a bias of 7, three of mantissa."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent > 0, 8 + mantissa, mantissa) * 2.0 ** (np.maximum(exponent, 1) - 10)
    values: Array = np.where(code & 128, -size, size).astype(np.float32)
    values[code & 127 == 127] = np.nan
    return values


def _narrowed(raw: Bytes) -> Array:
    with np.errstate(over="ignore"):  # infinity, which is refused where weights are read
        return raw.view(np.float64).astype(np.float32)


def _power(raw: Bytes) -> Array:
    """Of two; 255 stands for NaN, and is refused like it as infinity."""
    with np.errstate(over="ignore"):
        return np.exp2(raw.astype(np.float32) - 127)


_E4M3 = _e4m3()

TYPES: dict[str, Callable[[Bytes], Array]] = {
    "F64": _narrowed,
    "F32": lambda raw: np.array(raw.view(np.float32)),
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "BF16": lambda raw: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    "F8_E4M3": lambda raw: _E4M3[raw],
    "F8_E5M2": lambda raw: (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32),
    "F8_E8M0": _power,
}
"""By the name in the file's header: the bytes of a tensor -> its numbers in a row, a new array."""


def to_float32(raw: Bytes, dtype: str, name: str) -> Array:
    """The numbers of the tensor `name` in a row; raises `DamagedFile` for types that are no floating-point numbers."""
    if dtype not in TYPES:
        raise DamagedFile(f"{name} is stored as {clipped(dtype)}; {', '.join(TYPES)} are supported")
    return TYPES[dtype](raw)
