"""Results about what is held: models, handles, tokens, pages of numbers."""

from pydantic import Field

from schemas.base import Exact, Number, Result, Strict, Token


class ModelInfo(Result):
    """A loaded model."""

    name: str
    family: str
    fingerprint: str = Field(description="sha256 of the weights")
    weights: str = Field(description="dense (float32 in memory) or scoped (as the file stores them, memory-mapped)")
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
        description="of dense weights now, mapped conversions included; a file mapped by scoped weights is not counted"
    )
    seconds: Number


class Held(Strict):
    """One handle and what it costs."""

    handle: str
    about: str
    bytes: int


class SessionInfo(Strict):
    """Everything this session holds."""

    models: list[Held]
    handles: list[Held]
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
    mean: Number
    std: Number
    min: Number
    max: Number
    norm: Number
