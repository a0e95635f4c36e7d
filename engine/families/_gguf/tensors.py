"""`GgufTensors`: the tensors of a GGUF file under their Hugging Face names, repaired at the door.

llama.cpp's converter interleaves the rotary pairs of llama's query and key rows (`LlamaModel.permute`) and stores
GPT-2's matrices as (out, in); both are put back.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from engine.errors import DamagedFile
from engine.families._gguf.table import architecture
from engine.families._read import whole
from engine.gguf_file import GgufFile
from engine.ops import Array


class GgufTensors:
    """A source of tensors (`engine.weights.Tensors`)."""

    def __init__(self, file: GgufFile, raw: dict[str, Any], read: Callable[[str], Array] | None = None) -> None:
        """`raw` is what `config_json` made of the file; `read` gives something else of a tensor than its numbers."""
        self._file, self._row, self._raw = file, architecture(file), raw
        self._read = file.dense if read is None else read
        stored = [name for name in file.tensors if name not in self._row.settings]
        self._stored = {self._hugging_face_name(name): name for name in stored}
        if len(self._stored) < len(stored):
            raise DamagedFile(
                f"{file.path.name} holds a tensor under its GGUF and its Hugging Face name; convert it again"
            )
        self._heads: dict[str, int] = {}
        if self._row.interleaved is not None:
            heads = whole(raw, "num_attention_heads")
            kv_heads = whole(raw, "num_key_value_heads", heads)
            self._heads = {part: kv_heads if kv else heads for part, kv in self._row.interleaved.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> Iterable[str]:
        return self._stored

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        stored = self._stored.get(name, self._gguf_name(name))
        if stored not in self._file.tensors:
            raise DamagedFile(f"{self._file.path.name} has no tensor {stored!r}, which its metadata imply")
        part = stored.split(".")[-2]
        turned = part in self._row.transposed and len(shape) == 2
        wanted = shape[::-1] if turned else shape
        if (found := self._file.tensors[stored].shape) != wanted:
            raise DamagedFile(f"{self._file.path.name}: {stored} has shape {found}, but the config implies {wanted}")
        dense = self._read(stored)
        if part in self._heads:
            return _deinterleaved(dense, self._heads[part])
        return np.ascontiguousarray(dense.T) if turned else dense

    def steps(self) -> tuple["GgufTensors", "GgufTensors"]:
        """Sources of scales and of minima: of a matrix a column for each group of its features."""
        ours, raw = self._file, self._raw
        return (
            GgufTensors(ours, raw, lambda name: ours.steps(name)[0]),
            GgufTensors(ours, raw, lambda name: ours.steps(name)[1]),
        )

    def _hugging_face_name(self, stored: str) -> str:
        """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; a name that is not known stays as it is."""
        match stored.split("."):
            case [stem, kind] if stem in self._row.ends:
                return f"{self._row.ends[stem]}.{kind}"
            case ["blk", layer, stem, kind] if stem in self._row.parts:
                return f"{self._row.layers}.{layer}.{self._row.parts[stem]}.{kind}"
        return stored

    def _gguf_name(self, name: str) -> str:
        """The way back, for a tensor that is missing."""
        stem, kind = name.rsplit(".", 1)
        stems = {theirs: ours for ours, theirs in self._row.ends.items()}
        if stem.startswith(f"{self._row.layers}."):
            layer = stem.removeprefix(f"{self._row.layers}.").split(".", 1)[0]
            parts = self._row.parts.items()
            stems = {f"{self._row.layers}.{layer}.{theirs}": f"blk.{layer}.{ours}" for ours, theirs in parts}
        return f"{stems.get(stem, stem)}.{kind}"


def _deinterleaved(rows: Array, heads: int) -> Array:
    """Rotary pairs in rows (0, 1), (2, 3), ... of a head -> rows i and i + half; works on weights and biases."""
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
