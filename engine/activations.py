"""Activation functions by their names in config.json: `ACTIVATIONS`; and `erf`, which numpy has not."""

from collections.abc import Callable

import numpy as np

from engine.matrices import Array


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(88) overflows to inf, and x / inf is the right answer, 0
        gate = np.negative(x)
        np.exp(gate, out=gate)
    gate += 1
    return np.divide(x, gate, out=gate)


def _gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), `gelu_pytorch_tanh` of transformers."""
    with np.errstate(over="ignore"):  # infinity's tanh is right, too
        inner = x * x * x
    inner *= np.float32(0.044715)
    inner += x
    inner *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    inner *= np.float32(0.5)
    return inner


ERF_ODD = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
ERF_EVEN = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02,
)  # fmt: skip


def erf(x: Array) -> Array:
    """The error function to float32 accuracy: Eigen's rational approximation on [-4, 4] (generic_fast_erf_float)."""
    clipped = np.clip(x, -4, 4)
    square = clipped * clipped
    above, below = np.full_like(x, ERF_ODD[0]), np.full_like(x, ERF_EVEN[0])
    for total, coefficients in ((above, ERF_ODD), (below, ERF_EVEN)):
        for coefficient in coefficients[1:]:
            total *= square
            total += np.float32(coefficient)
    above *= clipped
    return np.divide(above, below, out=above)


def _gelu(x: Array) -> Array:
    """X * Phi(x) (Hendrycks & Gimpel 2016)."""
    out = erf(x * np.float32(0.5**0.5))
    out += 1
    out *= x
    out *= np.float32(0.5)
    return out


def _quick_gelu(x: Array) -> Array:
    """X * sigmoid(1.702 x) (Hendrycks & Gimpel 2016)."""
    scaled = x * np.float32(1.702)
    scaled = _silu(scaled)
    scaled *= np.float32(1 / 1.702)
    return scaled


def _mish(x: Array) -> Array:
    """X * tanh(softplus(x)) (Misra 2019)."""
    out = np.logaddexp(x, np.float32(0))
    np.tanh(out, out=out)
    out *= x
    return out


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


def _relu2(x: Array) -> Array:
    """The square of ReLU (So et al. 2021)."""
    out = _relu(x)
    out *= out
    return out


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python": _gelu,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
    "silu": _silu,
    "swish": _silu,
}
"""By the name in config.json, as transformers' activations.py has them; some have several names."""
