"""Models whose circuits are known because their weights were written by hand: `planted`, `CIRCUITS`.

The residual stream has named parts, each 64 wide. A token's code is a random unit vector; the unembedding reads the
part `out` for the same codes. A circuit's heads copy codes between parts; among them are decoy heads with random
weights, as loud as the real ones, that write into a part nothing reads (and faintly into the others).

synthetic:induction          a previous-token head and an induction head (Olsson et al. 2022)
synthetic:copy-suppression   a copying head and one that suppresses what is about to be copied (McDougall et al. 2023)
synthetic:two-hop            facts `aB`, `bC`: a previous-token head, a head from a to b, a head from b to C
"""

from dataclasses import dataclass

import numpy as np

from engine.catalog import SYNTHETIC
from engine.config import Config, Rope
from engine.errors import UnknownModel
from engine.library import byte_level
from engine.model import Model
from engine.ops import Array
from engine.params import Ends, Joined, LayerParams, Linear, Norm, Params
from engine.synthetic import fingerprint

WIDTH = 64
PARTS = ("token", "before", "hop", "out", "decoy")
D_MODEL = len(PARTS) * WIDTH + 1
"""The parts, and one feature that is the same in every row."""

ONE = 8.0
"""The constant feature; it makes the norm of a row depend little on what the row holds."""

SHARP = 8.0
"""What query and key are multiplied by: a match then outweighs every other key by at least e^10."""

QUIET = np.float32(0.2)
"""Makes the output of a decoy about as long as a code."""

LEAK = 0.01
"""How loud decoys are outside the part that nothing reads."""


@dataclass(frozen=True)
class Circuit:
    """heads: {role: (layer, head)}. The model says `answer` after `prompt`, but not after `corrupt`."""

    heads: dict[str, tuple[int, int]]
    prompt: str
    corrupt: str
    answer: str


@dataclass(frozen=True)
class _Wiring:
    """What a head compares and copies: parts of the residual. No query part means "the row before"."""

    query: str | None
    key: str | None
    value: str
    to: str
    gain: float = 1.0
    lowered: bool = False


CIRCUITS = {
    "induction": Circuit({"previous token": (1, 3), "induction": (2, 5)}, ".qwaXerTtya", ".qwbXerTtya", "X"),
    "copy-suppression": Circuit({"copying": (1, 2), "suppression": (2, 6)}, ".qwertyuio", ".qwertyuxo", "i"),
    "two-hop": Circuit(
        {"previous token": (0, 1), "first hop": (1, 4), "second hop": (2, 6)}, ".aB bC dE a", ".xB bC dE a", "C"
    ),
}

_PREVIOUS = _Wiring(None, None, "token", "before")
_WIRING = {
    "induction": {"previous token": _PREVIOUS, "induction": _Wiring("token", "before", "token", "out")},
    "copy-suppression": {
        "copying": _Wiring(None, None, "token", "out", 2.0),
        "suppression": _Wiring("out", "token", "token", "out", -1.0),
    },
    "two-hop": {
        "previous token": _PREVIOUS,
        "first hop": _Wiring("token", "before", "token", "hop", 2.0, lowered=True),
        "second hop": _Wiring("hop", "before", "token", "out"),
    },
}

N_LAYERS, N_HEADS, N_KV_HEADS, D_MLP = 4, 8, 4, 64
ROPE = Rope.plain(50.0, WIDTH)
"""From 1 to 1/50 radians per position, so that neighbouring positions can be told apart."""


def planted(name: str, seed: int = 0) -> Model:
    """The model of a circuit; `seed` draws the codes and the decoys. Raises `UnknownModel` listing the circuits."""
    if name not in CIRCUITS:
        valid = ", ".join(f"{SYNTHETIC}:{circuit}" for circuit in CIRCUITS)
        raise UnknownModel(f"there is no planted circuit {name!r}; valid: {valid}")
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((257, WIDTH), np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    wired = {CIRCUITS[name].heads[role]: wiring for role, wiring in _WIRING[name].items()}
    layers = [_layer(rng, {h: w for (at, h), w in wired.items() if at == i}, codes) for i in range(N_LAYERS)]
    embed, unembed = np.zeros((2, 257, D_MODEL), np.float32)
    embed[:, _at("token")], embed[:, -1] = codes, ONE
    unembed[:, _at("out")] = 5 * codes
    params = Params(Ends(embed, unembed, _plain()), layers.__getitem__, keep=N_LAYERS)
    by_content = {layer for (layer, _), wiring in wired.items() if wiring.query is not None}
    words = byte_level()
    label = f"{SYNTHETIC}:{name}"
    return Model(label, _config(by_content), params, words, fingerprint(layers, embed, unembed), "dense", True)


def _config(by_content: set[int]) -> Config:
    """Layers whose heads compare contents have no rotary embedding."""
    return Config(
        family="llama",
        n_layers=N_LAYERS,
        n_ctx=256,
        d_vocab=257,
        d_model=D_MODEL,
        d_mlp=D_MLP,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        d_head=WIDTH,
        norm="rms",
        norm_eps=1e-6,
        activation="silu",
        ropes=tuple(None if layer in by_content else ROPE for layer in range(N_LAYERS)),
        windows=(None,) * N_LAYERS,
        attn_scales=(WIDTH**-0.5,) * N_LAYERS,
    )


def _at(part: str) -> slice:
    start = PARTS.index(part) * WIDTH
    return slice(start, start + WIDTH)


def _head(index: int) -> slice:
    return slice(index * WIDTH, (index + 1) * WIDTH)


def _layer(rng: np.random.Generator, wired: dict[int, _Wiring], codes: Array) -> LayerParams:
    """A layer of decoys in which the wired heads, with the keys and values they read, are put in place."""
    q, k, v, o = (_decoys(rng, heads) for heads in (N_HEADS, N_KV_HEADS, N_KV_HEADS, N_HEADS))
    out = np.ascontiguousarray(o.T)
    v *= QUIET
    out[:, : -WIDTH - 1] *= LEAK  # decoys write into `decoy` and the constant's place, and faintly elsewhere
    out[:, -1] = 0
    for head, wiring in wired.items():
        kv = _head(head * N_KV_HEADS // N_HEADS)
        q[:, _head(head)], k[:, kv], v[:, kv], out[_head(head)] = 0, 0, 0, 0
        _compare(q[:, _head(head)], k[:, kv], wiring)
        v[_at(wiring.value), kv] = np.eye(WIDTH)
        turn = _lowering(codes) if wiring.lowered else np.eye(WIDTH, dtype=np.float32)
        out[_head(head), _at(wiring.to)] = wiring.gain * turn
    gate, up = _normal(rng, D_MODEL, D_MLP), _normal(rng, D_MODEL, D_MLP)
    down = _normal(rng, D_MLP, D_MODEL)
    down[:, : -WIDTH - 1] *= LEAK
    down[:, -1] = 0
    return LayerParams(
        qkv=Joined.of(Linear(q), Linear(k), Linear(v)),
        o=Linear(out),
        gate_up=Joined.of(Linear(gate), Linear(up)),
        down=Linear(down),
        attn_norm=_plain(),
        mlp_norm=_plain(),
    )


def _compare(q: Array, k: Array, wiring: _Wiring) -> None:
    """Query and key of a head: equal codes, or positions one apart.

    A query turned back by one position meets, after rotary, the key of the position before it best.
    """
    if wiring.query is not None and wiring.key is not None:
        q[_at(wiring.query)] = k[_at(wiring.key)] = SHARP * np.eye(WIDTH)
        return
    angles = np.asarray(ROPE.inv_freq)
    q[-1] = SHARP * np.concatenate([np.cos(angles), -np.sin(angles)])
    k[-1, : WIDTH // 2] = SHARP


def _lowering(codes: Array) -> Array:
    """(64, 64): turns the code of each capital letter into that of its small letter."""
    capitals, small = codes[ord("A") : ord("Z") + 1], codes[ord("a") : ord("z") + 1]
    turn: Array = (np.linalg.pinv(capitals) @ small).astype(np.float32)
    return turn


def _decoys(rng: np.random.Generator, heads: int) -> Array:
    return _normal(rng, D_MODEL, heads * WIDTH)


def _normal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.standard_normal((rows, columns), np.float32) * np.float32(D_MODEL**-0.5)


def _plain() -> Norm:
    return Norm(np.ones(D_MODEL, np.float32))
