"""nnsight, tracing transformers' modules."""

from typing import Any

import nnsight
import torch
from _serve import Request, serve
from nnsight import LanguageModel

SHOWN = (0, 14, 29)


def load(path: str) -> Any:
    torch.set_grad_enabled(False)
    model = LanguageModel(path, device_map="cpu", dtype=torch.float32, dispatch=True)
    capture(model, {"ids": [1, 2, 3]})
    return model


def capture(model: Any, r: Request) -> list[float]:
    with model.trace(torch.tensor([r["ids"]])):
        kept = nnsight.save([])
        for layer in model.model.layers:
            kept.append(layer.output)
    rows = [x[0] if isinstance(x, tuple) else x for x in kept]
    return [x for layer in SHOWN for x in rows[layer].reshape(-1, 576)[-1, :4]]


def batch(model: Any, r: Request) -> list[float]:
    shown = []
    for start in range(0, 100, 25):
        with model.trace(torch.tensor(r["prompts"][start : start + 25])):
            kept = nnsight.save([])
            for layer in model.model.layers:
                kept.append(layer.output[:, -1])
        shown += kept[29][:, 0].tolist()
    return shown


WORKS = {"capture": capture, "batch": batch}

if __name__ == "__main__":
    serve(load, WORKS)
