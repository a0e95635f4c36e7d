"""Numbers as files store them: f64 and 8-bit floats, alone and with scales beside them.

The right values of F8_E4M3 are those of torch.float8_e4m3fn; what the scales mean is compared with transformers by
`make oracle` (tests/oracle/float8.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_files

from engine import forward, load_model
from engine.errors import DamagedFile, ModelError, UnknownModel
from engine.floats import to_float32

NAME = "model.layers.0.mlp.down_proj.weight"
SHAPE = (32, 64)
CODES = np.random.default_rng(0).integers(0, 0x7E, SHAPE).astype(np.uint8)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}

Stored = dict[str, tuple[str, np.ndarray]]


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (0x00, 0.0), (0x01, 2**-9), (0x07, 7 * 2**-9), (0x08, 2**-6), (0x38, 1.0), (0x3C, 1.5), (0x7E, 448.0),
        (0x81, -(2**-9)), (0xB8, -1.0), (0xFE, -448.0), (0x7F, np.nan), (0xFF, np.nan),
    ],
)  # fmt: skip
def test_e4m3_has_no_infinity_and_subnormal_numbers(code: int, value: float) -> None:
    np.testing.assert_array_equal(to_float32(np.array([code], np.uint8), "F8_E4M3", "w"), np.float32([value]))


def test_e5m2_is_the_upper_half_of_a_float16_and_e8m0_a_power_of_two() -> None:
    codes = np.array([0x3C, 0x3D, 0x7B, 0xBC, 0x7C], np.uint8)
    np.testing.assert_array_equal(to_float32(codes, "F8_E5M2", "w"), np.float32([1, 1.25, 57344, -1, np.inf]))
    np.testing.assert_array_equal(to_float32(np.array([127, 130, 120], np.uint8), "F8_E8M0", "w"), [1, 8, 2**-7])


def save(path: Path, stored: Stored) -> None:
    """The format by hand: numpy has no 8-bit floats."""
    header, data = {}, b""
    for name, (dtype, array) in stored.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def directory(path: Path, changed: Stored, dtype: str = "F32", **config: object) -> Path:
    """A tiny model with some of its tensors stored as `changed` has them."""
    numpy_type = np.float64 if dtype == "F64" else np.float32
    plain: Stored = {name: (dtype, array.astype(numpy_type)) for name, array in tiny_files.weights().items()}
    at = tiny_files.hf_directory(path, **config)
    save(at / "model.safetensors", plain | changed)
    return at


def down(at: Path) -> np.ndarray:
    return load_model(at).params.layer(0).down.weight.T


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    ids = [3, 1, 4, 1, 5]
    made = [forward(load_model(directory(tmp_path / dtype, {}, dtype)), ids).logits for dtype in ("F32", "F64")]
    np.testing.assert_array_equal(*made)


def test_a_float64_that_no_float32_holds_is_refused(tmp_path: Path) -> None:
    at = directory(tmp_path / "tiny", {NAME: ("F64", np.full(SHAPE, 1e300))})
    with pytest.raises(DamagedFile, match=rf"{NAME} holds NaN or infinity"):
        load_model(at)


def test_8_bit_floats_without_scales_are_the_numbers_they_are(tmp_path: Path) -> None:
    expected = to_float32(CODES, "F8_E4M3", NAME)
    np.testing.assert_array_equal(down(directory(tmp_path / "tiny", {NAME: ("F8_E4M3", CODES)})), expected)


def spread(scales: np.ndarray) -> np.ndarray:
    """Each scale over its block."""
    return np.repeat(np.repeat(scales, 32 // len(scales), 0), 64 // scales.shape[1], 1)


GRIDS = {
    "blocks": ((2, 2), [16, 32]),
    "blocks whose size the config leaves out": ((2, 2), None),
    "rows": ((32, 1), None),
    "one": ((1, 1), None),
}


@pytest.mark.parametrize(("grid", "block"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "qscale_weight"])
def test_each_block_is_multiplied_by_its_scale(
    grid: tuple[int, int], block: list[int] | None, name: str, tmp_path: Path
) -> None:
    scales = np.random.default_rng(1).uniform(0.5, 2, grid).astype(np.float32)
    changed: Stored = {NAME: ("F8_E4M3", CODES), NAME.replace("weight", name): ("F32", scales)}
    at = directory(tmp_path / "tiny", changed, quantization_config=FP8 | {"weight_block_size": block})
    np.testing.assert_array_equal(down(at), to_float32(CODES, "F8_E4M3", NAME) * spread(scales))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_is_the_whole_matrix_and_those_of_activations_are_left(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    scale = np.full(shape, 0.25, np.float32)
    changed: Stored = {NAME: ("F8_E4M3", CODES), f"{NAME}_scale_inv": ("F32", scale)}
    changed[NAME.replace("weight", "activation_scale")] = ("F32", scale)
    at = directory(tmp_path / "tiny", changed, quantization_config=FP8 | {"activation_scheme": "static"})
    np.testing.assert_array_equal(down(at), to_float32(CODES, "F8_E4M3", NAME) / 4)


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_scales_of_one_byte_are_powers_of_two(dtype: str, tmp_path: Path) -> None:
    powers = np.random.default_rng(2).integers(120, 130, (32, 2)).astype(np.uint8)
    changed: Stored = {NAME: ("F8_E4M3", CODES), f"{NAME}_scale_inv": (dtype, powers)}
    at = directory(tmp_path / "tiny", changed, quantization_config={"quant_method": "mxfp8"})
    expected = to_float32(CODES, "F8_E4M3", NAME) * 2.0 ** (spread(powers).astype(np.float32) - 127)
    np.testing.assert_array_equal(down(at), expected)


DIVIDES, INV = "it does not divide", "weight_scale_inv"
REFUSED: dict[str, tuple[object, str | None, tuple[int, ...], type[ModelError], str]] = {
    "no scale": (FP8, None, (), DamagedFile, f"{NAME} is quantised to 8 bits, and the weights hold no {INV}"),
    "another name": (FP8, "weight_scale", (), DamagedFile, f"{NAME} is quantised to 8 bits"),
    "a grid that does not divide": (FP8, INV, (3, 2), DamagedFile, rf"\(3, 2\): {DIVIDES}"),
    "a grid of lines": (FP8, INV, (32,), DamagedFile, rf"\(32,\): {DIVIDES}"),
    "a smaller block at the end": (
        FP8 | {"weight_block_size": [20, 64]}, INV, (2, 1), DamagedFile, rf"\(2, 1\): {DIVIDES}",
    ),
    "scales without a config": (None, INV, (2, 2), DamagedFile, "does not account for, such as .*scale_inv"),
    "another method": (
        {"quant_method": "compressed-tensors"}, "weight_scale", (32, 1), UnknownModel, "by 'compressed-tensors'",
    ),
    "no method": ({}, None, (), UnknownModel, "quantised by None; of such methods fp8 and mxfp8 are supported"),
    "bitsandbytes": (FP8 | {"load_in_8bit": True}, None, (), UnknownModel, "bitsandbytes in 8bit"),
    "no object": ("fp8", None, (), DamagedFile, "quantization_config is 'fp8', not an object"),
    "blocks of nothing": (FP8 | {"weight_block_size": [0, 2]}, None, (), DamagedFile, "weight_block_size is"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "scale", "grid", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_transformers_reads_otherwise_or_not_at_all_is_refused(
    settings: object, scale: str | None, grid: tuple[int, ...], error: type[ModelError], message: str, tmp_path: Path
) -> None:
    changed: Stored = {NAME: ("F8_E4M3", CODES)}
    if scale is not None:
        changed[NAME.replace("weight", scale)] = ("F32", np.ones(grid, np.float32))
    with pytest.raises(error, match=message):
        load_model(directory(tmp_path / "tiny", changed, quantization_config=settings))


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    at = directory(tmp_path / "tiny", {NAME: ("I8", CODES.view(np.int8))})
    with pytest.raises(DamagedFile, match="stored as 'I8'; F64, F32, F16, BF16, F8_E4M3, F8_E5M2, F8_E8M0 are"):
        load_model(at)
