"""A model whose layers take a while and are counted; as a script, `mechscope` with such a model.

python -P tests/slow_model.py COUNTED serve [options]      the file COUNTED grows by a byte with every layer entered
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

from engine import Model
from engine.params import Ends, LayerParams, Params

LAYER_SECONDS = 0.03


class Entered:
    """Counts the layers that begin to run, and makes each take a while."""

    def __init__(
        self, model: Model, entered: Callable[[], None] = lambda: None, seconds: float = LAYER_SECONDS
    ) -> None:
        self.count = 0
        self.opened = threading.Event()
        self.opened.set()
        self._held_at: int | None = None
        self._reached = threading.Event()
        inner = model.params

        def load(layer: int) -> LayerParams:
            self.count += 1
            entered()
            if self.count == self._held_at:
                self._reached.set()
            if self._held_at is None or self.count < self._held_at:
                time.sleep(seconds)
            else:
                self._wait()
            return inner.layer(layer)

        params = Params(Ends(inner.embed, inner.unembed, inner.final_norm), load, keep=0)
        self.model = dataclasses.replace(model, params=params)

    def _wait(self) -> None:
        """Until the layer is let go, or its call is cancelled."""
        while not self.opened.wait(0.01):
            try:
                anyio.from_thread.check_cancelled()
            except asyncio.CancelledError:
                return

    def hold_at(self, count: int) -> None:
        """From the layer that is entered as number `count` on, each waits until `let_go`."""
        self._held_at = count
        self.opened.clear()

    async def held(self) -> None:
        """Returns when that layer has been entered, and waits."""
        await anyio.to_thread.run_sync(self._reached.wait)

    def let_go(self) -> None:
        self.opened.set()


def main() -> None:
    import server.serve
    from server.__main__ import main as mechscope
    from server.lab import Lab, LoadedModel

    counted = Path(sys.argv.pop(1))

    def entered() -> None:
        with counted.open("ab") as file:
            file.write(b".")

    class SlowLab(Lab):
        def load(self, *arguments: Any, **more: Any) -> LoadedModel:
            known = self.models
            if (item := super().load(*arguments, **more)) not in known:
                item.model = Entered(item.model, entered).model
            return item

    server.serve.Lab = SlowLab  # type: ignore[misc]
    mechscope()


if __name__ == "__main__":
    main()
