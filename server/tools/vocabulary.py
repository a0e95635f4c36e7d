"""Vectors seen in the vocabulary: embedding_neighbors, project_through_unembed."""

from typing import Any

import numpy as np

from engine import Model
from engine.cost import Cost
from engine.lens import embedding_neighbors as neighbours_of
from engine.lens import embedding_row, unembedding_row
from engine.lens import project_through_unembed as projected
from engine.matrices import WIDENED_AT_ONCE
from engine.ops import Array
from schemas.arguments import ModelRef, TokenRef, TopK, Vector, VectorRef
from schemas.base import ScoredToken
from schemas.reading import VocabularyView
from server.call import Call, require_one, token_id
from server.lab import LoadedModel


def embedding_neighbors(
    call: Call, token: TokenRef | None = None, vector: Vector | None = None, k: TopK = 10, model: ModelRef = None
) -> VocabularyView:
    """Find the tokens whose rows of W_E have the largest cosine with a token's embedding, or with any vector."""
    require_one(token=token, vector=vector)
    loaded = call.loaded(model)
    query, name = _query(call, loaded.model, token, vector, "W_E")
    cfg = loaded.model.config
    _expect(call, loaded.model, 2 * 4 * min(WIDENED_AT_ONCE, cfg.d_vocab) * cfg.d_model)
    return _view(loaded, query, name, "cosine with W_E", neighbours_of(loaded.model, query, k))


def project_through_unembed(
    call: Call, token: TokenRef | None = None, vector: VectorRef | None = None, k: TopK = 10, model: ModelRef = None
) -> VocabularyView:
    """Multiply a vector with W_U: which tokens' logits does this direction raise?

    Raw W_U @ vector, without norm and softcap; for a residual use logit_lens.
    """
    require_one(token=token, vector=vector)
    loaded = call.loaded(model)
    query, name = _query(call, loaded.model, token, vector, "W_U")
    _expect(call, loaded.model)
    return _view(loaded, query, name, "logit, W_U @ vector", projected(loaded.model, query, k))


def _expect(call: Call, model: Model, rows: int = 0) -> None:
    """No pass: some numbers for each token of the vocabulary, and so many bytes of rows."""
    call.expect(model, Cost(nbytes=4 * 4 * model.config.d_vocab + rows), 1)


def _query(call: Call, model: Model, token: str | int | None, vector: Any, matrix: str) -> tuple[Array, str]:
    if token is None:
        return call.vector(model, vector), vector.model_dump_json(exclude_none=True)[:200]
    index = token_id(model, token)
    row = embedding_row if matrix == "W_E" else unembedding_row
    return row(model, index), f"{matrix} row of {model.tokenizer.piece(index)!r}"


def _view(loaded: LoadedModel, query: Array, name: str, score: str, pairs: Any) -> VocabularyView:
    piece = loaded.model.tokenizer.piece
    return VocabularyView(
        model=loaded.handle,
        notice=loaded.notice,
        vector=name,
        norm=float(np.linalg.norm(query)),
        score=score,
        top=[ScoredToken(id=i, text=piece(i), score=s) for i, s in pairs],
    )
