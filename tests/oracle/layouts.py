"""Directories as they lie about: both sides read the same files of one, or both refuse it.

Names of tensors without the base model's prefix, in every row of `tests/families.py`; weights beside the model's own.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import families
import numpy as np
import torch
from oracle.families import reference, save_tokenizer
from oracle.measure import Measure, Result, distance
from oracle.reference import Array
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import forward, load_model
from engine.errors import EngineError

IDS = np.random.default_rng(1).integers(0, 256, 24).tolist()
SAME = 1e-5
"""Relative, of logits: other weights are a whole unit away."""

PREFIX = {"gpt2": "transformer.", "gpt_neo": "transformer.", "gpt_neox": "gpt_neox."}

Tensors = dict[str, torch.Tensor]


def layouts_agree() -> Iterator[Result]:
    """Names without prefix in every row, and every layout of files."""
    yield from (_bare(row) for row in families.ROWS)
    yield from (_laid_out(name, lay) for name, lay in LAYOUTS.items())


def _bare(row: str) -> Result:
    prefix = PREFIX.get(families.ROWS[row]["model_type"], "model.")
    with tempfile.TemporaryDirectory() as scratch:
        at = saved(Path(scratch) / "model", row)
        expected = theirs(at)
        _renamed(at, lambda name: name.removeprefix(prefix))
        both = distance(theirs(at), expected), distance(ours(at), expected)
    return Result("layouts", f"{row}: names without {prefix}", Measure(max(both), SAME, 2), 1.0)


def _renamed(at: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(name): tensor for name, tensor in load_file(at / "model.safetensors").items()}
    save_file(tensors, at / "model.safetensors")


def saved(at: Path, row: str, seed: int = 0) -> Path:
    """A row's model by transformers, in one file; another seed is another model."""
    model, _ = reference(row, torch.float32)
    assert isinstance(model, PreTrainedModel)
    if seed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.flip(0))
    model.save_pretrained(at)
    save_tokenizer(at)
    return at


def theirs(at: Path) -> Array:
    model, info = AutoModelForCausalLM.from_pretrained(
        at, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if info["missing_keys"]:
        raise OSError(f"transformers would make up {info['missing_keys']}")
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0].numpy().astype(np.float64)


def ours(at: Path) -> Array:
    return forward(load_model(at), IDS, logits_at="all").logits[0]


# --- files --------------------------------------------------------------------------------------------------------


def _beside(name: str) -> Callable[[Path, Path], None]:
    return lambda at, other: (other / "model.safetensors").rename(at / name) and None


def _indexed(at: Path, tensors: Tensors, stem: str = "model", kept: int = 2) -> None:
    """Two shards and their index; `kept` of the shards are there."""
    names = sorted(tensors)
    where = {name: f"{stem}-{1 + (i % 2):05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values()))[:kept]:
        save_file({name: tensors[name] for name in names if where[name] == file}, at / file)
    index = {"metadata": {}, "weight_map": where}
    (at / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _of(at: Path) -> Tensors:
    return load_file(at / "model.safetensors")


def _shards(at: Path, other: Path, **how: object) -> None:
    _indexed(at, _of(at), **how)
    (at / "model.safetensors").unlink()


def _shards_and_another(at: Path, other: Path) -> None:
    _indexed(at, _of(other))


def _shards_gone(at: Path, other: Path) -> None:
    _indexed(at, _of(other), kept=0)


def _index_and_consolidated(at: Path, other: Path) -> None:
    _shards(at, other)
    _beside("consolidated.safetensors")(at, other)


def _named(at: Path, other: Path) -> None:
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    (at / "model.safetensors").rename(at / "other.safetensors")
    _beside("model.safetensors")(at, other)


def _named_index(at: Path, other: Path) -> None:
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors.index.json"}))
    _indexed(at, _of(at), stem="other")
    _beside("model.safetensors")(at, other)


def _only(name: str) -> Callable[[Path, Path], None]:
    return lambda at, other: (at / "model.safetensors").rename(at / name) and None


LAYOUTS: dict[str, Callable[[Path, Path], None]] = {
    **{f"beside {name}": _beside(name) for name in (
        "consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "model.fp16.safetensors",
        "pytorch_model.bin", "model-00001-of-00001.safetensors",
    )},
    "names with a prefix too many": lambda at, other: _renamed(at, lambda name: f"model.{name}"),
    "shards": _shards,
    "shards and another single file": _shards_and_another,
    "a single file and an index whose shards are gone": _shards_gone,
    "shards and consolidated": _index_and_consolidated,
    "a file that config.json names": _named,
    "an index that config.json names": _named_index,
    "a shard missing": lambda at, other: _shards(at, other, kept=1),
    "only a variant": _only("model.fp16.safetensors"),
    "only consolidated": _only("consolidated.safetensors"),
    "only an adapter": _only("adapter_model.safetensors"),
}  # fmt: skip


def _laid_out(name: str, lay: Callable[[Path, Path], None]) -> Result:
    """The same logits, or an error on both sides."""
    with tempfile.TemporaryDirectory() as scratch:
        at, other = saved(Path(scratch) / "model", "llama"), saved(Path(scratch) / "other", "llama", seed=1)
        expected, control = theirs(at), distance(theirs(other), theirs(at))
        lay(at, other)
        told = [_tried(read, at) for read in (theirs, ours)]
    read = [logits for logits in told if logits is not None]
    if len(read) < 2:
        return Result("layouts", f"{name}: sides that read it", Measure(len(read), 0.0, 2))
    return Result("layouts", name, Measure(max(distance(found, expected) for found in read), SAME, 2), control)


def _tried(read: Callable[[Path], Array], at: Path) -> Array | None:
    try:
        return read(at)
    except (EngineError, OSError):
        return None
