"""What mean and resample ablation put in: rows of other prompts, and which of them stand for which row.

replacements    mean or resample over other prompts as interventions, one for each layer
replacement     the same from rows that were pooled before; matched_scope says beforehand whether it can be
Match           how rows are matched

`position`, the default, takes each row's place from the rows at its own position, where all prompts have as many tokens
as the one that is changed: over the prompt itself both kinds are then the identity. Prompts of other lengths have no
such positions. Their rows are pooled, but for the first of each, and the first row of the changed prompt stays: at
the first position models keep a residual many times as long as any other, which is the mean of nothing else.
Rows of tokens that are generated get what is pooled, too. `pooled` takes all rows for all rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import numpy as np

from engine.decoder import Tick
from engine.edits import Scope, resolve_positions
from engine.errors import InputError, clipped
from engine.heads import Heads, heads_by_layer
from engine.interventions import Intervention, Kind
from engine.network import Network, Tokens
from engine.ops import Array
from engine.points import point as point_named
from engine.pools import pooled_points

Match = Literal["position", "pooled"]
MATCHES: tuple[str, ...] = get_args(Match)
KINDS = ("mean", "resample")


def replacements(
    model: Network,
    prompt_length: int,
    kind: Kind,
    over: Iterable[Tokens],
    layers: Iterable[int],
    point: str = "resid_post",
    *,
    positions: Scope = "all",
    heads: Heads | None = None,
    neurons: tuple[int, ...] | None = None,
    seed: int = 0,
    match: Match = "position",
    tick: Tick | None = None,
) -> list[Intervention]:
    """Run the prompts `over`: their rows take the place of those of a prompt of `prompt_length` tokens, in each layer.

    Each intervention's `source` says what is averaged or drawn from. Raises `InputError` for no prompts, and for
    position 0 asked for by number where the prompts have other lengths.
    """
    prompts = [model.token_batch(prompt)[0].tolist() for prompt in over]
    matched_scope(kind, prompt_length, [*map(len, prompts)], positions, match)
    which = heads_by_layer(model, layers, heads, key_value=point in ("k", "v"))
    pools = pooled_points(model, prompts, which, [point], tick=tick)[point]
    put = partial(replacement, kind, prompt_length, point, positions=positions, match=match)
    # a point that exists once names its layer itself, and has no heads
    return [replace(put(i, rows, heads=which.get(i)), neurons=neurons, seed=seed) for i, rows in pools.items()]


def matched_scope(
    kind: Kind, prompt_length: int, lengths: Sequence[int], positions: Scope, match: Match = "position"
) -> Scope:
    """The rows of `positions` that rows of prompts of these lengths take the place of; raises `InputError` for none."""
    for name, given, valid in (("kind", kind, KINDS), ("match", match, MATCHES)):
        if given not in valid:
            raise InputError(f"{name} is {clipped(given)}; valid: {', '.join(valid)}")
    if not lengths:
        raise InputError(f"{kind} needs at least one prompt to take rows from")
    if match == "pooled" or {*lengths} == {prompt_length}:
        return positions
    scope, hint = _but_first(positions, prompt_length), f"give prompts of {prompt_length} tokens, or match pooled"
    if max(lengths) == 1:
        raise InputError(f"{kind}: the prompts have one token each, and first rows stand for no others; {hint}")
    if scope is None:
        raise InputError(f"{kind}: position 0 stays as it is, because the prompts are of other lengths; {hint}")
    return scope


def _but_first(positions: Scope, prompt_length: int) -> Scope | None:
    """The scope without the prompt's first row; None where that row was asked for, or is the only one."""
    if positions == "all":
        return "all_but_first"
    if positions in ("prompt", "last") and prompt_length == 1:
        return None
    if positions == "prompt":
        return range(1, prompt_length)
    named = () if isinstance(positions, str) else resolve_positions(positions, prompt_length)
    return None if 0 in named else positions


def replacement(
    kind: Kind,
    prompt_length: int,
    point: str,
    layer: int,
    rows: Sequence[Array],
    *,
    positions: Scope = "all",
    heads: tuple[int, ...] | None = None,
    match: Match = "position",
) -> Intervention:
    """`rows` are (seq, [heads,] width) of each prompt, as `pooled_points` gives them."""
    lengths = [*map(len, rows)]
    scope = matched_scope(kind, prompt_length, lengths, positions, match)
    made = Intervention(kind, (layer,), point, scope, heads)
    by_head = point_named(point).head_axis is not None
    chosen = list(rows) if heads is None or not by_head else [array[:, np.array(heads)] for array in rows]
    if match == "pooled":
        return _with(made, np.concatenate(chosen), f"all {sum(lengths)} rows of {_counted(lengths)}")
    rest = np.concatenate([array[1:] for array in chosen])
    if {*lengths} == {prompt_length}:
        at = {p: _of(made, np.stack([array[p] for array in chosen])) for p in range(prompt_length)}
        beyond = rest if len(rest) else np.concatenate(chosen)
        return replace(_with(made, beyond, f"position by position over {_counted(lengths)}"), rows=at)
    told = (
        f"{len(rest)} rows of {_counted(lengths)}, the first of each left out; the prompt changed has {prompt_length}, "
    )
    return _with(made, rest, told + "and its first row stays")


def _with(made: Intervention, pool: Array, told: str) -> Intervention:
    return replace(made, vector=_of(made, pool), source=f"{made.kind} at {made.point}: {told}")


def _of(made: Intervention, pool: Array) -> Array:
    """What a row becomes, of (n, [heads,] width): their mean, or all of them to draw from."""
    out: Array = pool.mean(0) if made.kind == "mean" else pool
    return out


def _counted(lengths: Sequence[int]) -> str:
    """'3 prompts of 5 tokens', '2 prompts of 4 to 9 tokens'."""
    least, most = min(lengths), max(lengths)
    span = str(most) if least == most else f"{least} to {most}"
    return f"{len(lengths)} prompt{'s' * (len(lengths) > 1)} of {span} token{'s' * (most > 1)}"
