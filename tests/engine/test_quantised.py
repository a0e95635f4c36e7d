"""Every quantisation of GGUF: what the `gguf` library dequantises is read, whatever its shape; the rest is refused.

Q4_K, Q5_K and Q6_K are checked against a decoder of their own (ggml_blocks.py): on blocks whose numbers are worked out
here, on random blocks, and in a model 256 features wide.
"""

from pathlib import Path

import ggml_blocks
import numpy as np
import pytest
import tiny_files
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize
from gguf_quants import READ, blocks_of, packed_projections, wide_model, write
from tolerances import SCOPED, assert_close, assert_moved, assert_same

import engine.gguf_file
from engine import forward, load_model
from engine.errors import DamagedFile

REFUSED = ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64")


def test_the_types_listed_here_are_all_there_are():
    def read_by_the_library(kind: GGMLQuantizationType) -> bool:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    readable = {kind.name for kind in GGMLQuantizationType if read_by_the_library(kind)}
    assert readable == set(READ)
    assert {kind.name for kind in GGMLQuantizationType} - readable == set(REFUSED)


@pytest.mark.parametrize("kind", READ)
def test_a_tensor_of_every_type_and_shape_is_what_the_library_makes_of_its_blocks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    monkeypatch.setattr(engine.gguf_file, "_STRETCH", 7 * block)  # no row and no tensor is a multiple of 7 blocks
    shapes = {"vector": (2,), "matrix": (19, 3), "stack": (2, 5, 1), "small": (1, 1)}  # the last axis in blocks
    stored, expected = {}, {}
    for seed, (name, shape) in enumerate(shapes.items()):
        blocks = blocks_of(kind, int(np.prod(shape)), seed)
        stored[name] = (kind, blocks.reshape(*shape[:-1], shape[-1] * size))
        one_by_one = [dequantize(one[None], GGMLQuantizationType[kind])[0] for one in blocks]
        expected[name] = np.concatenate(one_by_one).reshape(*shape[:-1], shape[-1] * block)
    file = write(tmp_path / "all.gguf", stored)
    for name, array in expected.items():
        found = file.dense(name)
        assert (found.dtype, found.flags.writeable) == (np.float32, True)
        assert_same(found, array)
        assert np.abs(found).max() > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_the_library_cannot_dequantise_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    file = write(tmp_path / "one.gguf", {"blk.0.ffn_up.weight": (kind, np.ones((4, size), np.uint8))})
    with pytest.raises(DamagedFile, match=f"one.gguf: 'blk.0.ffn_up.weight' is stored as {kind}, which cannot be read"):
        file.dense("blk.0.ffn_up.weight")


@pytest.mark.parametrize("weights", ["dense", "packed", "scoped"])
def test_a_model_with_a_tensor_of_such_a_type_does_not_load(weights: str, tmp_path: Path) -> None:
    def change(writer: GGUFWriter, tensors: tiny_files.Weights) -> None:
        del tensors["blk.1.ffn_up.weight"]
        writer.add_tensor("blk.1.ffn_up.weight", np.ones((64, 40), np.uint8), raw_dtype=GGMLQuantizationType.Q8_1)

    path = tiny_files.gguf_file(tmp_path / "tiny.gguf", change=change)
    with pytest.raises(DamagedFile, match=r"blk\.1\.ffn_up\.weight' is stored as Q8_1, which cannot be read"):
        load_model(path, weights=weights)


# --- blocks worked out by hand --------------------------------------------------------------------------------

HALF, QUARTER = b"\x00\x38", b"\x00\x34"  # 0.5 and 0.25 as f16
SCALES, MINIMA = (1, 2, 3, 4, 5, 17, 33, 63), (0, 1, 2, 3, 16, 32, 48, 63)
PACKED = bytes.fromhex("01 42 83 c4 40 81 c2 c3 05 01 01 ff")
"""SCALES and MINIMA, 6 bits each: byte 1, for one, is scale 1 (2) and above it the upper two bits of scale 5 (17 is
1 * 16 + 1), whose lower four are in byte 9.
"""
NIBBLES = bytes.fromhex("f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f")
"""Byte i: i below, 15 - i above."""
SIGNED = (1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12, 13, -14, 15, -128)


def k4_by_hand() -> tuple[bytes, list[float]]:
    values = [
        0.5 * SCALES[j] * (15 - i % 16 if j % 2 else i % 16) - 0.25 * MINIMA[j] for j in range(8) for i in range(32)
    ]
    return HALF + QUARTER + PACKED + NIBBLES * 8, values


def k5_by_hand() -> tuple[bytes, list[float]]:
    """The fifth bit is set in sub-blocks 4 to 7 for the first 16 weights, in 0 to 3 for the others."""
    values = [
        0.5 * SCALES[j] * ((15 - i % 16 if j % 2 else i % 16) + 16 * ((j >= 4) == (i < 16))) - 0.25 * MINIMA[j]
        for j in range(8)
        for i in range(32)
    ]
    return HALF + QUARTER + PACKED + b"\xf0" * 16 + b"\x0f" * 16 + NIBBLES * 8, values


def k6_by_hand() -> tuple[bytes, list[float]]:
    """Upper bits 0b11100100: 0, 1, 2 and 3 in the four quarters of each half."""
    values = [
        0.25 * SIGNED[at // 16] * ((at % 16 if part < 2 else 15 - at % 16) + 16 * part - 32)
        for at in range(256)
        for part in [at % 128 // 32]
    ]
    return NIBBLES * 8 + b"\xe4" * 64 + np.array(SIGNED, np.int8).tobytes() + QUARTER, values


BY_HAND = {"Q4_K": k4_by_hand(), "Q5_K": k5_by_hand(), "Q6_K": k6_by_hand()}
SPOTS = {
    "Q4_K": {0: 0.0, 32: 0.5 * 2 * 15 - 0.25, 131: 0.5 * 5 * 3 - 4, 224: 0.5 * 63 * 15 - 15.75, 255: -15.75},
    "Q5_K": {0: 0.0, 16: 0.5 * 16, 32: 14.75, 48: 0.5 * 2 * 31 - 0.25, 224: 0.5 * 63 * 31 - 15.75, 255: -15.75},
    "Q6_K": {0: -8.0, 16: 16.0, 32: -12.0, 64: 18.75, 96: 54.25, 128: -72.0, 255: -512.0},
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_blocks_worked_out_by_hand_are_read_as_such(kind: str, tmp_path: Path) -> None:
    packed, values = BY_HAND[kind]
    for at, value in SPOTS[kind].items():
        assert values[at] == value
    row = np.frombuffer(packed * 2, np.uint8)[None]
    for numbers in (write(tmp_path / "hand.gguf", {"w": (kind, row)}).dense("w"), ggml_blocks.decoded(kind, row)):
        assert numbers[0].tolist() == values * 2


@pytest.mark.parametrize("kind", ggml_blocks.BLOCKS)
def test_random_blocks_are_read_as_the_decoder_written_from_ggmls_sources_reads_them(kind: str, tmp_path: Path) -> None:
    rows = blocks_of(kind, 48, seed=7).reshape(12, -1)
    assert_same(write(tmp_path / "random.gguf", {"w": (kind, rows)}).dense("w"), ggml_blocks.decoded(kind, rows))


# --- a model 256 wide -----------------------------------------------------------------------------------------

IDS = [70, 3, 99, 5, 5, 180, 12]


@pytest.mark.parametrize("weights", ["dense", "packed", "scoped"])
def test_a_model_of_k_quants_computes_what_its_independently_decoded_weights_compute(weights, tmp_path):
    packed = packed_projections()
    unpacked = {name: ("F32", ggml_blocks.decoded(kind, rows)) for name, (kind, rows) in packed.items()}
    assert all(0.005 < array.std() < 0.1 for _, array in unpacked.values())
    quantised = load_model(wide_model(tmp_path / "quantised.gguf", packed), weights=weights)
    plain = load_model(wide_model(tmp_path / "plain.gguf", unpacked))
    for layer in range(2):
        ours, theirs = (dict(model.params.layer(layer).arrays()) for model in (quantised, plain))
        for name, array in theirs.items():
            assert_same(ours[name], array)
    logits = [forward(model, IDS, logits_at="all").logits[0] for model in (quantised, plain)]
    assert_close(*logits, SCOPED)
    assert_moved(forward(quantised, IDS[::-1], logits_at="all").logits[0], logits[1], SCOPED)
    assert 1 < np.abs(logits[0]).max() < 1e3
