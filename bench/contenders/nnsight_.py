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


def _rows(model: Any, r: Request) -> list[torch.Tensor]:
    with model.trace(torch.tensor([r["ids"]])):
        kept = nnsight.save([])
        for layer in model.model.layers:
            kept.append(layer.output)
    return [x[0] if isinstance(x, tuple) else x for x in kept]


def capture(model: Any, r: Request) -> list[float]:
    rows = _rows(model, r)
    return [x for layer in SHOWN for x in rows[layer].reshape(-1, 576)[-1, :4]]


def lens(model: Any, r: Request) -> list[float]:
    rows, inner = _rows(model, r), model._module
    best = {layer: inner.lm_head(inner.model.norm(rows[layer]))[0].softmax(-1).topk(10) for layer in range(30)}
    return [best[layer].values[-1, 0] for layer in SHOWN]


def decode(model: Any, r: Request) -> list[float]:
    vector, first = torch.tensor(r["vector"]), len(r["ids"])
    with model.generate(
        torch.tensor([r["ids"]]), max_new_tokens=60, min_new_tokens=60, do_sample=False, eos_token_id=None
    ) as tracer:
        for _ in tracer.iter[:60]:
            model.model.layers[15].output[:, -1] += vector
        made = tracer.result.save()
    return made[0, first:].tolist()


def batch(model: Any, r: Request) -> list[float]:
    shown = []
    for start in range(0, 100, 25):
        with model.trace(torch.tensor(r["prompts"][start : start + 25])):
            kept = nnsight.save([])
            for layer in model.model.layers:
                kept.append(layer.output[:, -1])
        shown += kept[29][:, 0].tolist()
    return shown


WORKS = {"capture": capture, "lens": lens, "decode": decode, "batch": batch}

if __name__ == "__main__":
    serve(load, WORKS)
