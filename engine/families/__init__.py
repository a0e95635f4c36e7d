"""One file per architecture: config.json and tensor names -> `Config` and weights.

`families.family(model_type)` finds the file by name. A family module defines

    config(raw)              config.json as a dict -> Config
    layer(tensors, i, cfg)   the tensors of layer i -> LayerParams
    ends(tensors, cfg)       -> (embed, unembed, final_norm)
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from engine.config import Config
from engine.errors import UnknownModel, clipped
from engine.ops import Array
from engine.params import LayerParams, Norm
from engine.weights import Tensors


class Family(Protocol):
    """What a family module offers."""

    def config(self, raw: Mapping[str, Any]) -> Config: ...
    def layer(self, tensors: Tensors, i: int, cfg: Config) -> LayerParams: ...
    def ends(self, tensors: Tensors, cfg: Config) -> tuple[Array, Array, Norm | None]: ...


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
