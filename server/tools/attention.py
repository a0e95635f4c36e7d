"""Who attends where: attention_pattern."""

from typing import Annotated

import numpy as np
from pydantic import Field

from engine import Model, RecordHook, forward
from engine.config import Config
from engine.cost import of_capture, of_pass
from engine.errors import InputError
from engine.ops import Array
from schemas.arguments import Layers, ModelRef, Positions, Prompt
from schemas.base import Integers
from schemas.reading import Attention, AttentionRow, Source
from server.call import Call, layer_list, position_list
from server.tools.reading import MOST_ENTRIES


def attention_pattern(
    call: Call,
    prompt: Prompt,
    layers: Layers,
    heads: Annotated[Integers | None, Field(min_length=1, description="left out: all")] = None,
    positions: Positions = "last",
    k: Annotated[int, Field(ge=1, le=50, description="sources to list for each row")] = 3,
    model: ModelRef = None,
) -> Attention:
    """Show where heads attend from a position: the largest weights, and the entropy of the row.

    A weight says where a head looks, not what it does: test that with forward_ablate (point z, heads) or a knockout
    in interventions.
    """
    loaded = call.loaded(model)
    engine = loaded.model
    ids, chosen = call.ids(engine, prompt), layer_list(engine, layers)
    rows = position_list(engine, positions, len(ids))
    of = range(engine.config.n_heads) if heads is None else dict.fromkeys(engine.resolve_head(h) for h in heads)
    entries = len(chosen) * len(of) * len(rows) * min(k, len(ids))
    if entries > MOST_ENTRIES:
        raise InputError(
            f"{len(chosen)} layers x {len(of)} heads x {len(rows)} positions x {k} sources are more than "
            f"{MOST_ENTRIES} entries; ask for fewer layers, heads or positions, or a smaller k"
        )
    record = RecordHook.for_layers(chosen, points=["attn_pattern"], positions=sorted(rows))
    held = of_capture(engine.config, len(ids), ["attn_pattern"], len(chosen), len(rows))
    call.expect(engine, of_pass(engine.config, len(ids), max(chosen) + 1).beside(held), len(ids))
    forward(engine, ids, hook=record, stop=max(chosen) + 1, logits_at="none", tick=call.tick)
    patterns, places = record.attention_weights, {row: place for place, row in enumerate(sorted(rows))}
    return Attention(
        model=loaded.handle,
        notice=loaded.notice,
        rows=[
            AttentionRow(
                layer=layer,
                head=head,
                position=row,
                entropy=_entropy(patterns[layer][head, places[row]]),
                top=_sources(engine, ids, patterns[layer][head, places[row], : row + 1], k),
            )
            for layer in chosen
            for head in of
            for row in rows
        ],
        key_groups=_key_groups(engine.config),
    )


def _key_groups(cfg: Config) -> list[list[int]] | None:
    return None if cfg.group == 1 else [list(cfg.query_heads(head)) for head in range(cfg.n_kv_heads)]


def _entropy(weights: Array) -> float:
    """In nats."""
    seen = weights[weights > 0].astype(np.float64)
    return float(-(seen * np.log(seen)).sum()) if len(seen) > 1 else 0.0


def _sources(model: Model, ids: list[int], weights: Array, k: int) -> list[Source]:
    order = np.argsort(-weights, kind="stable")[:k]
    return [
        Source(position=int(i), id=ids[i], text=model.tokenizer.piece(ids[i]), weight=float(weights[i])) for i in order
    ]
