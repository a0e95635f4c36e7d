"""`load_model`: a name, directory, .gguf file or hub id -> `Model`."""

from pathlib import Path
from typing import Any

from engine import catalog, gguf_tokenizer, tokenizer
from engine.config import Config
from engine.decoder import Tick
from engine.errors import DamagedFile, InputError, ModelError, UnknownModel, clipped
from engine.families import Family, family, part_read
from engine.families._gguf import GgufTensors, config_json
from engine.gguf_file import GgufFile
from engine.model import Model
from engine.params import Params
from engine.planted import planted
from engine.synthetic import synthetic
from engine.weights import Counted, SafetensorsDir, Tensors, read_json

WEIGHTS = ("dense", "scoped")


def load_model(
    model: str | Path, weights: str = "dense", tick: Tick | None = None, progress: catalog.Progress | None = None
) -> Model:
    """Load a model for study.

    `model` is a catalogue name, "synthetic", a planted circuit such as "synthetic:induction", a directory with
    config.json and safetensors, a .gguf file, or a hub id. `weights`: "dense" keeps float32 in memory; "scoped" keeps
    the file's form and makes one layer dense at a time. `progress` follows a download, `tick` the layers. Raises
    `ModelError`s.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights is {clipped(weights)}; valid: {', '.join(WEIGHTS)}")
    if (name := str(model)) == catalog.SYNTHETIC:
        return synthetic()
    if name.startswith(f"{catalog.SYNTHETIC}:"):
        return planted(name.removeprefix(f"{catalog.SYNTHETIC}:"))
    path = catalog.locate(str(model), progress)
    name = _name(str(model), path)
    try:
        return _from_directory(path, name, weights, tick) if path.is_dir() else _from_gguf(path, name, weights, tick)
    except MemoryError:
        hint = (
            'load it with weights="scoped", or choose a smaller model' if weights == "dense" else "choose a smaller one"
        )
        raise ModelError(f"there is not enough memory for {name}; {hint}") from None
    except OSError as error:
        at = Path(error.filename).name if isinstance(error.filename, str) else path.name
        raise DamagedFile(f"{at} cannot be read: {error.strerror or error}") from None


def _name(asked: str, path: Path) -> str:
    if asked in catalog.CATALOGUE:
        return asked
    if path.is_dir():
        found = Path(asked) if catalog.is_hub_id(asked) and not Path(asked).is_dir() else path.resolve()
        return found.name.lower()
    return path.stem.lower()


def _from_directory(path: Path, name: str, weights: str, tick: Tick | None) -> Model:
    if not (path / "config.json").exists():
        raise UnknownModel(f"{path} has no config.json; give a directory as Hugging Face writes it, or a .gguf file")
    raw = read_json(path / "config.json")
    raw.pop("gguf", None)  # readers take it for the mark of a GGUF file
    if raw.get("auto_map"):
        raise UnknownModel(f"{path.name} needs code of its own (auto_map in config.json); code in models is never run")
    reader = family(raw.get("model_type"))
    tensors = SafetensorsDir(path)
    words = tokenizer.from_directory(path, raw)
    return _assembled(name, reader, raw, tensors, words, tensors.files, weights, tick)


def _from_gguf(path: Path, name: str, weights: str, tick: Tick | None) -> Model:
    file = GgufFile.open(path)
    raw = config_json(file)
    words = gguf_tokenizer.from_gguf(file.metadata)
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
    source = Counted(part_read(reader, tensors))
    params = Params(reader.ends(source, cfg, raw), lambda i: reader.layer(source, i, cfg, raw), _kept(cfg, weights))
    for layer in range(cfg.n_layers):  # scoped models too: a file that lacks a tensor fails here, not mid-run
        if tick is not None:
            tick(layer, cfg.n_layers, f"reading layer {layer}")
        params.layer(layer)
    source.check_all_read()
    return Model(name, cfg, params, words, catalog.sha256(sorted(files)), weights)


def _kept(cfg: Config, weights: str) -> int:
    return cfg.n_layers if weights == "dense" else 1
