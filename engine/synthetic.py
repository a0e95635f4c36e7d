"""Tiny models made in memory: `synthetic`, random weights from a seed with one token per byte.

Every number they give is real arithmetic on meaningless weights; `Model.synthetic` says so.
"""

import hashlib

import numpy as np

from engine.catalog import SYNTHETIC
from engine.config import Config, Rope
from engine.library import byte_level
from engine.model import Model
from engine.ops import Array
from engine.params import Ends, Joined, LayerParams, Linear, Norm, Params

CONFIG = Config(
    family="llama",
    n_layers=4,
    n_ctx=512,
    d_vocab=257,
    d_model=64,
    d_mlp=160,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    ropes=(Rope.plain(10_000.0, 16),) * 4,
    windows=(None,) * 4,
    attn_scales=(16**-0.5,) * 4,
)


def synthetic(seed: int = 0, config: Config = CONFIG) -> Model:
    """A model of `config` with random weights; the same seed gives the same weights."""
    rng = np.random.default_rng(seed)
    embed = _normal(rng, config.d_vocab, config.d_model) * np.float32(config.d_model**0.5)
    layers = [_layer(rng, config) for _ in range(config.n_layers)]
    unembed = embed if config.tied else _normal(rng, config.d_vocab, config.d_model) * np.float32(4)
    params = Params(Ends(embed, unembed, _gain(rng, config.d_model)), layers.__getitem__, keep=config.n_layers)
    return Model(SYNTHETIC, config, params, byte_level(), fingerprint(layers, embed, unembed), "dense", True)


def _layer(rng: np.random.Generator, cfg: Config) -> LayerParams:
    q_width, kv_width, _ = cfg.qkv_widths
    return LayerParams(
        qkv=Joined.of(
            Linear(_normal(rng, cfg.d_model, q_width) * np.float32(2)),
            Linear(_normal(rng, cfg.d_model, kv_width) * np.float32(2)),
            Linear(_normal(rng, cfg.d_model, kv_width)),
        ),
        o=Linear(_normal(rng, q_width, cfg.d_model)),
        gate_up=Joined.of(
            Linear(_normal(rng, cfg.d_model, cfg.d_mlp)),
            Linear(_normal(rng, cfg.d_model, cfg.d_mlp)),
        ),
        down=Linear(_normal(rng, cfg.d_mlp, cfg.d_model)),
        attn_norm=_gain(rng, cfg.d_model),
        mlp_norm=_gain(rng, cfg.d_model),
    )


def _normal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """(rows, columns) with variance 1 / columns of the larger side, so that activations keep their size."""
    return rng.standard_normal((rows, columns), np.float32) * np.float32(max(rows, columns) ** -0.5)


def _gain(rng: np.random.Generator, width: int) -> Norm:
    return Norm(rng.uniform(0.5, 1.5, width).astype(np.float32))


def fingerprint(layers: list[LayerParams], *ends: Array) -> str:
    """The sha256 of weights that never were in a file."""
    digest = hashlib.sha256()
    for array in [*(array for layer in layers for _, array in layer.arrays()), *ends]:
        digest.update(array.tobytes())
    return digest.hexdigest()
