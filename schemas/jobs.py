"""Results about jobs."""

from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.base import Number, Strict

State = Literal["running", "done", "failed", "cancelled", "interrupted"]


class Estimate(Strict):
    """What some work would take on this machine."""

    forwards: Number = Field(description="in passes of the prompt; a decoded token is one too")
    seconds: Number = Field(description="from passes of the same kind, timed now")
    bytes: int = Field(description="held at one time, about, beside the weights")


class Started(Strict):
    """A job that was started, or with dry_run what it would take."""

    run: Annotated[str | None, Field(description="its handle, for get_job and cancel_job")] = None
    estimate: Estimate | None = None


class JobState(Strict):
    """Whether a job is still going on."""

    run: str
    state: State


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


class Job(JobState):
    """A tool call that goes on by itself, and what came of it."""

    tool: str
    done: int
    total: int | None = None
    what: str = Field(description="what is being done, out of `total` when that is known")
    seconds: Number
    result: Annotated[dict[str, Any] | None, Field(description="the tool's own result, when done")] = None
    error: str | None = None
