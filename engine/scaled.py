"""Weights that were quantised to 8-bit floats, with scales beside them: `dequantised`.

What transformers' FP8 quantiser (integrations/finegrained_fp8.py) makes of them where it dequantises; it derives the
blocks from the shape of the scales, and activations are not quantised.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import DamagedFile, UnknownModel, clipped
from engine.ops import Array
from engine.weights import Safetensors, Tensors

METHODS = ("fp8", "mxfp8")

_SCALES = ("weight_scale_inv", "scale", "qscale_weight")
"""What is beside a matrix called `weight`; the last two are names of other writers."""
_BLOCK = [128, 128]
_OF_ACTIVATIONS = (".activation_scale", ".input_scale")


def dequantised(tensors: Safetensors, raw: Mapping[str, Any]) -> Tensors:
    """The same with scales multiplied in, if config.json says that there are any; raises `UnknownModel` for other
    methods of quantisation, and `DamagedFile`.
    """
    settings = raw.get("quantization_config")
    if settings is None:
        return tensors
    if not isinstance(settings, Mapping):
        raise DamagedFile(f"config: quantization_config is {clipped(settings)}, not an object")
    bits = [bits for bits in ("4bit", "8bit") if settings.get(f"load_in_{bits}")]
    method = f"bitsandbytes in {bits[0]}" if bits else settings.get("quant_method")
    if method not in METHODS:
        raise UnknownModel(
            f"the weights are quantised by {clipped(method)}; of such methods {' and '.join(METHODS)} are supported: "
            "load the model that was quantised, or a .gguf file of it"
        )
    return Scaled(tensors, _block(settings.get("weight_block_size", _BLOCK)))


def _block(size: object) -> tuple[int, int] | None:
    match size:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise DamagedFile(f"config: weight_block_size is {clipped(size)}; it must be two whole numbers above 0, or null")


class Scaled:
    """A source whose 8-bit matrices are multiplied by their scales; scales are no tensors of their own."""

    def __init__(self, source: Safetensors, block: tuple[int, int] | None) -> None:
        """`block` is (rows, columns) under one scale as config.json has it."""
        self._source, self._block = source, block
        self._scale = {matrix: name for name in source.names() if (matrix := _matrix_of(name)) in source}

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def names(self) -> Iterable[str]:
        scales = {*self._scale.values()}
        return (name for name in self._source.names() if name not in scales and not name.endswith(_OF_ACTIVATIONS))

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        weight = self._source.get(name, shape)
        if name in self._scale:
            return self._multiplied(weight, self._scale[name])
        if self._source.stored(name)[0].startswith("F8"):
            raise DamagedFile(f"{name} is quantised to 8 bits, and the weights hold no {_SCALES[0]} for it")
        return weight

    def _multiplied(self, weight: Array, name: str) -> Array:
        """`weight`, changed in place: each block times its scale."""
        dtype, grid = self._source.stored(name)
        scales = self._source.get(name, grid, "F8_E8M0" if dtype == "U8" else None)
        rows, columns = (1, 1) if scales.size == 1 else self._blocks(weight, name, grid)
        blocks = weight.reshape(rows, -1, columns, weight.shape[-1] // columns)
        blocks *= scales.reshape(rows, 1, columns, 1)
        return weight

    def _blocks(self, weight: Array, name: str, grid: tuple[int, ...]) -> tuple[int, ...]:
        """How many blocks lie below and beside each other; raises `DamagedFile` where that is not clear."""
        shape = weight.shape
        even = (
            len(shape) == len(grid) == 2 and 0 not in grid and not any(n % g for n, g in zip(shape, grid, strict=True))
        )
        if not even or self._cuts_otherwise(shape, grid):
            raise DamagedFile(f"{name} has shape {clipped(grid)}: it does not divide {shape} into blocks of one size")
        return grid

    def _cuts_otherwise(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
        """Whether blocks of config.json's size would be as many, the last of them smaller."""
        sizes = zip(shape, grid, self._block or grid, strict=True)
        return self._block is not None and any(g > 1 and n % size and -(-n // size) == g for n, g, size in sizes)


def _matrix_of(name: str) -> str:
    """The matrix that a scale of this name belongs to; '' if it is no scale's."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.weight" if last in _SCALES else ""
