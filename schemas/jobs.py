"""Results about jobs."""

from typing import Any, Literal

from pydantic import Field

from schemas.base import Number, Strict

State = Literal["running", "done", "failed", "cancelled", "interrupted"]


class Job(Strict):
    """A tool call that goes on by itself."""

    run: str = Field(description="its handle, for get_job and cancel_job")
    tool: str
    state: State
    done: int
    total: int | None
    what: str = Field(description="what is being done, out of `total` when that is known")
    seconds: Number


class RunRecord(Strict):
    """A run as it is kept."""

    run: str
    tool: str
    arguments: dict[str, Any]
    state: State
    done: int
    total: int | None
    what: str
    started: float = Field(description="seconds since 1970")
    ended: float | None
    result: dict[str, Any] | None
    error: str | None
    provenance: dict[str, Any]


class JobResult(Job):
    """A job and what came of it."""

    result: dict[str, Any] | None = Field(description="the tool's own result, when done")
    error: str | None
