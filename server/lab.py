"""The lab: models and records that outlive connections. One `Lab` per server process."""

import threading
from dataclasses import dataclass, field

import anyio

from engine import Model, load_model
from engine.catalog import SYNTHETIC, Progress
from engine.decoder import Tick
from engine.errors import UnknownModel, clipped
from engine.load import layer_budget
from server.sources import Sources
from server.store import MemoryStore, SessionStore, mint

SYNTHETIC_NOTICE = "synthetic weights: the arithmetic is real, the numbers mean nothing about language"
"""Of random weights and of planted circuits."""


@dataclass(eq=False)
class LoadedModel:
    """A model in memory, and the limiter that lets one heavy job at a time use it."""

    handle: str
    source: str
    model: Model
    limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    @property
    def notice(self) -> str | None:
        return SYNTHETIC_NOTICE if self.model.synthetic else None


class Lab:
    """Models are shared by all sessions and loaded once."""

    def __init__(
        self, store: SessionStore | None = None, sources: Sources | None = None, converted: bool = True
    ) -> None:
        self.store: SessionStore = MemoryStore() if store is None else store
        self.sources = Sources() if sources is None else sources
        self._converted = converted
        self._models: dict[tuple[str, int | None], LoadedModel] = {}
        self._loading = threading.Lock()

    @property
    def models(self) -> list[LoadedModel]:
        return list(self._models.values())

    def load(
        self,
        source: str,
        weights: str,
        tick: Tick | None = None,
        progress: Progress | None = None,
        dense_layers: int | None = None,
    ) -> LoadedModel:
        """Load a model, or return it when it is loaded already with the same budget of dense layers."""
        source = self.sources.checked(source)
        with self._loading:
            key = (source, layer_budget(weights, dense_layers))
            if key not in self._models:
                model = load_model(source, weights, tick, progress, dense_layers, self._converted)
                self._models[key] = LoadedModel(mint("model", model.name), source, model)
            return self._models[key]

    def model(self, reference: str | None) -> LoadedModel:
        """The model a handle or name stands for; the only one loaded when None. Raises `UnknownModel`."""
        loaded = self.models
        if reference is None:
            if len(loaded) == 1:
                return loaded[0]
            how = "load one with load_model" if not loaded else f"name one of them: {self._names()}"
            raise UnknownModel(f"{len(loaded)} models are loaded; {how}")
        found = [item for item in loaded if reference in (item.handle, item.model.name, item.source)]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            handles = ", ".join(item.handle for item in found)
            raise UnknownModel(f"{reference!r} is loaded in {len(found)} forms; give a handle: {handles}")
        raise UnknownModel(
            f"no model {clipped(reference)} is loaded; loaded: {self._names() or 'none'}. "
            f"Call load_model first (for example smollm2-135m-instruct or {SYNTHETIC})"
        )

    def _names(self) -> str:
        return ", ".join(f"{item.model.name} ({item.handle})" for item in self.models)

    def release_model(self, handle: str) -> int:
        """Forget a model; returns the bytes of its weights. Raises `UnknownModel`."""
        item = self.model(handle)
        self._models = {key: kept for key, kept in self._models.items() if kept is not item}
        return item.model.params.nbytes
