"""GGUF files with blocks of every type, from random bytes.

READ                 the types that can be read
blocks_of            random blocks of a type
write                a file of tensors
packed_projections   projections in k-quants, the size of trained ones
wide_model           a model of them, 256 features wide
"""

from pathlib import Path

import ggml_blocks
import numpy as np
import tiny_files
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize

from engine.gguf_file import GgufFile

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BY_TABLE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
TERNARY_AND_FP4 = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4")
READ = ("F32", "F16", "BF16", *LEGACY, *K_QUANTS, *BY_TABLE, *TERNARY_AND_FP4)


def blocks_of(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """(count, bytes of a block): random blocks that stand for finite numbers of moderate size."""
    rng = np.random.default_rng(seed)
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    drawn = rng.integers(0, 256, (16 * count + 512, size), np.uint8)
    with np.errstate(all="ignore"):
        numbers = np.concatenate([dequantize(row[None], GGMLQuantizationType[kind]) for row in drawn])
        fit = np.isfinite(numbers).all(1) & (np.abs(numbers).max(1) < 1e4) & (np.abs(numbers).max(1) > 1e-4)
    assert fit.sum() >= count
    return drawn[fit][:count]


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> GgufFile:
    """`tensors`: name -> (type, bytes, the last axis being a row's)."""
    writer = GGUFWriter(path, "test")
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile.open(path)


WIDE = {"embedding_length": 256, "feed_forward_length": 256, "rope.dimension_count": 64}
ROWS = {"attn_k": 128, "attn_v": 128}
KIND_OF = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q4_K"} | {
    "ffn_gate": "Q4_K", "ffn_up": "Q5_K", "ffn_down": "Q6_K"
}  # fmt: skip


def packed_projections() -> dict[str, tuple[str, np.ndarray]]:
    """Random quants under scales that give weights the size of trained ones."""
    made = {}
    for seed, (layer, (part, kind)) in enumerate((layer, item) for layer in range(2) for item in KIND_OF.items()):
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, 256, (ROWS.get(part, 256), ggml_blocks.BLOCKS[kind][0]), np.uint8)
        scales = [(208, 2e-5)] if kind == "Q6_K" else [(0, 2e-4 if kind == "Q4_K" else 1e-4), (2, 1.5e-3)]
        for at, size in scales:
            rows[:, at : at + 2] = rng.uniform(0.5 * size, size, len(rows)).astype("<f2").view(np.uint8).reshape(-1, 2)
        made[f"blk.{layer}.{part}.weight"] = (kind, rows)
    return made


def wide_model(path: Path, projections: dict[str, tuple[str, np.ndarray]]) -> Path:
    def change(writer: GGUFWriter, tensors: tiny_files.Weights) -> None:
        rng = np.random.default_rng(99)
        ends = {"token_embd.weight": (rng.standard_normal((len(tiny_files.TOKENS), 256)) * 0.5).astype(np.float32)}
        norms = [name for name in tensors if "norm" in name]
        tensors.clear()
        tensors |= ends | {name: rng.uniform(0.5, 1.5, 256).astype(np.float32) for name in norms}
        for key, value in WIDE.items():
            writer.add_uint32(f"llama.{key}", value)
        for name, (kind, data) in projections.items():
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])

    return tiny_files.gguf_file(path, change=change, leave_out=tuple(f"llama.{key}" for key in WIDE))
