"""Damaged model files from a seed: small good originals, and what is done to them.

originals(path)    writes the originals; name -> the .gguf file or directory
corpus(originals)  every case, in order; the same on every machine
Case.lay_out(to)   the original's files in an empty directory, with the damage
"""

import copy
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import tiny_files
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

COUNTS = {"safetensors": 160, "gguf": 200, "config.json": 320, "tokenizer.json": 160}
"""Cases per kind of file."""

# --- originals ------------------------------------------------------------------------------------------------


class Noted(families.Seeded):
    """Keeps every tensor it makes."""

    def __init__(self, row: str) -> None:
        super().__init__(row)
        self.made: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self.made[name] = super().get(name, shape)
        return self.made[name]


def family_directory(path: Path, row: str) -> Path:
    """The tiny model of a row of families.py as Hugging Face writes it."""
    tensors = Noted(row)
    model = families.tiny(row, tensors)
    for layer in range(model.config.n_layers):
        model.params.layer(layer)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(families.ROWS[row]))
    model.tokenizer.backend._library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    save_file(tensors.made, path / "model.safetensors")
    return path


def rich_tokenizer(path: Path) -> None:
    """One with a normaliser, a pattern, a template with BOS, truncation and padding, over the tiny vocabulary."""
    backend = Tokenizer(models.BPE(tiny_files.VOCABULARY, tiny_files.MERGES))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    pattern = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tiny_files.SPECIAL])
    backend.post_processor = processors.TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", 0)])
    backend.enable_truncation(64)
    backend.enable_padding(pad_id=1, pad_token="<|end|>")
    backend.save(str(path))


def originals(path: Path) -> dict[str, Path]:
    made = {
        "gguf": tiny_files.gguf_file(path / "tiny.gguf"),
        "f32": tiny_files.hf_directory(path / "f32"),
        "f16": tiny_files.hf_directory(path / "f16", dtype="F16"),
        "bf16-shards": tiny_files.hf_directory(path / "bf16-shards", dtype="BF16", shards=3),
        "tokens": tiny_files.hf_directory(path / "tokens"),
    }
    rich_tokenizer(made["tokens"] / "tokenizer.json")
    return made | {row: family_directory(path / row, row) for row in families.ROWS}


# --- damage to bytes ------------------------------------------------------------------------------------------


def flip(rng: random.Random, content: bytes) -> bytes:
    """One to eight bits; every second time near the start, where headers are."""
    damaged = bytearray(content)
    stop = len(content) if rng.random() < 0.5 else min(len(content), 4096)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(stop)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(rng: random.Random, content: bytes) -> bytes:
    stop = len(content) if rng.random() < 0.5 else min(len(content), 4096)
    return content[: rng.randrange(stop)]


def splice(rng: random.Random, content: bytes) -> bytes:
    """A stretch of the file, or noise, is put in, over, or taken out somewhere else."""
    size = rng.choice((1, 4, 8, 64, 1024))
    source, at = rng.randrange(len(content)), rng.randrange(len(content))
    piece = rng.choice((content[source : source + size], rng.randbytes(size), b"\xff" * size, b""))
    return content[:at] + piece + content[at + rng.choice((0, size)) :]


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (flip, flip, truncate, splice)

# --- damage to JSON values ------------------------------------------------------------------------------------

DEEP: list[Any] = []
for _ in range(150):
    DEEP = [DEEP]

POISON: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 5, 7, -1, -2, 10**6, 10**9, 2**31, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.5, 1e-9, 1e9, 1e30, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "x", "silu", "x" * 10_000, "\u0000", "\ud800", "9" * 5_000, "../../etc/passwd", "(a+)+$", "["),
    *([], [[]], {}, {"x": 1}, [0], [1, 2, 3], [None], ["x"] * 1000, DEEP),
)

UNSAID = (
    *("head_dim", "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "auto_map"),
    *("max_window_layers", "use_sliding_window", "no_rope_layers", "partial_rotary_factor", "eos_token_id"),
)
"""Settings that readers know and few rows have."""


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value; of a long list only the first and the last few."""
    items = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items if len(items) < 12 else items[:4] + items[-4:]:
        yield (*at, key)
        yield from places(inner, (*at, key))


def poison(rng: random.Random, content: bytes) -> bytes:
    """One to three values become something else, go, take the place of another, or come anew (in config.json)."""
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if "model_type" in tree and rng.random() < 0.2:
            tree[rng.choice(UNSAID)] = copy.deepcopy(rng.choice(POISON))
        elif found := list(places(tree)):
            *way, last = rng.choice(found)
            _spoil(rng, tree, functools.reduce(lambda part, key: part[key], way, tree), last)
    return json.dumps(tree).encode()


def _spoil(rng: random.Random, tree: Any, parent: Any, last: Any) -> None:
    deed, value = rng.random(), parent[last]
    if deed < 0.1:
        del parent[last]
    elif deed < 0.2:
        parent[last] = copy.deepcopy(rng.choice(list(tree.values())))
    elif deed < 0.5 and isinstance(value, int | float) and abs(value) < 1e9:
        parent[last] = rng.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 1000, value * 1.5))
    else:
        parent[last] = copy.deepcopy(rng.choice(POISON))


# --- the corpus -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`file` (a name in the original) with `content`; `weights` says how to load it."""

    label: str
    kind: str
    original: Path
    file: str
    content: bytes
    weights: str

    def lay_out(self, to: Path) -> Path:
        """The path to load."""
        if self.original.is_dir():
            for path in self.original.iterdir():
                if path.name != self.file:
                    shutil.copy(path, to / path.name)
        (to / self.file).write_bytes(self.content)
        return to if self.original.is_dir() else to / self.file


def _damaged(rng: random.Random, kind: str, made: dict[str, Path]) -> tuple[str, Path, str, bytes]:
    """(how, original, file, content)."""
    if kind == "gguf":
        name, file, damage = "gguf", made["gguf"].name, rng.choice(BYTES)
    elif kind == "safetensors":
        name = rng.choice(("f32", "f32", "f16", "bf16-shards"))
        files = sorted(path.name for path in made[name].iterdir() if "safetensors" in path.name)
        file = rng.choice(files)
        damage = rng.choice((*BYTES, poison)) if file.endswith("json") else rng.choice(BYTES)
    else:
        name = rng.choice(list(families.ROWS) if kind == "config.json" else ["tokens", "tokens", "f32"])
        file, damage = kind, rng.choice((*BYTES[1:], *[poison] * 9))
    original = made[name]
    content = (original / file if original.is_dir() else original).read_bytes()
    return f"{name}: {damage.__name__}", original, file, damage(rng, content)


def corpus(made: dict[str, Path]) -> Iterator[Case]:
    for kind, count in COUNTS.items():
        for index in range(count):
            how, original, file, content = _damaged(random.Random(f"{kind} {index}"), kind, made)
            label = f"{kind} {index} ({how})"
            ways = ("dense", "scoped", "packed") if kind == "gguf" else ("dense", "scoped")
            yield Case(label, kind, original, file, content, ways[index % len(ways)])
