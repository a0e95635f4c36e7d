"""interp-engine, eager backend on the CPU."""

from typing import Any

import torch
from _serve import Request, serve
from interp_engine import SteerSpec, generate_stream, load_model, steer
from interp_engine.capture import capture as captured
from interp_engine.lens import decode_residuals

SHOWN = (0, 14, 29)
POSTS = [("resid_post", i) for i in range(30)]
EVERY = [
    ("embeddings", None),
    *(
        (name, i)
        for i in range(30)
        for name in (
            "resid_pre", "value", "attn_probs", "z", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post",
        )
    ),
    ("final_norm", None),
]  # fmt: skip
"""Those of mechscope's points that it has a name for."""


def load(path: str) -> Any:
    torch.set_grad_enabled(False)
    return load_model(path, backend="eager", device="cpu", dtype="float32")


def capture(model: Any, r: Request) -> list[float]:
    cache = captured(model, torch.tensor([r["ids"]]), POSTS)
    return [x for layer in SHOWN for x in cache[("resid_post", layer)][0, -1, :4]]


def points(model: Any, r: Request) -> list[float]:
    cache = captured(model, torch.tensor([r["ids"]]), EVERY)
    return [x for layer in SHOWN for x in cache[("mlp_act", layer)][0, -1, :4]]


def lens(model: Any, r: Request) -> list[float]:
    cache = captured(model, torch.tensor([r["ids"]]), POSTS)
    best = {}
    for layer in range(30):
        best[layer] = decode_residuals(model, cache[("resid_post", layer)][0]).softmax(-1).topk(10)
    return [best[layer].values[-1, 0] for layer in SHOWN]


def decode(model: Any, r: Request) -> list[float]:
    spec, ids = SteerSpec(torch.tensor(r["vector"]), 15), torch.tensor([r["ids"]])
    with steer(model, [spec], position_mask=range(len(r["ids"]) - 1)):
        steps = generate_stream(model, ids, max_tokens=60, temperature=0, stop_at_eos=False)
        return [step.token_id for step in steps]


def batch(model: Any, r: Request) -> list[float]:
    shown = []
    for start in range(0, 100, 25):
        cache = captured(model, torch.tensor(r["prompts"][start : start + 25]), POSTS)
        shown += cache[("resid_post", 29)][:, -1, 0].tolist()
    return shown


WORKS = {"capture": capture, "points": points, "lens": lens, "decode": decode, "batch": batch}

if __name__ == "__main__":
    serve(load, WORKS)
