"""A model whose layers are counted and can be held.

Entered   counts the layers of a model in this process, and holds them
Layers    the same for server processes; its `command` is `mechscope` with such a model

The processes speak by files: PATH grows by a byte with every layer entered. When PATH.hold is there and says a number,
each layer from that one on waits until it is gone, or until its call is cancelled; then PATH.cancelled is there.
"""

import asyncio
import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.from_thread
import anyio.to_thread
from waiting import LOOK, PATIENCE, until

from engine import Model
from engine.params import Ends, LayerParams, Params

SCRIPT = f"""
import sys, engine, schemas, server  # before the folders that are called as they are can be found
sys.path.append({str(Path(__file__).parent)!r})
import slow_model
slow_model.main()
"""


class Entered:
    """Counts the layers that begin to run. What was held is let go at last: its thread outlives the event loop."""

    def __init__(self, model: Model, entered: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._held_at: int | None = None
        self._reached = threading.Event()
        self._let_go = threading.Event()
        inner = model.params

        def load(layer: int) -> LayerParams:
            self.count += 1
            entered()
            if self._held_at is not None and self.count >= self._held_at:
                self._reached.set()
                self._hold()
            return inner.layer(layer)

        params = Params(Ends(inner.embed, inner.unembed, inner.final_norm), load, keep=0)
        self.model = dataclasses.replace(model, params=params)

    def _hold(self) -> None:
        """Until the layer is let go, or its call is cancelled, of which a thread gets no word: it has to look."""
        while not self._let_go.wait(LOOK):
            try:
                anyio.from_thread.check_cancelled()
            except asyncio.CancelledError:
                return

    def hold_at(self, count: int) -> None:
        """From the layer that is entered as number `count` on, each waits until `let_go`."""
        self._reached.clear()
        self._let_go.clear()
        self._held_at = count

    async def held(self) -> None:
        """Returns when that layer has been entered, and waits."""
        reached = await anyio.to_thread.run_sync(self._reached.wait, PATIENCE)
        assert reached, f"layer number {self._held_at} was not entered, {self.count} were"

    def let_go(self) -> None:
        self._held_at = None
        self._let_go.set()


class Layers:
    """The layers that server processes of one `command` have entered, one after the other."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self._hold, self._cancelled = (path.with_name(path.name + end) for end in (".hold", ".cancelled"))
        self.command = (sys.executable, "-P", "-c", SCRIPT, str(path))

    @property
    def count(self) -> int:
        return self._path.stat().st_size

    def hold_after(self, count: int) -> None:
        """So many layers from now on run, and those after them wait until `let_go`."""
        self._cancelled.unlink(missing_ok=True)
        self._hold.write_text(str(self.count + count + 1))

    async def held(self) -> None:
        await until(self._holds, f"layer number {self._held_at()} is entered")

    async def cancelled(self) -> None:
        """Returns when the layer that was held has ended by a cancellation."""
        await until(self._cancelled.exists, "the call of the layer that is held is cancelled")

    def let_go(self) -> None:
        self._hold.unlink(missing_ok=True)

    def _held_at(self) -> int | None:
        try:
            return int(self._hold.read_text())
        except FileNotFoundError:
            return None

    def _holds(self) -> bool:
        number = self._held_at()
        return number is not None and self.count >= number

    # --- in the server process --------------------------------------------------------------------------------

    def entered(self) -> None:
        with self._path.open("ab") as file:
            file.write(b".")
        while self._holds():
            try:
                anyio.from_thread.check_cancelled()
            except asyncio.CancelledError:
                self._cancelled.touch()
                return
            time.sleep(LOOK)


def main() -> None:
    import server.serve
    from server.__main__ import main as mechscope
    from server.lab import Lab, LoadedModel

    layers = Layers(Path(sys.argv.pop(1)))

    class SlowLab(Lab):
        def load(self, *arguments: Any, **more: Any) -> LoadedModel:
            known = self.models
            if (item := super().load(*arguments, **more)) not in known:
                item.model = Entered(item.model, layers.entered).model
            return item

    server.serve.Lab = SlowLab  # type: ignore[misc]
    mechscope()
