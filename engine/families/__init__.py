"""One file per architecture: config.json and tensor names -> `Config` and weights.

`families.family(model_type)` finds the file by name. A family module defines

    config(raw)                   config.json as a dict -> Config
    layer(tensors, i, cfg, raw)   the tensors of layer i -> LayerParams
    ends(tensors, cfg, raw)       embedding, unembedding and what else is not in a layer

and, if only a part of its checkpoints is read, on purpose,

    view(tensors)                 that part, under the names the others ask for

and, where the names of its base model's tensors do not begin with model.,

    PREFIX                        what they begin with (transformers' base_model_prefix)
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from engine.config import Config
from engine.errors import UnknownModel, clipped
from engine.params import Ends, LayerParams
from engine.weights import Tensors


class Family(Protocol):
    """What a family module offers."""

    def config(self, raw: Mapping[str, Any]) -> Config: ...
    def layer(self, tensors: Tensors, i: int, cfg: Config, raw: Mapping[str, Any]) -> LayerParams: ...
    def ends(self, tensors: Tensors, cfg: Config, raw: Mapping[str, Any]) -> Ends: ...


def part_read(reader: Family, tensors: Tensors) -> Tensors:
    """The tensors that a family reads: all, unless it has a view of its own."""
    view = getattr(reader, "view", None)
    return tensors if view is None else cast(Tensors, view(tensors))


def prefix(reader: Family) -> str:
    """What the names of the base model's tensors begin with; a checkpoint of that model alone leaves it out."""
    return str(getattr(reader, "PREFIX", "model."))


def known() -> tuple[str, ...]:
    """The model types that can be loaded, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def family(model_type: object) -> Family:
    """The module for config.json's `model_type`; raises `UnknownModel` listing the known ones."""
    if model_type not in known():
        raise UnknownModel(
            f"model_type {clipped(model_type)} is not supported; the supported ones are {', '.join(known())}"
        )
    return cast(Family, importlib.import_module(f"{__name__}.{model_type}"))
