"""Weights converted once: what loading made of a model's files, kept in the cache directory and mapped at later starts.

A conversion is one safetensors file: every array of `Params` as the decoder reads it (float32, matrices (in, out)),
and in its metadata what else loading found out. The first load writes it, `find` maps it.

find(path)          the conversion of a model's files, if there is one that still fits
keep(path, model)   write it: under a lock, to a temporary file, renamed when whole
outdated(file)      whether it was made by other code
damage(file)        what is wrong with it; reads its header, and all of it when `thorough`
directory, held     where conversions are, and which there are

At every start `find` compares the size and times of the model's files and a digest of the code that reads weights
with those noted at conversion, the file's length with its header, and the header with its digest. The numbers are
compared with theirs before they are used (`vouched.py`). What does not fit is made again.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from platformdirs import user_cache_path

from engine.config import Config
from engine.errors import clipped
from engine.matrices import Array, widened
from engine.params import ENDS, Ends, Joined, LayerParams, Linear, Norm, Params
from engine.vouched import Vouched, digests
from engine.weight_files import OPENED

LEAST = 16 << 20
"""Bytes of float32 below which a model loads so fast that nothing is kept."""
ALIGNMENT = 64
"""The arrays begin at a multiple of this: a cache line, and the widest vector register."""
_LOADERS = (
    "converted.py", "floats.py", "gguf_file.py", "gguf_tokenizer.py", "library.py", "load.py", "matrices.py",
    "params.py", "scaled.py", "tokenizer.py", "tokenizer_classes.py", "tokenizer_files.py", "vouched.py",
    "weight_files.py", "weights.py", "families/**/*.py",
)  # fmt: skip
"""The code whose changes make a conversion stale; the notes hold what tokenizers say of BOS and EOS, so they count."""
_HEADER_LIMIT = 64 << 20

Notes = dict[str, Any]
"""What loading found out beside the weights, as JSON values: see `load.py`."""
Stamp = list[list[Any]]
"""Name, size and times of each of a model's files."""


@dataclass(frozen=True)
class Conversion:
    """A mapped conversion. `notes` are those that `keep` was given."""

    file: Path
    notes: Notes
    arrays: Mapping[str, Array]
    vouched: Vouched

    def params(self, cfg: Config) -> Params:
        """The weights; reading them brings in their pages. They are compared with their digests from now on."""
        params = Params(_ends(self.arrays), lambda i: _layer(self.arrays, f"{i}.", cfg), cfg.n_layers)
        for layer in range(cfg.n_layers):
            params.layer(layer)
        params.vouched = self.vouched
        self.vouched.look_ahead()
        return params


def directory() -> Path:
    """Where conversions are kept; deleting them frees their space, and the next load makes them again."""
    return user_cache_path("mechscope") / "converted"


def held() -> list[Path]:
    """The conversions that there are."""
    return sorted(directory().glob("*.safetensors"))


def stamp(path: Path) -> Stamp:
    """Name, size and times of everything that is read of a model: its .gguf file, or a directory's files."""
    files = [path] if path.is_file() else sorted({file for pattern in OPENED for file in path.glob(pattern)})
    stats = [(file.name, file.stat()) for file in files]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]


def find(path: Path) -> Conversion | None:
    """The conversion of the model at `path`; None when there is none, or it is stale or damaged."""
    file = _place(path)
    try:
        with file.open("rb") as opened:  # once: another process may put its own in its place
            found, head = _opened(file, opened)
            return found if head["stamp"] == stamp(path) and head["made_by"] == _code() else None
    except _DAMAGED:  # whatever it is, it is no conversion
        return None


def keep(path: Path, before: Stamp, notes: Notes, params: Params, n_layers: int) -> str | None:
    """Write the conversion of the model at `path`, whose files had the stamp `before` when they were read.

    Returns why it was not kept, or None. Another process that is writing it is left alone.
    """
    from filelock import FileLock, Timeout

    file = _place(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=0):
            return _write(file, path, before, notes, dict(_named(params, n_layers)))
    except Timeout:
        return "another process is keeping it"
    except OSError as error:
        return f"the cache directory cannot be written: {error.strerror or error}"


def outdated(file: Path) -> bool:
    """Whether a conversion was made by other code, so that the next load makes it again."""
    try:
        with file.open("rb") as opened:
            return bool(_read_head(opened)[0]["made_by"] != _code())
    except _DAMAGED:
        return False


def damage(file: Path, thorough: bool) -> str | None:
    """What is wrong with a conversion's header and length, when `thorough` with its numbers too; None if nothing is."""
    try:
        with file.open("rb") as opened:
            found, _ = _opened(file, opened)
    except _DAMAGED:
        return "its header is damaged, or its length"
    wrong = found.vouched.damaged() if thorough else []
    return f"the numbers of {clipped(wrong)} are not those that were written" if wrong else None


_DAMAGED = (OSError, ValueError, KeyError, TypeError)
"""What reading a file that is no whole conversion raises."""


# --- the file -----------------------------------------------------------------------------------------------------


def _place(path: Path) -> Path:
    """One file for a model's path: a newer conversion takes the older one's place."""
    real = path.resolve()
    return directory() / f"{real.stem}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}.safetensors"


@cache
def _code() -> str:
    """A digest of the code that reads weights, the library that dequantises included."""
    home, library = Path(__file__).parent, find_spec("gguf")
    files = [file for pattern in _LOADERS for file in sorted(home.glob(pattern))]
    if library is not None and library.origin is not None:
        files.append(Path(library.origin).with_name("quants.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, path: Path, before: Stamp, notes: Notes, arrays: Mapping[str, Array]) -> str | None:
    needed = sum(array.nbytes for array in arrays.values())
    file.unlink(missing_ok=True)  # stale: its room may be needed
    if shutil.disk_usage(file.parent).free < needed + (64 << 20):
        return f"the cache directory has no room for {needed >> 20} MiB"
    temporary = file.with_suffix(".partial")  # of a killed process, too: this one has the lock
    try:
        head = {"stamp": before, "made_by": _code(), "notes": notes, "digests": digests(arrays)}
        with temporary.open("wb") as sink:
            sink.write(_header(head, arrays))
            for array in arrays.values():
                sink.write(np.ascontiguousarray(array).data)
            sink.flush()
            os.fsync(sink.fileno())
        if stamp(path) != before:
            return "its files changed while they were read"
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _header(head: Notes, arrays: Mapping[str, Array]) -> bytes:
    """The header of a safetensors file, padded with spaces so that the data are aligned."""
    table, at = {}, 0
    for name, array in arrays.items():
        table[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(head)
    metadata = {"format": "np", "mechscope": text, "digest": _head_digest(text, table)}
    raw = json.dumps({"__metadata__": metadata} | table).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _head_digest(text: str, table: Mapping[str, Any]) -> str:
    return hashlib.sha256((text + json.dumps(table)).encode()).hexdigest()


def _read_head(opened: BinaryIO) -> tuple[Notes, dict[str, Any], int]:
    """What was noted, the table of arrays, and where they begin. Raises what a damaged header makes of it."""
    size = int.from_bytes(opened.read(8), "little")
    if size > _HEADER_LIMIT:
        raise ValueError("the header is too long")
    table = json.loads(opened.read(size))
    metadata = table.pop("__metadata__")
    if metadata["digest"] != _head_digest(metadata["mechscope"], table):
        raise ValueError("the header is damaged")
    return json.loads(metadata["mechscope"]), table, 8 + size


def _opened(file: Path, opened: BinaryIO) -> tuple[Conversion, Notes]:
    """The conversion in an open file, and its head. Raises what a damaged header makes of it."""
    head, table, start = _read_head(opened)
    if os.fstat(opened.fileno()).st_size != start + max(row["data_offsets"][1] for row in table.values()):
        raise ValueError("the file is cut short, or longer than it was")
    arrays, parts = _mapped(opened, table, start), dict[int, dict[str, Array]]()
    for name, array in arrays.items():
        layer, _, rest = name.partition(".")
        parts.setdefault(int(layer) if rest and layer.isdecimal() else ENDS, {})[name] = array
    return Conversion(file, head["notes"], arrays, Vouched(file, opened.fileno(), parts, head["digests"])), head


def _mapped(opened: BinaryIO, table: Mapping[str, Any], start: int) -> dict[str, Array]:
    whole = np.memmap(opened, np.float32, "r", offset=start).view(np.ndarray)
    return {name: _part(whole, row["data_offsets"][0] // 4, row["shape"]) for name, row in table.items()}


def _part(whole: Array, at: int, shape: list[int]) -> Array:
    return whole[at : at + math.prod(shape)].reshape(shape)


# --- the arrays ---------------------------------------------------------------------------------------------------


def _named(params: Params, n_layers: int) -> Iterator[tuple[str, Array]]:
    """(name, array) of every weight; a tied unembedding is left out."""
    yield "embed", params.embed
    if params.unembed is not params.embed:
        yield "unembed", params.unembed
    norm = params.final_norm
    ends = {"positions": params.positions, "unembed_bias": params.unembed_bias}
    ends |= {} if norm is None else {"final_norm": norm.weight, "final_norm.bias": norm.bias}
    yield from ((name, array) for name, array in ends.items() if array is not None)
    for i in range(n_layers):
        yield from ((f"{i}.{name}", widened(array)) for name, array in params.layer(i).stored())


def _ends(arrays: Mapping[str, Array]) -> Ends:
    embed = arrays["embed"]
    norm = Norm(arrays["final_norm"], arrays.get("final_norm.bias")) if "final_norm" in arrays else None
    return Ends(embed, arrays.get("unembed", embed), norm, arrays.get("positions"), arrays.get("unembed_bias"))


def _layer(arrays: Mapping[str, Array], at: str, cfg: Config) -> LayerParams:
    parts: dict[str, Any] = {}
    for field in fields(LayerParams):
        if (weight := arrays.get(at + field.name)) is not None:
            kind = Norm if field.name.endswith("_norm") else Linear
            parts[field.name] = kind(weight, arrays.get(f"{at}{field.name}.bias"))
    branches = parts["gate_up"].weight.shape[1] // cfg.d_mlp
    parts["qkv"] = Joined.fused(parts["qkv"], *cfg.qkv_widths)
    parts["gate_up"] = Joined.fused(parts["gate_up"], *[cfg.d_mlp] * branches)
    return LayerParams(**parts)
