"""The one forward pass: `block`, `attention`, `mlp`, `forward`.

Differences between architectures are data (`Config`, absent parameters); hooks fire at the named points of
`points.POINTS`. Arrays are float32 with a batch axis; there is no padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from engine.cache import KVCache
from engine.config import Config, Rope
from engine.edits import check_order, resolve_positions
from engine.errors import InputError, LayerError, PositionError
from engine.hooks import LayerHook, Listeners
from engine.matrices import rows_of
from engine.network import Network, Tokens
from engine.ops import (
    Array,
    IntArray,
    activated,
    attend,
    inner,
    layer_norm,
    linear,
    rms_norm,
    rotate,
    softcap,
)
from engine.params import LayerParams, Norm
from engine.split import in_parts

Tick = Callable[[int, int, str], None]
"""Called as tick(done, total, what) when a layer is entered: `done` counts those of the whole work, this one included,
from 1 to `total`. Raising from it stops the work.
"""

LogitsAt = Literal["last", "all", "none"] | Sequence[int]


@dataclass(frozen=True)
class ForwardResult:
    """residual: (b, s, d_model) after the last layer that ran. logits: (b, rows, d_vocab) for the absolute
    positions `logit_positions`; None when the pass stopped before the last layer, or none were asked for.
    """

    residual: Array
    logits: Array | None
    logit_positions: IntArray


@dataclass(frozen=True)
class Pass:
    """What every block of one pass shares; `pos` are the rows' absolute positions.

    `kept` are the rows of the pass that go on once keys and values are made, all by default.
    """

    cfg: Config
    hooks: Listeners
    pos: IntArray
    tables: dict[Rope, tuple[Array, Array]]
    cache: KVCache | None = None
    kept: IntArray | None = None

    def going_on(self, x: Array) -> Array:
        """The rows of (b, s, ...) that go on."""
        return x if self.kept is None else x[:, self.kept]

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Each head's mix of the values it may see: (b, s, heads, d_head)."""
        key_pos = self.pos
        if self.cache is not None:
            k, v, key_pos = self.cache.append(layer, k, v, self.pos)
        on_weights = None
        if self.hooks.wanted("attn_pattern", layer):
            on_weights = partial(self.hooks.fire, "attn_pattern", layer, key_pos=key_pos)
        return masked_attention(self.cfg, layer, q, k, v, self.pos, key_pos, on_weights)


def forward(
    model: Network,
    tokens: Tokens | None,
    *,
    hook: LayerHook | None = None,
    cache: KVCache | None = None,
    start: int = 0,
    stop: int | None = None,
    residual: Array | None = None,
    positions: IntArray | None = None,
    logits_at: LogitsAt = "last",
    prompt_length: int | None = None,
    tick: Tick | None = None,
) -> ForwardResult:
    """Run layers start .. stop-1 on tokens that follow whatever the cache holds.

    `residual` (b, s, d_model) takes the place of tokens (None then) and is required when start > 0; `positions`
    are its rows' absolute positions, ascending. `logits_at` names the rows to unembed: "last", "all", "none" or
    positions. `prompt_length` tells hooks where the prompt ends when it is fed in pieces; by default it ends with
    these tokens. Raises `InputError`s for layers, tokens, positions and caches that do not fit.
    """
    cfg = model.config
    stop = cfg.n_layers if stop is None else stop
    if not 0 <= start < stop <= cfg.n_layers:
        raise InputError(f"layers {start} to {stop} cannot be run; valid: 0 <= start < stop <= {cfg.n_layers}")
    past = 0
    if cache is not None:
        cache.bind(cfg)
        past = cache.next_position
    x = _input(model, tokens, residual, start)
    pos = _positions(positions, past, x.shape[1])
    model.check_context(int(pos[-1]) + 1)
    if hook is not None:
        whole = int(pos[-1]) + 1 if prompt_length is None else prompt_length
        _check_hook(hook, model)
        check_order(hook.named_edits(), pos, whole, goes_on=cache is not None)
        hook.begin_run(whole, past)
    listeners = Listeners(hook, range(start, stop), cfg.n_layers - 1, pos)
    run = Pass(cfg, listeners, pos, _rotary_tables(cfg, cache, pos), cache)
    if start == 0:
        x = listeners.fire("embed", 0, x if residual is not None else _placed(model, x, pos))
    with in_parts(x.shape[0] * x.shape[1]):
        for layer in range(start, stop):
            if tick is not None:
                tick(layer - start + 1, stop - start, f"layer {layer}")
            x = block(x, model.params.layer(layer), layer, run)
    rows = _logit_rows(logits_at, pos) if stop == cfg.n_layers else pos[:0]
    logits = _finish(model, x, rows, run) if len(rows) or listeners.wanted("final_norm", cfg.n_layers - 1) else None
    return ForwardResult(x, logits if len(rows) else None, pos[rows])


def embed(model: Network, ids: IntArray) -> Array:
    """W_E rows of (b, s) ids, times the embedding scale."""
    x: Array = rows_of(model.params.ends.embed, ids)  # (b, s, d)
    return x * np.float32(model.config.embed_scale) if model.config.embed_scale != 1 else x


def _placed(model: Network, x: Array, pos: IntArray) -> Array:
    """Add learned positions, in models that have them."""
    return x if model.params.positions is None else x + model.params.positions[pos]


def _rotary_tables(cfg: Config, cache: KVCache | None, pos: IntArray) -> dict[Rope, tuple[Array, Array]]:
    """Cos and sin of this pass's positions for each rotary embedding of the model."""
    length = int(pos[-1]) + 1
    if cache is not None:
        cache.grow_to(length)
    return {rope: rope.table(pos, length) for rope in {*cfg.ropes} if rope is not None}


def block(x: Array, p: LayerParams, layer: int, run: Pass) -> Array:
    """One layer: (b, s, d_model) -> (b, s, d_model)."""
    cfg, hooks = run.cfg, run.hooks
    x = hooks.fire("resid_pre", layer, x)
    a = norm(attention(norm(x, p.attn_norm, cfg), p, layer, run), p.attn_post_norm, cfg)
    x = run.going_on(x)
    a = hooks.fire("attn_out", layer, _scaled(a, cfg.residual_scale))
    mid = x if cfg.parallel else hooks.fire("resid_mid", layer, x + a)
    m = norm(mlp(norm(mid, p.mlp_norm, cfg), p, layer, run), p.mlp_post_norm, cfg)
    m = hooks.fire("mlp_out", layer, _scaled(m, cfg.residual_scale))
    return hooks.fire("resid_post", layer, (x + a if cfg.parallel else mid) + m)


def attention(x: Array, p: LayerParams, layer: int, run: Pass) -> Array:
    """Grouped-query causal attention: (b, s, d_model) -> (b, s, d_model)."""
    cfg, hooks = run.cfg, run.hooks

    def heads(flat: Array, weight: Norm | None, name: str) -> Array:
        flat = norm(flat, weight, cfg)
        split = flat.reshape(*flat.shape[:2], -1, cfg.d_head).swapaxes(1, 2)  # (b, heads, s, d_head)
        return hooks.fire(name, layer, split)

    q, k, v = p.qkv.split(linear(x, p.qkv.weight, p.qkv.bias))  # each (b, s, heads * d_head)
    q, k, v = heads(run.going_on(q), p.q_norm, "q"), heads(k, p.k_norm, "k"), heads(v, None, "v")
    rope = cfg.ropes[layer]
    if rope is not None:
        q = rotate(q, *(run.going_on(table[None])[0] for table in run.tables[rope]))
        k = rotate(k, *run.tables[rope])
    z = hooks.fire("z", layer, run.attend(layer, q, k, v))  # (b, s, heads, d_head)
    out = linear(z.reshape(*z.shape[:2], -1), p.o.weight, p.o.bias)
    return hooks.fire("attn_proj", layer, out)


def masked_attention(
    cfg: Config,
    layer: int,
    q: Array,
    k: Array,
    v: Array,
    pos: IntArray,
    key_pos: IntArray,
    on_weights: Callable[[Array], Array] | None,
) -> Array:
    """`ops.attend` with the layer's scale, window and softcap."""
    return attend(
        q, k, v, pos, key_pos, scale=cfg.attn_scales[layer], window=cfg.windows[layer], cap=cfg.attn_softcap,
        on_weights=on_weights,
    )  # fmt: skip


def mlp(x: Array, p: LayerParams, layer: int, run: Pass) -> Array:
    """act(gate) * up, or act(up), then down: (b, s, d_model) -> (b, s, d_model)."""
    branches = p.gate_up.split(linear(x, p.gate_up.weight, p.gate_up.bias))  # [gate and] up: each (b, s, d_mlp)
    act = run.hooks.fire("mlp_act", layer, activated(run.cfg.activation, *branches))
    return run.hooks.fire("mlp_proj", layer, linear(act, p.down.weight, p.down.bias))


def norm(x: Array, p: Norm | None, cfg: Config) -> Array:
    """The config's norm over groups as wide as the weight; absent parameters are the identity."""
    if p is None:
        return x
    width = p.weight.shape[-1]
    if width != x.shape[-1]:
        return norm(x.reshape(*x.shape[:-1], -1, width), p, cfg).reshape(x.shape)
    if cfg.norm == "rms":
        return rms_norm(x, p.weight, cfg.norm_eps)
    return layer_norm(x, p.weight, p.bias, cfg.norm_eps)


def unembed(model: Network, x: Array, only: Sequence[int] | None = None) -> Array:
    """Normalised rows (..., d_model) -> logits (..., d_vocab): W_U, bias, logit scale, softcap.

    `only` names the tokens whose logits are wanted: (..., len(only)) then.
    """
    ends = model.params.ends
    logits = inner(x, ends.unembed if only is None else rows_of(ends.unembed, np.array(only, np.int64)))
    if ends.unembed_bias is not None:
        logits += ends.unembed_bias[slice(None) if only is None else list(only)]
    if model.config.logit_scale != 1:
        logits *= np.float32(model.config.logit_scale)
    return softcap(logits, model.config.final_softcap)


def _scaled(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * np.float32(factor)


def _input(model: Network, tokens: Tokens | None, residual: Array | None, start: int) -> Array:
    """The (b, s, d_model) that the first layer reads."""
    if residual is None:
        if tokens is None or start > 0:
            raise InputError("a pass without tokens, or from above layer 0, needs `residual`: its first layer's input")
        return embed(model, model.token_batch(tokens))
    if tokens is not None:
        raise InputError("give tokens or residual, not both")
    x = np.array(residual, np.float32)
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != model.config.d_model:
        raise InputError(
            f"residual has shape {x.shape}; it must be (seq, {model.config.d_model}), with or without a batch"
        )
    return x


def _positions(positions: IntArray | None, past: int, rows: int) -> IntArray:
    """The absolute positions of this pass's rows; raises `PositionError`."""
    if positions is None:
        return np.arange(past, past + rows, dtype=np.int64)
    pos = np.asarray(positions)
    if pos.shape != (rows,) or pos.dtype.kind not in "iu" or pos[0] < past or (np.diff(pos) < 1).any():
        raise PositionError(f"positions must be {rows} ascending whole numbers, one per row, from {past} on; not {pos}")
    return pos.astype(np.int64)


def _check_hook(hook: LayerHook, model: Network) -> None:
    n = model.config.n_layers
    bad = sorted(layer for layer in hook.named_layers() if not 0 <= layer < n)
    if bad:
        raise LayerError(f"the hook names layer {bad[0]}, which does not exist; valid: 0 to {n - 1}")
    for name in hook.named_points():
        model.check_point(name)


def _logit_rows(logits_at: LogitsAt, pos: IntArray) -> IntArray:
    if logits_at == "none":
        return np.zeros(0, np.int64)
    if logits_at == "all":
        return np.arange(len(pos))
    if logits_at == "last":
        return np.array([len(pos) - 1])
    if isinstance(logits_at, str):
        raise PositionError(f"logits_at={logits_at!r}; use last, all, none or a list of positions")
    wanted = np.array(resolve_positions(logits_at, int(pos[-1]) + 1), np.int64)
    if not np.isin(wanted, pos).all():
        raise PositionError(f"positions {list(logits_at)}: this pass computes positions {pos[0]} to {pos[-1]}")
    rows: IntArray = np.searchsorted(pos, wanted)
    return rows


def _finish(model: Network, x: Array, rows: IntArray, run: Pass) -> Array:
    """Final norm and unembedding of the wanted rows; a listener at `final_norm` sees every row."""
    last = run.cfg.n_layers - 1
    if not run.hooks.wanted("final_norm", last):
        return unembed(model, norm(x[:, rows], model.params.final_norm, run.cfg))
    normed = run.hooks.fire("final_norm", last, norm(x, model.params.final_norm, run.cfg))
    return unembed(model, normed[:, rows])
