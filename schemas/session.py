"""Results about what is held: models, handles, tokens, pages of numbers."""

from typing import Any

from pydantic import Field

from schemas.base import Exact, Number, Result, Strict, Token


class ModelCard(Result):
    """A loaded model: its shape and what it costs."""

    name: str
    family: str
    fingerprint: str = Field(description="sha256 of the weights")
    weights: str = Field(
        description="dense (float32 in memory), packed (the file's blocks in memory), scoped (memory-mapped) or bf16"
    )
    conversion: str = Field(
        description="float32 weights kept for the next start: 'used', 'made' (this first start took longer), "
        "'not kept: ' and why, or 'none'"
    )
    dense_layers: int = Field(description="how many layers may be dense in memory at a time")
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    bytes_in_memory: int = Field(
        description="of weights now, mapped conversions included; a file mapped by scoped weights is not counted"
    )


class ModelInfo(ModelCard):
    """A loaded model."""

    seconds: Number


class KnownModel(Strict):
    """A model that load_model takes by name."""

    name: str
    cached: bool = Field(description="whether it loads without a download")


class Models(Strict):
    """What is loaded, and what can be."""

    loaded: list[ModelCard]
    known: list[KnownModel]


class Held(Strict):
    """One handle and what it costs."""

    handle: str
    about: str
    bytes: int
    in_memory: bool = Field(description="false: it is read from disk when it is used")


class SessionInfo(Strict):
    """Everything this session holds, a page of handles at a time."""

    models: list[Held]
    handles: list[Held]
    handle_count: int = Field(description="how many there are in all")
    next_start: int | None = Field(None, description="where the next page of handles starts; left out at the end")
    bytes_in_memory: int


class Released(Strict):
    """What was freed."""

    handle: str
    bytes_freed: int


class PlacedToken(Token):
    """A token at its position."""

    position: int


class Tokens(Result):
    """A text as the model sees it."""

    count: int
    tokens: list[PlacedToken]


class TensorSummary(Strict):
    """One tensor without its numbers."""

    name: str
    shape: list[int]
    dtype: str
    mean: Exact
    std: Exact
    min: Exact
    max: Exact
    norm: Exact


class TensorRecord(Strict):
    """A handle's tensors (the first 40) and how they were made."""

    handle: str
    provenance: dict[str, Any]
    bytes: int
    tensor_count: int
    tensors: list[TensorSummary]


class TensorPage(Strict):
    """A page of one tensor's numbers, in row-major order."""

    handle: str
    tensor: str = Field(description="which of the handle's tensors")
    tensors: list[str] = Field(description="the names of the handle's tensors (the first 40)")
    tensor_count: int
    shape: list[int]
    start: int
    values: list[Exact]
    next_start: int | None = Field(description="where the next page starts; null at the end")
    mean: Exact
    std: Exact
    min: Exact
    max: Exact
    norm: Exact
