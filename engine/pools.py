"""Rows of many prompts: what mean and resample ablation put in, and what probes are trained on.

pooled_rows         {layer: a point's rows at chosen positions of every prompt}
pooled_points       those of several points of one run, prompt by prompt
pooled_rows_cost    what that will take

A causal model without padding takes prompts of one length as one batch. Batches need nothing from each other: where
there are enough of them, they run on threads of their own.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from engine.cost import Cost, of_pass, row_size, working_bytes
from engine.decoder import Tick, forward
from engine.edits import Scope, rows_in_scope
from engine.errors import InputError, PointError
from engine.hooks import RecordHook
from engine.network import Network, Tokens
from engine.ops import Array, IntArray
from engine.patching import by_position
from engine.points import ONCE
from engine.shares import Progress, dealt, most_shares, pays, side_by_side

ROWS_AT_ONCE = 512
"""Rows of a batch of several prompts: more are no faster by the row, and hold more memory."""

Batch = list[int]
"""Which of the prompts run together."""


def pooled_rows(
    model: Network,
    prompts: Iterable[Tokens],
    layers: Iterable[int],
    point: str = "resid_post",
    *,
    positions: Scope = "all",
    tick: Tick | None = None,
) -> dict[int, Array]:
    """{layer: (n, [heads,] width)}: the point's rows at `positions` of each prompt, in the prompts' order.

    A prompt's rows are in ascending order, each once. They equal those of passes one by one. `tick` is called in the
    calling thread alone. Raises `PositionError` for a position that one of the prompts does not have, `PointError` for
    a point that has no rows to pool, `InputError` for no layers and for positions without a row.
    """
    by_prompt = pooled_points(model, prompts, layers, [point], positions=positions, tick=tick)[point]
    return {layer: np.concatenate(rows) for layer, rows in by_prompt.items()}


def pooled_points(
    model: Network,
    prompts: Iterable[Tokens],
    layers: Iterable[int],
    points: Iterable[str],
    *,
    positions: Scope = "all",
    tick: Tick | None = None,
) -> dict[str, dict[int, list[Array]]]:
    """{point: {layer: of each prompt (n, [heads,] width)}}; their concatenation is what `pooled_rows` gives."""
    names, chosen, ids = list(points), model.resolve_layers(layers), _ids(model, prompts)
    _check(model, names, chosen, ids, positions)
    stop = _stop(model, names, chosen)
    rows: list[dict[tuple[str, int], Array]] = [{} for _ in ids]

    def run(batches: Sequence[Batch], tick: Tick) -> None:
        for batch in batches:
            record = RecordHook.for_layers(chosen, points=names, positions=positions)
            forward(model, [ids[i].tolist() for i in batch], hook=record, stop=stop, logits_at="none", tick=tick)
            for name in names:
                for layer, array in record.get(name).items():
                    for i, own in zip(batch, array if len(batch) > 1 else array[None], strict=True):
                        rows[i][name, layer] = by_position(own, name)

    shares = _shares(model, ids)
    progress = Progress(tick, stop * sum(map(len, shares)))
    side_by_side([partial(run, share) for share in shares], progress)
    pools: dict[str, dict[int, list[Array]]] = {name: {} for name in names}
    for name, layer in rows[0] if rows else ():
        pools[name][layer] = [of_prompt[name, layer] for of_prompt in rows]
    return pools


def pooled_rows_cost(
    model: Network,
    prompts: Iterable[Tokens],
    layers: Iterable[int],
    point: str = "resid_post",
    positions: Scope = "all",
) -> Cost:
    """What `pooled_rows` will take."""
    cfg, chosen, ids = model.config, model.resolve_layers(layers), _ids(model, prompts)
    _check(model, [point], chosen, ids, positions)
    shares, stop = _shares(model, ids), _stop(model, [point], chosen)
    batches = [batch for share in shares for batch in share]
    alone = sum(_rows(ids, batch) == 1 for batch in batches)
    together = sum(max((_bytes(model, ids, batch) for batch in share), default=0) for share in shares)
    taken = (len(rows_in_scope(positions, np.arange(len(prompt)), len(prompt))) for prompt in ids)
    kept = 4 * len(chosen) * sum(n * row_size(cfg, point, len(prompt)) for n, prompt in zip(taken, ids, strict=True))
    return Cost(stop * len(batches), stop * (sum(map(len, ids)) - alone), stop * alone, together + 2 * kept)


def _ids(model: Network, prompts: Iterable[Tokens]) -> list[IntArray]:
    return [row for prompt in prompts for row in model.token_batch(prompt)]


def _check(
    model: Network, points: Sequence[str], layers: Sequence[int], ids: Sequence[IntArray], positions: Scope
) -> None:
    if "attn_pattern" in points:
        raise PointError("attention patterns of different prompts cannot stand for one another; use z")
    if not layers:
        raise InputError("name at least one layer to take rows from")
    if positions == "generated" or not len(positions):
        raise InputError(f"positions {positions!r} take no row of a prompt; valid: all, prompt, last or a list")
    if not isinstance(positions, str):
        for length in {len(prompt) for prompt in ids}:
            for position in positions:
                model.resolve_position(position, length)


def _stop(model: Network, points: Sequence[str], layers: Sequence[int]) -> int:
    """The layers that have to run; a point that exists once may lie at the end."""
    return model.config.n_layers if {*points} & {*ONCE} else max(layers) + 1


def _shares(model: Network, ids: Sequence[IntArray]) -> list[list[Batch]]:
    """Each thread's batches; one share where threads would not pay, or must not be."""
    threads = most_shares(model)
    if threads > 1:
        batches = _batches(ids, min(ROWS_AT_ONCE, -(-sum(map(len, ids)) // threads)))
        batches.sort(key=partial(_rows, ids), reverse=True)
        shares = dealt(batches, partial(_rows, ids), threads)
        if pays([sum(_rows(ids, batch) for batch in share) for share in shares], len(batches)):
            return shares
    return [_batches(ids, ROWS_AT_ONCE)]


def _batches(ids: Sequence[IntArray], most: int) -> list[Batch]:
    """Prompts of one length, with `most` rows in all or one prompt."""
    by_length: dict[int, Batch] = {}
    for i, prompt in enumerate(ids):
        by_length.setdefault(len(prompt), []).append(i)
    batches = []
    for length, some in by_length.items():
        n = max(1, most // length)
        batches += [some[start : start + n] for start in range(0, len(some), n)]
    return batches


def _rows(ids: Sequence[IntArray], batch: Batch) -> int:
    return sum(len(ids[i]) for i in batch)


def _bytes(model: Network, ids: Sequence[IntArray], batch: Batch) -> int:
    """What a batch needs while it runs."""
    length = len(ids[batch[0]])
    if len(batch) == 1:
        return of_pass(model.config, length).nbytes
    return len(batch) * working_bytes(model.config, length, length)
