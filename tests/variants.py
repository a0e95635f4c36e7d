"""Variants of all sorts for a sweep: `everywhere`, `kinds`."""

from dataclasses import replace

import numpy as np

from engine import POINTS, Intervention, Variant

SCOPES = ("all", "last", (1,), (2, -2), (-1,))


def points(model):
    return [name for name in POINTS if not (name == "resid_mid" and model.config.parallel)]


def vector(model, point, seed=0):
    width = {"d_model": model.config.d_model, "d_mlp": model.config.d_mlp, "d_head": model.config.d_head}
    rng = np.random.default_rng(seed)
    return rng.standard_normal(width[POINTS[point].axes[-1]]).astype(np.float32)


def everywhere(model):
    """A change at every point, in the first, a middle and the last layer, of every kind of row."""
    last = model.config.n_layers - 1
    return [
        Variant((Intervention("scale", (layer,), name, scope, value=0.5),))
        for i, name in enumerate(points(model))
        for layer, scope in zip((0, last // 2, last), (SCOPES[(i + j) % len(SCOPES)] for j in range(3)), strict=True)
    ]


def kinds(model):
    """Every kind of intervention, and several together."""
    n = model.config.n_kv_heads - 1
    wide, mlp, head = (vector(model, name) for name in ("resid_post", "mlp_act", "z"))
    pool = np.stack([vector(model, "attn_out", seed) for seed in range(4)])
    steer = Intervention("steer", (1,), positions=(2, -1), value=0.3, unit="row", vector=wide)
    return [
        Variant((Intervention("zero", (2,), "z", (3,), heads=(1,)),)),
        Variant((Intervention("mean", (1,), "attn_out", (-2,), vector=wide),)),
        Variant((Intervention("resample", (1,), "attn_out", "all", vector=pool, seed=3),)),
        Variant((Intervention("scale", (0,), "mlp_act", (1, 2), neurons=(0, 5), value=4.0),)),
        Variant((Intervention("patch", (2,), "mlp_act", (-2,), vector=mlp),)),
        Variant((Intervention("patch", (1,), "v", heads=(n,), rows={1: head, -2: -head}),)),
        Variant((Intervention("set_component", (1,), value=9.0, vector=wide, positions=(1,)),)),
        Variant((Intervention("project_out", (0, 2), vector=wide),)),
        Variant((Intervention("knockout", (1, 2), "attn_pattern", (-1,), heads=(0,), keys=(0, 1)),)),
        Variant((steer,)),
        Variant((steer, Intervention("zero", (2,), "mlp_out", (-1,)), Intervention("scale", (1,), "q", value=0.5))),
        Variant((Intervention("scale", (0,), "embed", (2,), value=2.0), Intervention("zero", (1,), positions=(-2,)))),
        Variant((Intervention("project_out", (0,), "final_norm", vector=wide), replace(steer, point="final_norm"))),
    ]


def puts_in_noise(variant):
    """Whether rows of an early layer are replaced by noise."""
    return any(item.kind in ("mean", "resample") for item in variant.interventions)
