"""A model whose layers take a while and are counted; as a script, `mechscope` with such a model.

python -P tests/slow_model.py COUNTED serve [options]      the file COUNTED grows by a byte with every layer entered
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import Model
from engine.params import Ends, LayerParams, Params

LAYER_SECONDS = 0.03


class Entered:
    """Counts the layers that begin to run, and makes each take a while."""

    def __init__(
        self, model: Model, entered: Callable[[], None] = lambda: None, seconds: float = LAYER_SECONDS
    ) -> None:
        self.count = 0
        inner = model.params

        def load(layer: int) -> LayerParams:
            self.count += 1
            entered()
            time.sleep(seconds)
            return inner.layer(layer)

        params = Params(Ends(inner.embed, inner.unembed, inner.final_norm), load, keep=0)
        self.model = dataclasses.replace(model, params=params)


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
