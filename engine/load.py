"""`load_model`: a name, directory, .gguf file or hub id -> `Model`."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import catalog, tokenizer
from engine.config import Config
from engine.decoder import Tick
from engine.errors import DamagedFile, InputError, UnknownModel
from engine.families import Family, family
from engine.families._gguf import GgufTensors, config_json
from engine.gguf_file import GgufFile
from engine.model import Model
from engine.params import LayerParams, Params
from engine.synthetic import synthetic
from engine.weights import SafetensorsDir, Tensors, read_json

WEIGHTS = ("dense", "scoped")


def load_model(
    model: str | Path, weights: str = "dense", tick: Tick | None = None, progress: catalog.Progress | None = None
) -> Model:
    """Load a model for study.

    `model` is a catalogue name, "synthetic", a directory with config.json and safetensors, a .gguf file, or a hub
    id. `weights`: "dense" keeps float32 in memory; "scoped" keeps the file's form and makes one layer dense at a
    time. `progress` follows a download, `tick` the layers. Raises `ModelError`s.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights is {weights!r}; valid: {', '.join(WEIGHTS)}")
    if str(model) == catalog.SYNTHETIC:
        return synthetic()
    path = catalog.locate(str(model), progress)
    if path.is_dir():
        return _from_directory(path, weights, tick)
    return _from_gguf(path, _name(str(model), path), weights, tick)


def _name(asked: str, path: Path) -> str:
    return asked if asked in catalog.CATALOGUE else path.stem.lower()


def _from_directory(path: Path, weights: str, tick: Tick | None) -> Model:
    if not (path / "config.json").exists():
        raise UnknownModel(f"{path} has no config.json; give a directory as Hugging Face writes it, or a .gguf file")
    raw = read_json(path / "config.json")
    if raw.get("auto_map"):
        raise UnknownModel(f"{path.name} needs code of its own (auto_map in config.json); code in models is never run")
    reader = family(raw.get("model_type"))
    tensors = SafetensorsDir(path)
    words = tokenizer.from_directory(path, raw)
    return _assembled(path.resolve().name.lower(), reader, raw, tensors, words, tensors.files, weights, tick)


def _from_gguf(path: Path, name: str, weights: str, tick: Tick | None) -> Model:
    file = GgufFile.open(path)
    raw = config_json(file)
    words = tokenizer.from_gguf(file.metadata)
    return _assembled(name, family(raw["model_type"]), raw, GgufTensors(file, raw), words, [path], weights, tick)


def _assembled(
    name: str,
    reader: Family,
    raw: dict[str, Any],
    tensors: Tensors,
    words: tokenizer.Tokenizer,
    files: list[Path],
    weights: str,
    tick: Tick | None,
) -> Model:
    cfg = reader.config(raw)
    if words.vocabulary > cfg.d_vocab:
        raise DamagedFile(f"the tokenizer has {words.vocabulary} tokens, the model only {cfg.d_vocab} embeddings")
    params = Params(*reader.ends(tensors, cfg), _layer_reader(reader, tensors, cfg), _kept(cfg, weights))
    for layer in range(cfg.n_layers):  # scoped models too: a file that lacks a tensor fails here, not mid-run
        if tick is not None:
            tick(layer, cfg.n_layers, f"reading layer {layer}")
        params.layer(layer)
    return Model(name, cfg, params, words, _sha256(files), weights)


def _layer_reader(reader: Family, tensors: Tensors, cfg: Config) -> Callable[[int], LayerParams]:
    return lambda layer: reader.layer(tensors, layer, cfg)


def _kept(cfg: Config, weights: str) -> int:
    return cfg.n_layers if weights == "dense" else 1


def _sha256(files: list[Path]) -> str:
    """Of the weights files' bytes, one after the other in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
