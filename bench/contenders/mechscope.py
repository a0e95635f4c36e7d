"""mechscope itself; a second argument is the option `weights` of `load_model`."""

import sys
from typing import Any, Literal

import numpy as np
from _serve import Request, serve

from engine import (
    POINTS,
    KVCache,
    Metric,
    RecordHook,
    SteerHook,
    forward,
    generate,
    kv_inject_test,
    load_model,
    patching_grid,
    pooled_rows,
    track_race,
)

SHOWN = (0, 14, 29)


def capture(model: Any, r: Request) -> list[float]:
    record = RecordHook.for_layers(range(30), points=["resid_post"])
    forward(model, r["ids"], hook=record, logits_at="none")
    rows = record.post_layer
    return [x for layer in SHOWN for x in rows[layer][-1, :4]]


def everything(model: Any, r: Request, logits_at: Literal["last", "none"] = "last") -> list[float]:
    record = RecordHook.for_layers(range(30), points=POINTS)
    forward(model, r["ids"], hook=record, logits_at=logits_at)
    rows = record.get("mlp_act")
    return [x for layer in SHOWN for x in rows[layer][-1, :4]]


def points(model: Any, r: Request) -> list[float]:
    return everything(model, r, "none")


def lens(model: Any, r: Request) -> list[float]:
    record = RecordHook.for_layers(range(30), points=["resid_post"])
    forward(model, r["ids"], hook=record, logits_at="none")
    best = track_race(model, record.post_layer, 10)
    return [best[layer][-1][0][1] for layer in SHOWN]


def grid(model: Any, r: Request) -> list[float]:
    metric = Metric("logit_difference", r["token"], r["against"])
    return patching_grid(model, r["ids"], r["corrupt"], metric, "resid_pre").values.ravel().tolist()


def heads(model: Any, r: Request) -> list[float]:
    metric = Metric("logit_difference", r["token"], r["against"])
    return patching_grid(model, r["ids"], r["corrupt"], metric, "z", "head").values.ravel().tolist()


def kv_scan(model: Any, r: Request) -> list[float]:
    scan = kv_inject_test(model, r["corrupt"], r["ids"], r["token"])
    return [cell.probability for cell in (*scan.per_layer, *scan.from_last, *scan.from_first)]


def decode(model: Any, r: Request) -> list[float]:
    hook = SteerHook().add(15, np.asarray(r["vector"], np.float32), 1.0)
    eos, model.tokenizer.eos = model.tokenizer.eos, ()
    made = generate(model, r["ids"], 60, hook=hook)
    model.tokenizer.eos = eos
    return list(made.ids)


def steps(model: Any, r: Request) -> list[float]:
    cache = KVCache.with_layers(30)
    forward(model, r["ids"], cache=cache)
    for token in r["next"]:
        logits = forward(model, [token], cache=cache).logits
    return logits[0, 0, :8].tolist()


def batch(model: Any, r: Request) -> list[float]:
    rows = pooled_rows(model, r["prompts"], range(30), positions="last")
    return list(rows[29][:, 0])


WORKS = {
    "capture": capture,
    "everything": everything,
    "points": points,
    "lens": lens,
    "grid": grid,
    "heads": heads,
    "kv_scan": kv_scan,
    "kv_batch": kv_scan,
    "decode": decode,
    "steps": steps,
    "batch": batch,
}

if __name__ == "__main__":
    serve(lambda path: load_model(path, *sys.argv[2:]), WORKS)
