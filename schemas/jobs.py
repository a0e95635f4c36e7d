"""Results about jobs."""

from typing import Any, Literal

from pydantic import Field

from schemas.base import Number, Strict


class Job(Strict):
    """A tool call that goes on by itself."""

    run: str = Field(description="its handle, for get_job and cancel_job")
    tool: str
    state: Literal["running", "done", "failed", "cancelled", "interrupted"]
    done: int
    total: int | None
    what: str = Field(description="what is being done, out of `total` when that is known")
    seconds: Number


class JobResult(Job):
    """A job and what came of it."""

    result: dict[str, Any] | None = Field(description="the tool's own result, when done")
    error: str | None
