"""An architecture as data: everything the decoder needs to know besides the weights.

`Config` holds sizes and the few functions' parameters; what varies by layer (rotary frequencies, attention
window) is a tuple with one entry per layer. `Rope` is one layer's rotary embedding.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.ops import Array, IntArray


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies of one layer.

    `inv_freq` is in radians per position, one entry per rotated pair of features; `scale` multiplies cos and
    sin (the attention factor of yarn and longrope). Two kinds depend on the length of the sequence: `long` is
    (context, frequencies beyond it), `dynamic` is (theta, factor, context) of dynamic NTK scaling.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    long: tuple[int, tuple[float, ...]] | None = None
    dynamic: tuple[float, float, int] | None = None

    @classmethod
    def plain(cls, theta: float, width: int) -> "Rope":
        """theta^(-2i / width), i = 0 .. width/2 - 1 (Su et al. 2021)."""
        return cls(tuple(float(theta ** (-i / width)) for i in range(0, width, 2)))

    def frequencies(self, length: int) -> tuple[float, ...]:
        """The frequencies for a sequence of `length` tokens."""
        if self.long is not None and length > self.long[0]:
            return self.long[1]
        if self.dynamic is not None and length > self.dynamic[2]:
            theta, factor, context = self.dynamic
            width = 2 * len(self.inv_freq)
            grown = theta * (factor * length / context - (factor - 1)) ** (width / (width - 2))
            return Rope.plain(grown, width).inv_freq
        return self.inv_freq

    def table(self, pos: IntArray, length: int) -> tuple[Array, Array]:
        """Cos and sin of every angle in a sequence of `length` tokens: two (seq, width / 2) arrays.

        Angles are float64: at position 8000 a float32 angle is already off by 2e-4.
        """
        angle = pos[:, None].astype(np.float64) * np.asarray(self.frequencies(length))
        return (np.cos(angle) * self.scale).astype(np.float32), (np.sin(angle) * self.scale).astype(np.float32)


@dataclass(frozen=True)
class Config:
    """Sizes and settings of one model. Lengths are in features, `n_ctx` in tokens."""

    family: str
    n_layers: int
    n_ctx: int
    d_vocab: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: str
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]
    attn_scales: tuple[float, ...]
    attn_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    parallel: bool = False
    learned_positions: bool = False
    tied: bool = False

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.n_heads // self.n_kv_heads

    def query_heads(self, kv_head: int) -> range:
        """The heads that read the keys and values of a key-value head."""
        return range(kv_head * self.group, (kv_head + 1) * self.group)

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Features of a position's queries, keys and values, all heads together."""
        kv_width = self.n_kv_heads * self.d_head
        return self.n_heads * self.d_head, kv_width, kv_width
