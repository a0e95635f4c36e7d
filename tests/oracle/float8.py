"""Weights quantised to 8-bit floats: both sides make the same numbers of one directory."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.layouts import SAME, ours, saved, theirs
from oracle.measure import Measure, Result, distance
from safetensors.torch import load_file, save_file

from engine.floats import to_float32

Settings = dict[str, Any]

FP8: Settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
E8M0 = torch.float8_e8m0fnu

CASES: dict[str, tuple[Settings, torch.dtype, tuple[int, int], torch.dtype, str]] = {
    "blocks": (FP8 | {"weight_block_size": [8, 16]}, torch.float8_e4m3fn, (8, 16), torch.float32, "weight_scale_inv"),
    "e5m2": (FP8 | {"weight_block_size": [8, 16]}, torch.float8_e5m2, (8, 16), torch.bfloat16, "scale"),
    "rows": (FP8 | {"weight_block_size": None}, torch.float8_e4m3fn, (1, 0), torch.float32, "weight_scale_inv"),
    "matrices": (FP8 | {"weight_block_size": None}, torch.float8_e4m3fn, (0, 0), torch.float32, "qscale_weight"),
    "powers": (FP8 | {"weight_block_size": [8, 16]}, torch.float8_e4m3fn, (8, 16), E8M0, "weight_scale_inv"),
    "bytes": ({"quant_method": "mxfp8"}, torch.float8_e4m3fn, (1, 16), torch.uint8, "weight_scale_inv"),
}
"""Settings, type, block (0: all rows or columns), type of the scales, their name."""


def float8_agrees() -> Iterator[Result]:
    """Every number of 8 bits, and logits of every form of scales; the control leaves the scales out."""
    codes = np.arange(256, dtype=np.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2), ("F8_E8M0", E8M0)):
        expected = torch.from_numpy(codes).view(dtype).float().numpy()
        same = (to_float32(codes, name, "") == expected) | np.isnan(expected)
        yield Result("8-bit floats", f"{name}: numbers that differ", Measure(int((~same).sum()), 0.0, 256))
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            at = saved(Path(scratch) / "model", "llama")
            whole = theirs(at)
            _quantise(at, *case)
            expected, found = theirs(at), ours(at)
        yield Result("8-bit floats", name, Measure(distance(found, expected), SAME, 2), distance(whole, expected))


def _quantise(
    at: Path, settings: Settings, dtype: torch.dtype, block: tuple[int, int], scale: torch.dtype, name: str
) -> None:
    """The projections of a directory in 8 bits, with random scales."""
    stored, draw = load_file(at / "model.safetensors"), torch.Generator().manual_seed(0)
    for weight in [key for key in stored if key.endswith("proj.weight")]:
        grid = [n // (size or n) for n, size in zip(stored[weight].shape, block, strict=True)]
        powers = torch.randint(123, 126, grid, generator=draw).to(torch.uint8)
        scales = powers if scale == torch.uint8 else powers.view(E8M0).float().to(scale)
        stored[weight] = (4 * stored[weight]).to(dtype)
        stored[weight.removesuffix("weight") + name] = scales
    save_file(stored, at / "model.safetensors", {"format": "pt"})
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
