"""`load_model`: a name, directory, .gguf file or hub id -> `Model`."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import catalog, gguf_tokenizer, tokenizer
from engine.decoder import Tick
from engine.errors import DamagedFile, EngineError, InputError, ModelError, TokenError, UnknownModel, clipped
from engine.families import Family, family, part_read
from engine.families._gguf import GgufTensors, config_json
from engine.gguf_file import GgufFile
from engine.model import Model
from engine.params import Params
from engine.planted import planted
from engine.synthetic import synthetic
from engine.weights import Counted, SafetensorsDir, Tensors, read_json

WEIGHTS = ("dense", "scoped")

Room = Callable[[int], None]
"""Called with bytes that are about to be taken; raises to refuse them."""


def load_model(
    model: str | Path,
    weights: str = "dense",
    tick: Tick | None = None,
    progress: catalog.Progress | None = None,
    dense_layers: int | None = None,
    room: Room | None = None,
) -> Model:
    """Load a model for study.

    `model` is a catalogue name, "synthetic", a planted circuit such as "synthetic:induction", a directory with
    config.json and safetensors, a .gguf file, or a hub id. `weights`: "dense" keeps float32 in memory; "scoped" leaves
    the file as it is, memory-mapped, and makes a layer dense when it runs. `dense_layers` is the budget of "scoped":
    how many layers stay dense, 1 if left out. `progress` follows a download, `tick` the layers; `room` is asked for the
    bytes of dense weights before most of them are read. Raises `ModelError`s, and `InputError` for arguments.
    """
    budget = layer_budget(weights, dense_layers)
    if (name := str(model)).split(":", 1)[0] == catalog.SYNTHETIC and dense_layers is not None:
        raise InputError("synthetic models have no file, so their weights are always dense; leave dense_layers out")
    if name == catalog.SYNTHETIC:
        return synthetic()
    if name.startswith(f"{catalog.SYNTHETIC}:"):
        return planted(name.removeprefix(f"{catalog.SYNTHETIC}:"))
    path = catalog.locate(str(model), progress)
    name = _name(str(model), path)
    try:
        return (_from_directory if path.is_dir() else _from_gguf)(path, name, budget, tick, room)
    except MemoryError:
        hint = (
            'load it with weights="scoped", or choose a smaller model' if weights == "dense" else "choose a smaller one"
        )
        raise ModelError(f"there is not enough memory for {name}; {hint}") from None
    except OSError as error:
        at = Path(error.filename).name if isinstance(error.filename, str) else path.name
        raise DamagedFile(f"{at} cannot be read: {error.strerror or error}") from None


def layer_budget(weights: str, dense_layers: int | None) -> int | None:
    """How many layers may be dense at a time; None for all of them. Raises `InputError`."""
    if weights not in WEIGHTS:
        raise InputError(f"weights is {clipped(weights)}; valid: {', '.join(WEIGHTS)}")
    if dense_layers is None:
        return None if weights == "dense" else 1
    if weights == "dense":
        raise InputError('dense_layers is for weights="scoped"; in "dense" every layer stays dense: leave it out')
    if isinstance(dense_layers, bool) or not isinstance(dense_layers, int) or dense_layers < 1:
        raise InputError(f"dense_layers is {clipped(dense_layers)}; it must be a whole number of at least 1")
    return dense_layers


def _name(asked: str, path: Path) -> str:
    if asked in catalog.CATALOGUE:
        return asked
    if path.is_dir():
        found = Path(asked) if catalog.is_hub_id(asked) and not Path(asked).is_dir() else path.resolve()
        return found.name.lower()
    return path.stem.lower()


def _from_directory(path: Path, name: str, budget: int | None, tick: Tick | None, room: Room | None) -> Model:
    if not (path / "config.json").exists():
        raise UnknownModel(f"{path} has no config.json; give a directory as Hugging Face writes it, or a .gguf file")
    raw = read_json(path / "config.json")
    raw.pop("gguf", None)  # readers take it for the mark of a GGUF file
    _refuse_code(path, "config.json", raw)
    if (path / "tokenizer_config.json").exists():
        _refuse_code(path, "tokenizer_config.json", read_json(path / "tokenizer_config.json"))
    reader = family(raw.get("model_type"))
    tensors = SafetensorsDir(path)
    words = _tried(lambda: tokenizer.from_directory(path, raw))
    return _assembled(name, reader, raw, tensors, words, tensors.files, budget, tick, room)


def _refuse_code(path: Path, file: str, settings: dict[str, Any]) -> None:
    if settings.get("auto_map"):
        raise UnknownModel(f"{path.name} needs code of its own (auto_map in {file}); code in models is never run")


def _from_gguf(path: Path, name: str, budget: int | None, tick: Tick | None, room: Room | None) -> Model:
    file = GgufFile.open(path)
    raw = config_json(file)
    words = _tried(lambda: gguf_tokenizer.from_gguf(file.metadata))
    return _assembled(name, family(raw["model_type"]), raw, GgufTensors(file, raw), words, [path], budget, tick, room)


_TRIAL = "The 12 \t\n(é ☃ \U0001f642)"


def _tried(read: Callable[[], tokenizer.Tokenizer]) -> tokenizer.Tokenizer:
    """The tokenizer, once it has encoded and decoded a text.

    Raises `DamagedFile`: on damaged files the `tokenizers` library may fail only when it is used, and may panic, which
    is an exception beside `Exception`.
    """
    try:
        words = read()
        with suppress(TokenError):  # a vocabulary without these bytes is no damage
            words.decode(words.encode(_TRIAL))
    except (EngineError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DamagedFile(f"the tokenizer cannot be used: {str(error)[:200]}; fetch it again") from None
    return words


def _assembled(
    name: str,
    reader: Family,
    raw: dict[str, Any],
    tensors: Tensors,
    words: tokenizer.Tokenizer,
    files: list[Path],
    budget: int | None,
    tick: Tick | None,
    room: Room | None,
) -> Model:
    cfg = reader.config(raw)
    if words.vocabulary > cfg.d_vocab:
        raise DamagedFile(f"the tokenizer has {words.vocabulary} tokens, the model only {cfg.d_vocab} embeddings")
    keep = cfg.n_layers if budget is None else budget
    if keep > cfg.n_layers:
        raise InputError(f"dense_layers is {keep}, but {name} has {cfg.n_layers} layers; valid: 1 to {cfg.n_layers}")
    source = Counted(part_read(reader, tensors))
    params = Params(reader.ends(source, cfg, raw), lambda i: reader.layer(source, i, cfg, raw), keep)
    for layer in range(cfg.n_layers):  # scoped models too: a file that lacks a tensor fails here, not mid-run
        if tick is not None:
            tick(layer, cfg.n_layers, f"reading layer {layer}")
        params.layer(layer)
        if layer == 0 and room is not None:
            room(params.nbytes + (keep - 1) * sum(array.nbytes for _, array in params.layer(0).arrays()))
    source.check_all_read()
    kept = "dense" if budget is None else "scoped"
    return Model(name, cfg, params, words, catalog.sha256(sorted(files)), kept)
