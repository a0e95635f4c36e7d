"""`load_model`: a name, directory, .gguf file or hub id -> `Model`."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engine import catalog, fast, gguf_tokenizer, tokenizer, tokenizer_files
from engine.converted import LEAST, Conversion, Stamp, find, keep, stamp
from engine.decoder import Tick
from engine.errors import (
    DamagedConversion,
    DamagedFile,
    EngineError,
    InputError,
    ModelError,
    TokenError,
    UnknownModel,
    clipped,
)
from engine.families import Family, family, part_read, prefix
from engine.families._gguf import GgufTensors, config_json
from engine.gguf_file import GgufFile
from engine.heap import keep_freed_memory
from engine.matrices import Packed
from engine.model import Model
from engine.network import ROUNDED
from engine.params import LayerParams, Params, in_bfloat16, in_panels
from engine.planted import planted
from engine.progress import Follower, following
from engine.scaled import dequantised
from engine.synthetic import synthetic
from engine.weight_files import weight_files
from engine.weights import Counted, Prefixed, Safetensors, Tensors, read_json

WEIGHTS = ("dense", "scoped", "packed", "bf16")

Room = Callable[[int], None]
"""Called with bytes that are about to be taken; raises to refuse them."""


def load_model(
    model: str | Path,
    weights: str = "dense",
    tick: Tick | None = None,
    progress: catalog.Progress | Literal[False] | None = None,
    dense_layers: int | None = None,
    converted: bool = True,
    room: Room | None = None,
) -> Model:
    """Load a model for study.

    `model` is a catalogue name, "synthetic", a planted circuit such as "synthetic:induction", a directory with
    config.json and safetensors, a .gguf file, or a hub id. `weights`: "dense" keeps float32 in memory; "scoped" leaves
    the file as it is, memory-mapped, and makes a layer dense when it runs; "packed" keeps the matrices of a .gguf file
    in its blocks: equal numbers in a fifth to two fifths of the memory, for the `fast` extra; "bf16" rounds the layers'
    matrices to bfloat16: half the memory, other numbers, and a fingerprint that says so. `dense_layers` is the budget
    of "scoped": how many layers stay dense, 1 if left out. `progress` follows a download, `tick` the layers; without
    either a load that takes long says on stderr what it does, and `progress=False` silences it.
    `converted` lets a dense model's weights be kept as float32 in the cache directory, so that the next start maps them
    and reads nothing (`converted.py`); `Model.conversion` says what came of it. `room` is asked for the bytes of dense
    weights before most are read, or any of mapped ones. Raises `ModelError`s, and `InputError` for arguments.
    """
    keep_freed_memory()
    with following(f"loading {model}", tick, progress) as told:
        fast.prepare(told.say)
        try:
            return _read(model, weights, told, dense_layers, converted, room)
        except DamagedConversion as error:
            warnings.warn(str(error), stacklevel=2)
            return _read(model, weights, told, dense_layers, converted, room)


def _read(
    model: str | Path, weights: str, told: Follower, dense_layers: int | None, converted: bool, room: Room | None
) -> Model:
    try:
        made = _loaded(model, weights, told.tick, told.progress, dense_layers, converted, room)
        return _laid_out(made, weights, told.tick)
    except MemoryError:
        hint = 'load it with weights="packed" (a .gguf file) or "scoped", or choose a smaller model'
        hint = "choose a smaller one" if weights in ("scoped", "packed") else hint
        raise ModelError(f"there is not enough memory for {_name(str(model), Path(model))}; {hint}") from None


def _laid_out(made: Model, weights: str, tick: Tick | None) -> Model:
    """Rounded if that is asked for; in panels if kernels are in use. A scoped layer is not worth it for one pass."""
    n, kernels = made.config.n_layers, fast.kernels()

    def told(what: str) -> Callable[[int], None]:
        return lambda layer: None if tick is None else tick(layer + 1, n, f"{what} layer {layer}")

    if weights == "scoped" or (kernels is None and weights != "bf16"):
        return made
    if weights == "bf16":
        params = in_bfloat16(made.params, n, told("rounding"))
        made = replace(made, params=params, weights="bf16", fingerprint=f"{made.fingerprint}{ROUNDED}")
    if kernels is None:
        return made
    return replace(made, params=in_panels(made.params, n, kernels.WIDTH, told("laying out")))


def _loaded(
    model: str | Path,
    weights: str,
    tick: Tick | None,
    progress: catalog.Progress | None,
    dense_layers: int | None,
    converted: bool,
    room: Room | None,
) -> Model:
    """As its files have it: dense, scoped or packed."""
    budget = layer_budget(weights, dense_layers)
    if (name := str(model)).split(":", 1)[0] == catalog.SYNTHETIC and dense_layers is not None:
        raise InputError("synthetic models have no file, so their weights are always dense; leave dense_layers out")
    if weights == "packed":
        _check_for_blocks(name)
    if name == catalog.SYNTHETIC:
        return synthetic()
    if name.startswith(f"{catalog.SYNTHETIC}:"):
        return planted(name.removeprefix(f"{catalog.SYNTHETIC}:"))
    converted = converted and weights in ("dense", "bf16")
    path, conversion = _located(str(model), progress, converted)
    name = _name(str(model), path)
    try:
        if conversion is not None:
            return _from_conversion(conversion, path, name, tick, room)
        before = stamp(path)
        read = (_from_directory if path.is_dir() else _from_gguf)(path, name, weights, budget, tick, room)
        return _kept(read, path, before, tick) if converted else read.model
    except OSError as error:
        at = Path(error.filename).name if isinstance(error.filename, str) else path.name
        raise DamagedFile(f"{at} cannot be read: {error.strerror or error}") from None


def layer_budget(weights: str, dense_layers: int | None) -> int | None:
    """How many layers may be dense at a time; None for all of them. Raises `InputError`."""
    if weights not in WEIGHTS:
        raise InputError(f"weights is {clipped(weights)}; valid: {', '.join(WEIGHTS)}")
    if dense_layers is None:
        return 1 if weights == "scoped" else None
    if weights != "scoped":
        raise InputError(f'dense_layers is for weights="scoped"; in "{weights}" every layer stays dense: leave it out')
    if isinstance(dense_layers, bool) or not isinstance(dense_layers, int) or dense_layers < 1:
        raise InputError(f"dense_layers is {clipped(dense_layers)}; it must be a whole number of at least 1")
    return dense_layers


def _check_for_blocks(asked: str) -> None:
    """Raise `InputError` for what is no .gguf file, before any of it is fetched."""
    here = catalog.in_place(asked)
    other = catalog.is_hub_id(asked) if here is None else here.is_dir()
    if other or asked.split(":", 1)[0] == catalog.SYNTHETIC:
        raise InputError(
            f'weights="packed" keeps the blocks of a .gguf file, and {clipped(asked)} is none; choose "dense" or "bf16"'
        )


def _name(asked: str, path: Path) -> str:
    if asked in catalog.CATALOGUE:
        return asked
    if path.is_dir():
        found = Path(asked) if catalog.is_hub_id(asked) and not Path(asked).is_dir() else path.resolve()
        return found.name.lower()
    return path.stem.lower()


def _located(asked: str, progress: catalog.Progress | None, converted: bool) -> tuple[Path, Conversion | None]:
    """Where a model is, and its conversion: one that fits its files vouches for them, so they are not read again."""
    here = catalog.in_place(asked) if converted else None
    if here is not None and (conversion := find(here)) is not None:
        return here, conversion
    path = catalog.locate(asked, progress)
    return path, find(path) if converted and path != here else None


@dataclass(frozen=True)
class _AsFiled:
    """A model as its files have it, and its config.json."""

    model: Model
    raw: dict[str, Any]


def _kept(read: _AsFiled, path: Path, before: Stamp, tick: Tick | None) -> Model:
    """The model, its converted weights kept for the next start."""
    model, n = read.model, read.model.config.n_layers
    if model.params.nbytes < LEAST:
        return model
    if tick is not None:
        tick(n, n, "keeping the converted weights")
    words = model.tokenizer
    notes = {
        "config": read.raw,
        "fingerprint": model.fingerprint,
        "vocabulary": words.vocabulary,
        "bos": words.bos,
        "eos": words.eos,
    }
    why_not = keep(path, before, notes, model.params, n)
    return replace(model, conversion="made" if why_not is None else f"not kept: {why_not}")


def _from_conversion(conversion: Conversion, path: Path, name: str, tick: Tick | None, room: Room | None) -> Model:
    notes = conversion.notes
    raw, known = notes["config"], stamp(path)
    cfg = family(raw["model_type"]).config(raw)
    if tick is not None:
        tick(0, cfg.n_layers, "mapping the converted weights")

    def words() -> tokenizer.Tokenizer:
        if stamp(path) != known:
            raise DamagedFile(f"{path.name} has changed since it was loaded; load the model again")
        return _words(path, raw, None if path.is_dir() else GgufFile.open(path))

    backend = tokenizer.Deferred(words, notes["vocabulary"])
    told = tokenizer.Tokenizer(backend, notes["bos"], notes["eos"], lambda: backend.words.chat_template)
    params = conversion.params(cfg)
    if room is not None:
        room(params.nbytes)
    left = weight_files(path, raw).left_aside if path.is_dir() else ()
    return Model(name, cfg, params, told, notes["fingerprint"], "dense", conversion="used", left_aside=left)


def _from_directory(
    path: Path, name: str, weights: str, budget: int | None, tick: Tick | None, room: Room | None
) -> _AsFiled:
    if not (path / "config.json").exists():
        raise UnknownModel(f"{path} has no config.json; {_instead(path)}")
    raw = read_json(path / "config.json")
    raw.pop("gguf", None)  # readers take it for the mark of a GGUF file
    _refuse_code(path, "config.json", raw)
    if (path / "tokenizer_config.json").exists():
        _refuse_code(path, "tokenizer_config.json", read_json(path / "tokenizer_config.json"))
    reader = family(raw.get("model_type"))
    files = weight_files(path, raw)
    tensors, words = dequantised(Safetensors(files.read), raw), _words(path, raw, None)
    read = _assembled(name, weights, reader, raw, [tensors], words, files.read, budget, tick, room)
    return replace(read, model=replace(read.model, left_aside=files.left_aside))


def _instead(path: Path) -> str:
    if (path / "adapter_config.json").exists():
        return "it holds an adapter: merge it into its model, and load what that saves"
    return "give a directory as Hugging Face writes it, or a .gguf file"


def _refuse_code(path: Path, file: str, settings: dict[str, Any]) -> None:
    if settings.get("auto_map"):
        raise UnknownModel(f"{path.name} needs code of its own (auto_map in {file}); code in models is never run")


def _from_gguf(
    path: Path, name: str, weights: str, budget: int | None, tick: Tick | None, room: Room | None
) -> _AsFiled:
    file = GgufFile.open(path)
    raw = config_json(file)
    words = _words(path, raw, file)
    tensors = GgufTensors(file, raw)
    sources = [tensors, *(tensors.steps() if weights == "packed" else ())]
    return _assembled(name, weights, family(raw["model_type"]), raw, sources, words, [path], budget, tick, room)


def _words(path: Path, raw: dict[str, Any], file: GgufFile | None) -> tokenizer.Tokenizer:
    """The tokenizer of a GGUF file, or of a directory when `file` is None."""
    if file is None:
        return _tried(lambda: tokenizer_files.from_directory(path, raw))
    return _tried(lambda: gguf_tokenizer.from_gguf(file.metadata))


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
    weights: str,
    reader: Family,
    raw: dict[str, Any],
    sources: Sequence[Tensors],
    words: tokenizer.Tokenizer,
    files: list[Path],
    budget: int | None,
    tick: Tick | None,
    room: Room | None,
) -> _AsFiled:
    """The model; `sources` has its tensors, and for packed weights what has their scales and what their minima."""
    cfg = reader.config(raw)
    keep = cfg.n_layers if budget is None else budget
    if keep > cfg.n_layers:
        raise InputError(f"dense_layers is {keep}, but {name} has {cfg.n_layers} layers; valid: 1 to {cfg.n_layers}")
    counted, *steps = Counted(part_read(reader, sources[0])), *sources[1:]
    source = Prefixed(counted, "" if raw.get("gguf") else prefix(reader))

    def layer_of(i: int) -> LayerParams:
        dense = reader.layer(source, i, cfg, raw)
        return dense.packed_by(*(reader.layer(part, i, cfg, raw) for part in steps)) if steps else dense

    ends = reader.ends(source, cfg, raw)
    if steps:
        ends = ends.packed_by(*(reader.ends(part, cfg, raw) for part in steps))
    params = Params(ends, layer_of, keep)
    for layer in range(cfg.n_layers):  # scoped models too: a file that lacks a tensor fails here, not mid-run
        if tick is not None:
            tick(layer + 1, cfg.n_layers, f"reading layer {layer}")
        params.layer(layer)
        if layer == 0 and room is not None:
            room(params.nbytes + (keep - 1) * sum(array.nbytes for _, array in params.layer(0).stored()))
    counted.check_all_read()
    if steps and not any(isinstance(part, Packed) for i in range(keep) for _, part in params.layer(i).stored()):
        raise InputError(f'no matrix of {name}\'s layers is in blocks that weights="packed" keeps; choose "dense"')
    kept = "dense" if weights == "bf16" else weights  # it is rounded afterwards
    return _AsFiled(Model(name, cfg, params, words, catalog.sha256(sorted(files)), kept), raw)
