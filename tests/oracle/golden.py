"""The golden files: the reference's answers, kept so that the tests need no torch.

smollm2.safetensors   last rows of the float64 reference, rounded to float32
    prompt/NAME/resid_post (layers, d_model), prompt/NAME/logits (every STRIDE-th), prompt/NAME/top (the ids of the
    five largest), case/NAME/resid_post (d_model,) of the last layer, case/NAME/logits, transplant/NAME/logits
smollm2.json          versions, the weights' sha256, prompts, the allowed error of every array, tokens
families.safetensors  of the tiny model of every row of `tests/families.py`, the rows that `family_cases.py` names
    ROW/PROMPT/logits (positions, d_vocab), ROW/points/POINT (layers, [heads,] width), ROW/case/NAME (positions, every
    8th logit), ROW/transplant/NAME (1, every 8th logit)
families.json         versions, prompts, the allowed error of every row of every array
gguf.safetensors      ROW/PROMPT (positions, d_vocab): llama.cpp's logits for the files of `tests/gguf_rows.py`
gguf.json             versions, prompts, positions, the allowed error of every array
directory_ids.json    of `tokenizer_dirs.py`: ids, special tokens and chats by transformers
gguf_ids.json         small vocabularies of every tokenizer kind, and llama.cpp's ids of awkward text
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

Array = np.ndarray

STRIDE = 48
"""Every 48th logit is kept: 1024 of 49152."""

NOISE = 2e-7
"""Relative distance of two float64 results after rounding to float32."""

NOISE_OF_ALLOWED = 4.0
"""float32 errors depend on the processor's kernels: what is allowed may differ by this factor."""


@dataclass(frozen=True)
class Golden:
    """What the two files `stem`.safetensors and `stem`.json hold. `allowed` has one number per row of an array."""

    arrays: dict[str, Array]
    facts: dict[str, Any]
    stem: str = "smollm2"

    def allowed(self, name: str) -> list[float]:
        """The relative error each row of an array may have."""
        return self.facts["allowed"][name]

    @classmethod
    def read(cls, directory: Path, stem: str = "smollm2") -> "Golden":
        facts = json.loads((directory / f"{stem}.json").read_text("utf-8"))
        return cls(load_file(directory / f"{stem}.safetensors"), facts, stem)

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.stem}.safetensors").write_bytes(save(self.arrays))
        text = json.dumps(self.facts, indent=1, sort_keys=True, ensure_ascii=False)
        text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
        (directory / f"{self.stem}.json").write_text(text + "\n", "utf-8")


def differences(committed: Golden, fresh: Golden, noise: Callable[[str], float] = lambda name: NOISE) -> Iterator[str]:
    """What is not the same, beyond the noise of an array."""
    for key in sorted({*committed.facts, *fresh.facts} - {"allowed"}):
        if committed.facts.get(key) != fresh.facts.get(key):
            yield f"{key}: {committed.facts.get(key)} is committed, {fresh.facts.get(key)} was found"
    for name in sorted({*committed.arrays, *fresh.arrays}):
        if name not in committed.arrays or name not in fresh.arrays:
            yield f"{name}: only in the {'fresh' if name in fresh.arrays else 'committed'} file"
        elif (found := _difference(committed.arrays[name], fresh.arrays[name])) > noise(name):
            yield f"{name}: relative distance {found:.1e}"
        elif name in fresh.facts["allowed"]:
            ratio = np.divide(committed.allowed(name), fresh.allowed(name))
            if not (ratio.min() >= 1 / NOISE_OF_ALLOWED and ratio.max() <= NOISE_OF_ALLOWED):
                yield f"{name}: the allowed errors are up to {max(ratio.max(), 1 / ratio.min()):.1f} times apart"


def _difference(a: Array, b: Array) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    if a.dtype.kind == "i":
        return 0.0 if np.array_equal(a, b) else np.inf
    exact = b.astype(np.float64)
    return float((np.linalg.norm(a - exact, axis=-1) / np.maximum(np.linalg.norm(exact, axis=-1), 1e-30)).max())
