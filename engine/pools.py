"""Rows of many prompts: what mean and resample ablation put in, and what probes are trained on.

pooled_rows         {layer: the point's rows at chosen positions of every prompt}
pooled_rows_cost    what that will take

A causal model without padding takes prompts of one length as one batch. Batches need nothing from each other: they run
on threads of their own where there are any.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from engine.cost import Cost, of_pass, row_size
from engine.decoder import Tick, forward
from engine.edits import Scope
from engine.errors import PointError
from engine.hooks import RecordHook
from engine.network import Network, Tokens
from engine.ops import Array, IntArray
from engine.patching import by_position
from engine.shares import Progress, dealt, most_shares, side_by_side

ROWS_AT_ONCE = 512
"""Rows of a batch of several prompts: more are no faster by the row, and hold more memory."""

Batch = list[int]
"""Which of the prompts run together."""


def pooled_rows(
    model: Network,
    prompts: Iterable[Tokens],
    layers: Iterable[int],
    point: str = "resid_post",
    positions: Scope = "all",
    tick: Tick | None = None,
) -> dict[int, Array]:
    """{layer: (n, [heads,] width)}: the point's rows at `positions` of each prompt, in the prompts' order.

    Equal to passes one by one. `tick` is called in the calling thread alone. Raises `PositionError` for a position that
    one of the prompts does not have, `PointError` for a point that has no rows to pool.
    """
    if point == "attn_pattern":
        raise PointError("attention patterns of different prompts cannot stand for one another; use z")
    chosen, ids = model.resolve_layers(layers), _ids(model, prompts)
    for position in () if isinstance(positions, str) else positions:
        model.resolve_position(position, min(map(len, ids), default=1))
    rows: list[dict[int, Array]] = [{} for _ in ids]

    def run(batches: Sequence[Batch], tick: Tick) -> None:
        for batch in batches:
            record = RecordHook.for_layers(chosen, points=[point], positions=positions)
            forward(model, [ids[i].tolist() for i in batch], hook=record, logits_at="none", tick=tick)
            for layer, array in record.get(point).items():
                for i, own in zip(batch, array if len(batch) > 1 else array[None], strict=True):
                    rows[i][layer] = by_position(own, point)

    shares = _shares(model, ids)
    progress = Progress(tick, model.config.n_layers * sum(map(len, shares)))
    side_by_side([partial(run, share) for share in shares], progress)
    found = dict.fromkeys(layer for of_prompt in rows for layer in of_prompt)
    return {layer: np.concatenate([of_prompt[layer] for of_prompt in rows if layer in of_prompt]) for layer in found}


def pooled_rows_cost(model: Network, prompts: Iterable[Tokens], layers: Iterable[int], point: str) -> Cost:
    """What `pooled_rows` of all positions will take."""
    cfg, ids = model.config, _ids(model, prompts)
    shares = _shares(model, ids)
    together = sum(max((_bytes(model, ids, batch) for batch in share), default=0) for share in shares)
    kept = 4 * sum(len(prompt) * row_size(cfg, point, len(prompt)) for prompt in ids) * len(list(layers))
    passes = sum((of_pass(cfg, len(prompt)) for prompt in ids), Cost())
    return Cost(cfg.n_layers * sum(map(len, shares)), passes.rows, passes.steps, together + 2 * kept)


def _ids(model: Network, prompts: Iterable[Tokens]) -> list[IntArray]:
    return [row for prompt in prompts for row in model.token_batch(prompt)]


def _shares(model: Network, ids: Sequence[IntArray]) -> list[list[Batch]]:
    """Each thread's batches."""
    threads = most_shares(model)
    batches = _batches(ids, min(ROWS_AT_ONCE, -(-sum(map(len, ids)) // threads)))
    largest_first = sorted(batches, key=lambda batch: -_rows(ids, batch))
    return [share for share in dealt(largest_first, partial(_rows, ids), threads) if share] or [[]]


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
    return of_pass(model.config, len(ids[batch[0]])).nbytes * len(batch)
