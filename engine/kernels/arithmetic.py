"""Functions of one number, for kernels: `exp`, `tanh`, `erf`."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from engine.activations import ERF_EVEN, ERF_ODD
from engine.kernels.calls import f32, i32


def _bits_as_float(_: Any, bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return f32(i32), generate


_as_float: Any = intrinsic(_bits_as_float)
_LOWEST, _HIGHEST = np.float32(-87.3), np.float32(88.7)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ZERO, HALF, ONE, _TWO, _FOUR, _SMALL = (np.float32(x) for x in (0, 0.5, 1, 2, 4, 0.625))
_ERF_ODD, _ERF_EVEN = (tuple(np.float32(c) for c in polynomial) for polynomial in (ERF_ODD, ERF_EVEN))
_EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
"""The polynomial of Cephes' expf: 2 ulp."""
_TANH = tuple(
    np.float32(c) for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
)
"""The polynomial of Cephes' tanhf, up to `_SMALL`."""


@njit(inline="always")
def exp(x: Any) -> Any:
    """E to the x; 0 below -87.3, where float32 leaves its normal range, infinity above 88.3. NaN stays NaN."""
    small = x < _LOWEST
    x = _HIGHEST if x > _HIGHEST else (_LOWEST if small else x)
    n = np.floor(x * _LOG2E + HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = _EXP[0]
    p = p * r + _EXP[1]
    p = p * r + _EXP[2]
    p = p * r + _EXP[3]
    p = p * r + _EXP[4]
    p = p * r + _EXP[5]
    p = p * r * r + r + ONE
    two_to_n = _as_float(i32((i32(n) + i32(127)) << i32(23)))
    return ZERO if small else p * two_to_n


@njit(inline="always")
def tanh(x: Any) -> Any:
    """Cephes' tanhf: 2 ulp."""
    size, square = abs(x), x * x
    p = _TANH[0]
    p = p * square + _TANH[1]
    p = p * square + _TANH[2]
    p = p * square + _TANH[3]
    p = p * square + _TANH[4]
    large = ONE - _TWO / (exp(size + size) + ONE)
    return x + x * square * p if size < _SMALL else np.copysign(large, x)


@njit(inline="always")
def erf(x: Any) -> Any:
    """As `activations.erf`."""
    x = max(-_FOUR, min(_FOUR, x)) if x == x else x
    square = x * x
    above, below = _ERF_ODD[0], _ERF_EVEN[0]
    for i in range(1, len(_ERF_ODD)):
        above = above * square + _ERF_ODD[i]
    for i in range(1, len(_ERF_EVEN)):
        below = below * square + _ERF_EVEN[i]
    return x * above / below
