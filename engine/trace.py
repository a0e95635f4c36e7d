"""Traces on disk: `export_trace` writes activations with a manifest that says what they are, `load_trace` checks them.

A trace is a directory with `trace.safetensors` and `manifest.json`; docs/guides/traces.md describes the manifest, whose
JSON Schema is docs/trace-manifest.schema.json. `VERSION` grows when a reader of the old form would misread the new one.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from engine.decoder import Tick, forward
from engine.errors import DamagedFile, InputError, PromptError, clipped
from engine.hooks import RecordHook
from engine.network import Network, Tokens
from engine.ops import Array
from engine.points import ONCE
from engine.points import point as point_named

SCHEMA, VERSION = "mechscope.trace", 1
MANIFEST, TENSORS = "manifest.json", "trace.safetensors"


@dataclass(frozen=True)
class StoredTrace:
    """A trace read back: its manifest, and {(point, layer): array without a batch axis}."""

    manifest: dict[str, Any]
    tensors: dict[tuple[str, int], Array]


def export_trace(
    model: Network,
    prompt: str | Tokens,
    points: Iterable[str],
    path: str | Path,
    layers: Iterable[int] | None = None,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Run one prompt and write the arrays at `points` of `layers` (all by default) to a new directory.

    Returns the manifest. The directory appears whole or not at all. Raises `InputError` if it is there already.
    """
    target = Path(path)
    if target.exists():
        raise InputError(f"{target} exists already; give a path that does not")
    names = list(dict.fromkeys(point_named(name).name for name in points))
    if not names:
        raise InputError("points is empty; name at least one point")
    ids = model.token_batch(model.encode(prompt))
    if len(ids) != 1:
        raise PromptError(f"a trace holds one prompt, not {len(ids)}")
    chosen = model.resolve_layers(range(model.config.n_layers) if layers is None else layers)
    record = RecordHook.for_layers(chosen, points=names)
    forward(model, ids.tolist(), hook=record, logits_at="none", tick=tick)
    tensors = {(name, layer): array for name in names for layer, array in record.get(name).items()}
    manifest = {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "producer": _producer(),
        "environment": _environment(),
        "model": _described(model),
        "prompt": {"text": prompt if isinstance(prompt, str) else None, "ids": ids[0].tolist()},
        "tensors": [_entry(name, layer, array) for (name, layer), array in tensors.items()],
    }
    _write(target, manifest, {_key(*place): array for place, array in tensors.items()})
    return manifest


def load_trace(path: str | Path) -> StoredTrace:
    """Read a trace; raises `DamagedFile` unless every tensor is the one that the manifest describes."""
    from safetensors.numpy import load_file

    folder = Path(path)
    manifest = _manifest(folder)
    try:
        found = load_file(folder / TENSORS)
    except Exception as error:  # the library's own error, or the file system's
        raise DamagedFile(f"{folder / TENSORS} cannot be read: {str(error)[:200]}") from None
    entries = manifest["tensors"]
    if sorted(found) != sorted(entry["name"] for entry in entries):
        raise DamagedFile(f"{folder / TENSORS} does not hold the tensors that {MANIFEST} lists")
    for entry in entries:
        if _entry(entry["point"], entry["layer"], found[entry["name"]]) != entry:
            raise DamagedFile(f"{folder / TENSORS}: {clipped(entry['name'])} is not the tensor that was written")
    return StoredTrace(manifest, {(e["point"], e["layer"]): found[e["name"]] for e in entries})


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{folder / MANIFEST} cannot be read: {str(error)[:200]}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise DamagedFile(f"{folder / MANIFEST} is not the manifest of a trace")
    if manifest.get("version") != VERSION:
        raise DamagedFile(
            f"{folder / MANIFEST} has version {clipped(manifest.get('version'))}; this mechscope reads {VERSION}"
        )
    entries = manifest.get("tensors")
    fields = {"name": str, "point": str, "layer": int}
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in fields.items())
        for entry in entries
    ):
        raise DamagedFile(f"{folder / MANIFEST} does not list its tensors")
    return manifest


def _entry(point: str, layer: int, array: Array) -> dict[str, Any]:
    """What the manifest says of a tensor; the sha256 is of its little-endian bytes in C order."""
    stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "name": _key(point, layer),
        "point": point,
        "layer": layer,
        "axes": [axis for axis in point_named(point).axes if axis != "batch"],
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
    }


def _key(point: str, layer: int) -> str:
    return point if point in ONCE else f"{point}.{layer}"


def _described(model: Network) -> dict[str, Any]:
    sizes = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab")
    return {
        "name": model.name,
        "family": model.config.family,
        "fingerprint": model.fingerprint,
        "weights": model.weights,
        "synthetic": model.synthetic,
        "sizes": {name: getattr(model.config, name) for name in sizes},
    }


def _producer() -> dict[str, str]:
    from importlib.metadata import version

    return {"name": "mechscope", "version": version("mechscope")}


def _environment() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "safetensors": version("safetensors"),
        "system": platform.system(),
        "machine": platform.machine(),
        "byteorder": sys.byteorder,
    }


def _write(target: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Both files into a folder beside the target, which then takes its name."""
    from safetensors.numpy import save_file

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / TENSORS)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        folder.chmod(0o755)
        folder.rename(target)
    except Exception as error:  # the library's own error, or the file system's
        raise InputError(f"{target} cannot be written: {str(error)[:200]}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already when it has taken the target's name
