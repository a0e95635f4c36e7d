"""What the architecture of a model declares, read from its config and weights: tests ask here, never for a name.

points_of, has      the points its blocks have
refuses             asserts the refusal of a point that they do not have
bias_free, offset   whether zeros stay zeros in a layer; what is added to a projection
moves               whether rows of the cache can go to another position; `refuses_to_move` asserts the refusal
turns               whether keys depend on their position through a rotation
boundary            the length after which rotary frequencies change, and whether they go on changing
visible             which keys each row may see
final_logits        the last norm and the unembedding written out in float64
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from engine import POINTS, Model
from engine.errors import CacheError, PointError
from engine.params import Linear, Norm


def has(model: Model, name: str) -> bool:
    return name != "resid_mid" or not model.config.parallel


def points_of(model: Model) -> list[str]:
    return [name for name in POINTS if has(model, name)]


@contextmanager
def _raises(error: type[Exception], reason: str) -> Iterator[None]:
    """`pytest.raises`; the environment of `make oracle` has no pytest."""
    try:
        yield
    except error as raised:
        if reason not in str(raised):
            raise
    else:
        raise AssertionError(f"no {error.__name__} was raised")


def refuses(name: str) -> AbstractContextManager[None]:
    return _raises(PointError, f"{name} does not exist in parallel blocks")


def bias_free(model: Model) -> bool:
    """No bias in any layer: a residual of zeros stays one."""
    layers = (model.params.layer(layer).arrays() for layer in range(model.config.n_layers))
    return not any(name.endswith("bias") for arrays in layers for name, _ in arrays)


def offset(part: Linear | Norm) -> np.ndarray:
    return np.zeros(part.weight.shape[-1], np.float32) if part.bias is None else part.bias


def moves(model: Model) -> bool:
    return not model.config.learned_positions


def refuses_to_move() -> AbstractContextManager[None]:
    return _raises(CacheError, "positions are learned and part of every key and value")


def turns(model: Model, layer: int) -> bool:
    return model.config.ropes[layer] is not None


def boundary(model: Model) -> tuple[int, bool] | None:
    """(length, goes on); None where frequencies do not depend on the length."""
    for rope in model.config.ropes:
        if rope is not None and rope.long is not None:
            return rope.long[0], False
        if rope is not None and rope.dynamic is not None:
            return rope.dynamic[2], True
    return None


def visible(model: Model, layer: int, s: int) -> np.ndarray:
    """(s, s): a key at most at its row's position, and inside the layer's window."""
    distance = np.arange(s)[:, None] - np.arange(s)[None]
    window = model.config.windows[layer]
    return (distance >= 0) & (distance < (s if window is None else window))


def final_logits(model: Model, row: np.ndarray) -> np.ndarray:
    """(d_vocab,) logits of one residual (d_model,), in float64."""
    cfg, ends = model.config, model.params
    x = row.astype(np.float64)
    x = x - x.mean() if cfg.norm == "layer" else x
    normed = x / np.sqrt(np.mean(x**2) + cfg.norm_eps) * ends.final_norm.weight + offset(ends.final_norm)
    return head(model, normed)


def head(model: Model, normed: np.ndarray) -> np.ndarray:
    """Logits of normalised rows: W_U, bias, scale, cap."""
    cfg, ends = model.config, model.params
    logits = normed @ ends.unembed.T.astype(np.float64)
    logits = cfg.logit_scale * (logits if ends.unembed_bias is None else logits + ends.unembed_bias)
    return logits if cfg.final_softcap is None else cfg.final_softcap * np.tanh(logits / cfg.final_softcap)
