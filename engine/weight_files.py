"""Which files of a directory are its model's weights: `weight_files`.

The choice is that of transformers 5 (modeling_utils.py, `_get_resolved_checkpoint_files`), because a directory may hold
several models: the file that config.json names, or model.safetensors, or the shards of model.safetensors.index.json.
Where there is neither, a whole set of shards is read without its index; transformers asks for the index then.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DamagedFile, UnknownModel, clipped
from engine.weights import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

OPENED = ("*.safetensors", "*.json", "*.jinja", "additional_chat_templates/*.jinja")
"""What is opened of a model's directory."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The files that are read, sorted, and the names of those that lie beside them and are not."""

    read: list[Path]
    left_aside: tuple[str, ...]


def weight_files(directory: Path, raw: Mapping[str, Any]) -> WeightFiles:
    """The weights of the model in a directory; `raw` is its config.json.

    Raises `UnknownModel` when there are none in safetensors, `DamagedFile` when some are missing.
    """
    names = named_weights(directory, raw) or _without_index(directory)
    beside = {path.name for pattern in _WEIGHTS for path in directory.glob(pattern)}
    if missing := sorted(names - beside):
        raise DamagedFile(f"the weights {clipped(missing, 200)} are not in {directory}; download the missing shards")
    return WeightFiles([directory / name for name in sorted(names)], tuple(sorted(beside - names)))


def named_weights(directory: Path, raw: Mapping[str, Any]) -> set[str]:
    """The names of the weights by config.json, model.safetensors or its index, there or not; empty without any."""
    start = raw.get("transformers_weights")
    if start is None:
        start = next((name for name in (SINGLE, INDEX) if (directory / name).is_file()), None)
    if start is None:
        return set()
    stem = _plain(str(start).removesuffix(_OF_AN_INDEX))
    return {stem} if stem == start else {_plain(name) for name in _weight_map(directory / f"{stem}{_OF_AN_INDEX}")}


_OF_AN_INDEX = ".index.json"


def _plain(name: object) -> str:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise DamagedFile(f"{clipped(name)} is named as weights; these must be .safetensors files of the directory")
    return name


def _weight_map(index: Path) -> Iterable[object]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFile(f"{index.name} has no weight_map")
    return weight_map.values()


def _without_index(directory: Path) -> set[str]:
    """All the shards that the names of those that are there imply."""
    shards = [match for path in directory.glob("*.safetensors") if (match := _SHARD.fullmatch(path.name))]
    if not shards:
        raise _none(directory)
    (width, count), *others = {(len(shard[1]), shard[2]) for shard in shards}
    if others or not len(shards) <= int(count) <= _MOST_SHARDS:
        raise DamagedFile(f"{directory} holds shards of several sets and no {INDEX}; download it")
    return {f"model-{i + 1:0{width}}-of-{count}.safetensors" for i in range(int(count))}


_MOST_SHARDS = 10_000


def _none(directory: Path) -> UnknownModel:
    """Why there is nothing to read."""
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return UnknownModel(
            f"{directory} has neither {SINGLE} nor {INDEX}, only {clipped(others, 200)}; if one of these files is the "
            f"whole model, rename it to {SINGLE}"
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    found = f" (there are pickles, {', '.join(pickles[:3])}: loading one can run any code)" if pickles else ""
    return UnknownModel(f"{directory} has no .safetensors file{found}; convert the weights to safetensors")
