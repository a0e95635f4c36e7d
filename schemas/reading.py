"""Results of reading a run without changing it: captures, lenses, token tracks, vocabulary views."""

from typing import Annotated

from pydantic import Field

from schemas.base import Number, Result, Rough, ScoredToken, Strict, Token, TokenProbability

OwnAnswer = Annotated[
    int | None, Field(description="the layer read whose lens is the model's own answer: its last; left out if none is")
]


class PointNorm(Strict):
    """Norms of one point at one layer, over the captured positions (and heads)."""

    point: str | None = Field(None, description="left out where one point was captured")
    layer: int
    mean_norm: Number
    max_norm: Number | None = Field(None, description="left out where mean_norm is of one vector")


class LensToken(Token):
    """A vocabulary entry and its probability, to four digits."""

    probability: Rough


class LensRow(Strict):
    """The lens at one layer and position."""

    layer: int
    position: int
    top: list[LensToken]


class Capture(Result):
    """A capture, held under `handle`."""

    handle: str
    prompt_tokens: int
    points: list[str]
    layers: list[int]
    positions: list[int]
    shape: list[int] = Field(description="of each layer's tensor at the first point")
    bytes: int
    norms: list[PointNorm]
    lens: list[LensRow] | None = Field(
        None,
        description="of the point that is residual stream, resid_post before others; as many tokens of each row as an "
        "answer holds",
    )
    own_answer: OwnAnswer = None


class Lens(Result):
    """The logit lens by layer and position."""

    rows: list[LensRow]
    point: str = Field(description="what was read")
    own_answer: OwnAnswer = None
    identity_error: Number | None = Field(
        None,
        description="largest difference between the last layer's lens and the model's own distribution; left out where "
        "own_answer is",
    )


class TrackRow(Strict):
    """One token at one layer."""

    layer: int
    probability: Number
    rank: int = Field(description="0 is the most probable")
    logit: Number


class Track(Result):
    """One token through the layers."""

    token: Token
    position: int
    rows: list[TrackRow]
    own_answer: OwnAnswer = None
    emergence_layer: int | None = Field(
        description="the first layer read from which the token leads to the last; null if it does not lead there. It "
        "leads when it is on top with at least 1 / sqrt(d_vocab) of the probability, and by more than rounding"
    )
    peak_layer: int


class RaceRow(Strict):
    """All runners at one layer, in the order of `tokens`."""

    layer: int
    probabilities: list[Number]
    leader: str = Field(description="its text, with its id where two runners' texts are alike")


class Crossing(Strict):
    """The lead changes hands at `layer`."""

    layer: int
    loses: str
    takes: str


class Race(Result):
    """Several tokens through the layers."""

    tokens: list[Token]
    position: int
    rows: list[RaceRow]
    own_answer: OwnAnswer = None
    crossings: list[Crossing]


class VocabularyView(Result):
    """A vector seen in the vocabulary."""

    vector: str = Field(description="what was projected")
    norm: Number
    score: str = Field(description="what the scores are")
    top: list[ScoredToken]


class Source(Token):
    """A position that is attended to, and its weight."""

    position: int
    weight: Number


class AttentionRow(Strict):
    """Where one head attends from one position."""

    layer: int
    head: int
    position: int
    entropy: Number = Field(description="in nats; 0 is a single source")
    top: list[Source]


class Attention(Result):
    """Attention patterns, rows of the least entropy first, and the largest weights of each."""

    rows: list[AttentionRow]
    key_groups: list[list[int]] | None = Field(
        None, description="heads that share keys and values, those of key-value head 0 first; left out if none do"
    )


class LayerComparison(Strict):
    """The two residuals after one layer."""

    layer: int
    cosine: Number | None = Field(description="null between models of different width")
    distance: Number | None = Field(description="|a - b| / |a|; null between models of different width")
    kl: Number = Field(description="KL(b || a) in nats of what the lens reads")


class Comparison(Result):
    """Two runs, layer by layer, at one position each."""

    a: str
    b: str
    rows: list[LayerComparison]
    own_answer: OwnAnswer = None
    top_layer: int = Field(description="the last layer compared, of which top_a and top_b are")
    top_a: list[TokenProbability]
    top_b: list[TokenProbability]
    first_divergence: int | None = Field(description="the first layer whose lens differs by more than 0.1 nats")
