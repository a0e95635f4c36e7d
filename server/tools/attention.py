"""Who attends where: attention_pattern."""

from collections.abc import Iterable
from typing import Annotated

import numpy as np
from pydantic import Field

from engine import Model, RecordHook, forward
from engine.config import Config
from engine.cost import of_capture, of_pass
from engine.ops import Array
from schemas.arguments import Heads, Layers, ModelRef, Positions, Prompt
from schemas.base import LEAST_SHOWN
from schemas.reading import Attention, AttentionRow, Source
from server.call import Call, head_list, position_list

MOST_CHARACTERS = 6400
"""Of rows in one answer, which stays under 2,000 tokens with the rest of it."""


def attention_pattern(
    call: Call,
    prompt: Prompt,
    layers: Layers | None = None,
    heads: Heads | None = None,
    positions: Positions = "last",
    k: Annotated[int, Field(ge=1, le=50, description="sources to list for each row")] = 3,
    model: ModelRef = None,
) -> Attention:
    """Show where heads attend from a position, sharp heads first: the largest weights, and the entropy of the row.

    A weight says where a head looks, not what it does: test that with forward_ablate (point z, heads) or a knockout
    in interventions.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, which = call.ids(engine, prompt), head_list(engine, layers, heads, "attn_pattern")
    rows, stop = position_list(engine, positions, len(ids)), max(which) + 1
    record = RecordHook.for_layers(which, points=["attn_pattern"], positions=sorted(rows))
    held = of_capture(engine.config, len(ids), ["attn_pattern"], len(which), len(rows))
    call.expect(engine, of_pass(engine.config, len(ids), stop).beside(held), len(ids))
    forward(engine, ids, hook=record, stop=stop, logits_at="none", tick=call.tick)
    found = [
        (row == 0, _entropy(weights), layer, head, row)  # one source is no sharpness
        for layer, pattern in record.attention_weights.items()
        for head in which[layer] or range(engine.config.n_heads)
        for row, weights in zip(sorted(rows), pattern[head], strict=True)
    ]
    made = _fitting(engine, ids, sorted(found), record.attention_weights, sorted(rows), k)
    if len(made) < len(found):
        call.note(
            f"the {len(made)} sharpest of {len(found)} rows are listed; for the others ask for fewer layers, heads "
            "([layer, head] pairs) or positions, or a smaller k"
        )
    return Attention(model=loaded.handle, notice=loaded.notice, rows=made, key_groups=_key_groups(engine.config))


def _fitting(
    model: Model,
    ids: list[int],
    found: Iterable[tuple[bool, float, int, int, int]],
    patterns: dict[int, Array],
    rows: list[int],
    k: int,
) -> list[AttentionRow]:
    """As many of the rows (first, entropy, layer, head, position) as one answer holds, and one at least."""
    made: list[AttentionRow] = []
    size = 0
    for _, entropy, layer, head, row in found:
        weights = patterns[layer][head, rows.index(row), : row + 1]
        made.append(
            AttentionRow(layer=layer, head=head, position=row, entropy=entropy, top=_sources(model, ids, weights, k))
        )
        size += len(made[-1].model_dump_json())
        if size > MOST_CHARACTERS and len(made) > 1:
            return made[:-1]
    return made


def _key_groups(cfg: Config) -> list[list[int]] | None:
    return None if cfg.group == 1 else [list(cfg.query_heads(head)) for head in range(cfg.n_kv_heads)]


def _entropy(weights: Array) -> float:
    """In nats."""
    seen = weights[weights > 0].astype(np.float64)
    return float(-(seen * np.log(seen)).sum()) if len(seen) > 1 else 0.0


def _sources(model: Model, ids: list[int], weights: Array, k: int) -> list[Source]:
    order = [int(i) for i in np.argsort(-weights, kind="stable")[:k] if weights[i] >= LEAST_SHOWN]
    return [Source(position=i, id=ids[i], text=model.tokenizer.piece(ids[i]), weight=float(weights[i])) for i in order]
