"""The lab: models and records that outlive connections. One `Lab` per server process."""

import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import anyio
from pydantic import ByteSize

from engine import Model, load_model
from engine.catalog import SYNTHETIC, Progress
from engine.decoder import Tick
from engine.errors import DamagedConversion, InputError, ModelError, UnknownModel, clipped
from engine.load import layer_budget
from server.logs import log
from server.memory import MEMORY_BUDGET, WorkingMemory
from server.sources import Sources
from server.store import MemoryStore, RememberedModel, SessionStore

SYNTHETIC_NOTICE = "synthetic weights: the arithmetic is real, the numbers mean nothing about language"
"""Of random weights and of planted circuits."""
ROUNDED_NOTICE = "weights rounded to bfloat16: the numbers are not those of the float32 weights"


@dataclass(eq=False)
class LoadedModel:
    """A model in memory, and the limiter that lets one heavy job at a time use it."""

    handle: str
    source: str
    model: Model
    limiter: anyio.CapacityLimiter

    @property
    def notice(self) -> str | None:
        said = [SYNTHETIC_NOTICE] * self.model.synthetic + [ROUNDED_NOTICE] * (self.model.weights == "bf16")
        return "; ".join(said) or None


@dataclass(eq=False)
class Slot:
    """The place of a model that this process has used: in memory, or to be loaded again at its next use."""

    known: RememberedModel
    limiter: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    loaded: LoadedModel | None = None
    in_use: bool = False
    """Whether it has been in memory here and could be had when last asked for."""
    users: int = 0
    used: float = 0.0

    @property
    def handle(self) -> str:
        return self.known.handle

    @property
    def nbytes(self) -> int:
        """What it takes in memory now."""
        return 0 if self.loaded is None else self.loaded.model.params.nbytes

    @property
    def taken(self) -> bool:
        """Whether a call or job has its turn now, so that the next one waits."""
        return self.limiter.statistics().borrowed_tokens > 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the model; for the length of the `async with` block it is this call's, and stays in memory."""
        async with self.limiter:
            self.users += 1
            try:
                yield
            finally:
                self.users -= 1


class Lab:
    """Models are shared by all sessions and loaded once.

    Those nobody works with leave memory, the least recently used first, when others need the room of `model_budget`;
    their handles stay, and the next use loads them again.
    """

    def __init__(
        self,
        store: SessionStore | None = None,
        sources: Sources | None = None,
        model_budget: int | None = None,
        converted: bool = True,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        self.store: SessionStore = MemoryStore() if store is None else store
        self.sources = Sources() if sources is None else sources
        self.memory = WorkingMemory(self.store, memory_budget)
        self._budget, self._converted = model_budget, converted
        self._slots: dict[str, Slot] = {}
        self._loading, self._lock = threading.Lock(), threading.RLock()

    @property
    def slots(self) -> list[Slot]:
        return list(self._slots.values())

    @property
    def models(self) -> list[LoadedModel]:
        """Those in memory."""
        return [slot.loaded for slot in self.slots if slot.loaded is not None]

    def present(self, reference: str | None) -> LoadedModel | None:
        """The model in memory that a handle or name stands for, the only one when None; None unless that is one."""
        meant = [item for item in self.models if reference in (None, item.handle, item.model.name, item.source)]
        return meant[0] if len(meant) == 1 else None

    # --- loading ------------------------------------------------------------------------------------------

    def load(
        self,
        source: str,
        weights: str,
        tick: Tick | None = None,
        progress: Progress | None = None,
        dense_layers: int | None = None,
    ) -> LoadedModel:
        """Load a model, or return it when it is loaded already with the same budget of dense layers."""
        source, keep = self.sources.checked(source), layer_budget(weights, dense_layers)
        with self._loads_alone(progress):
            for slot in self.slots:
                kept = slot.known
                same = (kept.source, kept.weights, kept.dense_layers) == (source, weights, keep)
                if same and (loaded := self._in_memory(slot)) is not None:
                    return loaded
            model = self._read(source, weights, dense_layers, tick, progress)
            known = self.store.remember_model(model.name, source, weights, keep, model.fingerprint, model.params.nbytes)
            return self._placed(known, model)

    def model(self, reference: str | None, tick: Tick | None = None, progress: Progress | None = None) -> LoadedModel:
        """The model a handle or name stands for, loaded again if it left memory. Raises `UnknownModel`, `ModelError`.

        This may take long: not for the event loop.
        """
        slot = self.find(reference)
        if (loaded := self._in_memory(slot)) is not None:
            return loaded
        with self._loads_alone(progress):
            return self._in_memory(slot) or self._reloaded(slot, tick, progress)

    def _reloaded(self, slot: Slot, tick: Tick | None, progress: Progress | None) -> LoadedModel:
        known = slot.known
        scoped = known.dense_layers is not None
        layers = known.dense_layers if scoped and known.dense_layers != layer_budget("scoped", None) else None
        try:
            self._make_room(known.nbytes, known.name)
            source = self.sources.checked(known.source)
            model = self._read(source, known.weights, layers, tick, progress)
        except ModelError as error:
            slot.in_use &= type(error) is ModelError  # the others say that it is gone
            raise ModelError(f"{known.handle} cannot be loaded again: {error}") from error
        if model.fingerprint != known.fingerprint:
            slot.in_use = False
            raise ModelError(
                f"{known.handle} cannot be loaded again: {known.name} has other weights now (sha256 "
                f"{model.fingerprint[:12]}, then {known.fingerprint[:12]}). Call load_model for a handle of the new "
                "ones"
            )
        return self._placed(known, model)

    def _read(
        self, source: str, weights: str, layers: int | None, tick: Tick | None, progress: Progress | None
    ) -> Model:
        def room(wanted: int) -> None:
            self._make_room(wanted, source)

        model = load_model(source, weights, tick, progress, layers, self._converted, room)
        self._make_room(model.params.nbytes, model.name)
        return model

    def _placed(self, known: RememberedModel, model: Model) -> LoadedModel:
        with self._lock:
            slot = self._slots.setdefault(known.handle, Slot(known))
            slot.loaded = LoadedModel(known.handle, known.source, model, slot.limiter)
            slot.in_use = True
            slot.used = time.monotonic()
            return slot.loaded

    def _in_memory(self, slot: Slot) -> LoadedModel | None:
        """The model, which counts as used now; None when it is to be loaded again, because it left memory or its
        converted weights are damaged.
        """
        with self._lock:
            slot.used = time.monotonic()
            loaded = slot.loaded
        try:
            if loaded is not None and loaded.model.params.vouched is not None:
                loaded.model.params.vouched.require_all()
        except DamagedConversion as error:
            log.warning("converted weights are damaged", extra={"model": slot.handle, "reason": str(error)})
            with self._lock:
                if slot.loaded is loaded:  # another call may have loaded it again meanwhile
                    slot.loaded = None
            return None
        return loaded

    @contextmanager
    def _loads_alone(self, progress: Progress | None) -> Iterator[None]:
        """One model is loaded at a time; who waits can be cancelled."""
        while not self._loading.acquire(timeout=0.2):
            if progress is not None:
                progress(0, 1, "waiting for another model to load")
        try:
            yield
        finally:
            self._loading.release()

    def _make_room(self, wanted: int, name: str) -> None:
        """Let idle models go until so many bytes fit. Raises `ModelError`, and then all stay."""
        if self._budget is None:
            return
        with self._lock:
            idle = sorted((s for s in self.slots if s.loaded is not None and not s.users), key=lambda s: s.used)
            busy = sum(slot.nbytes for slot in self.slots if slot not in idle)
            if busy + wanted > self._budget:
                raise self._too_large(wanted, busy, self._budget, name)
            while idle and busy + sum(slot.nbytes for slot in idle) + wanted > self._budget:
                gone = idle.pop(0)
                log.info("model left memory", extra={"model": gone.handle, "bytes": gone.nbytes})
                gone.loaded = None

    def _too_large(self, wanted: int, busy: int, budget: int, name: str) -> ModelError:
        takes, may, held = (ByteSize(number).human_readable() for number in (wanted, budget, busy))
        others = f", of which models that are working now hold {held}: try again later" if busy else ""
        return ModelError(
            f"{name} takes {takes} of memory, but models may take {may}{others}; load it with "
            'weights="packed" (.gguf) or "scoped", choose a smaller one, or start with a larger --model-budget'
        )

    # --- finding ------------------------------------------------------------------------------------------

    def known(self) -> list[RememberedModel]:
        """The models that have handles, of those that this server may open: another one may open others."""
        return [
            model for model in self.store.models() if model.handle in self._slots or self.sources.allows(model.source)
        ]

    def find(self, reference: str | None) -> Slot:
        """The place of the model a handle or name stands for; of the only one in use when None. Raises `UnknownModel`.

        What this process has not used yet may be known from before, by this workspace.
        """
        if reference is None:
            return self._only_one()
        found = [slot for slot in self.slots if _is_meant(slot.known, reference)]
        found = found or [Slot(known) for known in self.known() if _is_meant(known, reference)]
        if len(found) == 1:
            with self._lock:
                return self._slots.setdefault(found[0].handle, found[0])
        if found:
            handles = ", ".join(slot.handle for slot in found)
            raise UnknownModel(f"{clipped(reference)} is loaded in {len(found)} forms; give a handle: {handles}")
        raise UnknownModel(
            f"no model {clipped(reference)} is loaded; loaded: {self._names() or 'none'}{self._remembered()}. "
            f"Call load_model first (for example smollm2-135m-instruct or {SYNTHETIC})"
        )

    def _only_one(self) -> Slot:
        used = self._used()
        if len(used) == 1:
            return used[0]
        how = f"name one of them: {self._names()}" if used else "load one with load_model"
        raise UnknownModel(f"{len(used)} models are loaded; {how}{self._remembered()}")

    def _used(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.in_use]

    def _names(self) -> str:
        return ", ".join(_called([slot.known for slot in self._used()]))

    def _remembered(self) -> str:
        """Models of other times, which their names bring back."""
        used = {slot.handle for slot in self._used()}
        called = _called([model for model in self.known() if model.handle not in used])
        return f". Known from before, and loaded when used: {', '.join(called[-5:])}" if called else ""

    def release_model(self, handle: str) -> int:
        """Let a model leave memory; returns the bytes it took. Others may have its handle: it stays, and brings the
        model back. Raises `UnknownModel`, and `InputError` while calls work with it.
        """
        slot = self.find(handle)
        with self._lock:
            if slot.users:
                raise InputError(f"{slot.handle} is being worked with; release it when that call has ended")
            freed, slot.loaded = slot.nbytes, None
            self._slots.pop(slot.handle, None)
        return freed


def _called(models: Sequence[RememberedModel]) -> list[str]:
    """What to give as `model`: the name, or the handle where two have the name."""
    names = Counter(model.name for model in models)
    return [model.name if names[model.name] == 1 else model.handle for model in models]


def _is_meant(known: RememberedModel, reference: str) -> bool:
    return reference in (known.handle, known.name, known.source)
