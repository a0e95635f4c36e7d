"""Results of sweeps: grids of many changed runs."""

from pydantic import Field

from schemas.base import Number, Result, Strict


class TokenPair(Strict):
    """Two prompts' tokens at a position where they differ."""

    position: int
    clean: str
    corrupt: str


class GridCell(Strict):
    """One cell: what was patched, the metric there, and how much of the clean run it brings back."""

    layer: int
    position: int | None = None
    head: int | None = None
    kv_head: int | None = Field(None, description="at k and v")
    query_heads: list[int] | None = Field(None, description="the heads that read this kv_head")
    value: Number
    change: Number = Field(description="value - corrupt")
    recovered: Number | None


class CausalTrace(Result):
    """A patching grid: rows of the clean run put into the corrupt run, one cell at a time."""

    metric: str
    clean: Number = Field(description="the metric of the clean run")
    corrupt: Number = Field(description="the metric of the corrupt run, without patching")
    axes: dict[str, list[int]] = Field(description="what the grid's axes run over, in their order")
    top: list[GridCell] = Field(
        description="the k cells that raise the metric most; recovered = (value - corrupt) / (clean - corrupt): above "
        "1 past the clean run, below 0 away from it; null when clean and corrupt are closer than 0.05 of probability, "
        "0.1 of a logit or 0.01 nats"
    )
    bottom: list[GridCell] = Field(
        description="the k cells that lower it most. Cells that change it by less than a hundredth of clean - corrupt, "
        "or than rounding may, are in neither; the notice says how many that were"
    )
    differs: list[TokenPair] = Field(description="where the prompts' tokens differ (the first 20)")
    cells: int
    identical_cells: int = Field(description="before the first difference: equal to the corrupt run by construction")
    applied: int = Field(description="rows replaced, over all cells")
    layer_rows: int = Field(description="rows that went through a layer; one run of the prompt has layers x tokens")
    handle: str = Field(description="act: handle of the whole grid, tensor 'grid', for read_tensor")
