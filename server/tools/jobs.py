"""Calls that go on by themselves: start_job, get_job, cancel_job."""

import time
from typing import Annotated, Any

from pydantic import Field

from schemas.jobs import Job, JobResult
from server.call import Call
from server.store import Run

RunHandle = Annotated[str, Field(description="the run: handle of a job")]


async def start_job(
    call: Call, tool: str, arguments: Annotated[dict[str, Any], Field(description="the tool's own arguments")]
) -> Job:
    """Start a tool as a job that goes on when this call, or the connection, ends. Returns its run: handle at once.

    For work that may take more than 30 seconds, such as causal_trace on long prompts or load_model with a download.
    Then: get_job for progress and the result, cancel_job to stop it.
    """
    return Job(**_shown(await call.jobs.start(tool, arguments, call.owner)))


async def get_job(
    call: Call,
    run: RunHandle,
    wait_seconds: Annotated[float, Field(ge=0, le=20, description="how long to wait for its end")] = 10,
) -> JobResult:
    """Get a job's state and progress and, when it is done, the result that the tool itself would have returned.

    While its state is running, call again. Results stay until release.
    """
    found = await call.jobs.state(run, call.owner, wait_seconds)
    result = None if found.result is None else dict(found.result)
    return JobResult(**_shown(found), result=result, error=found.error)


async def cancel_job(call: Call, run: RunHandle) -> Job:
    """Stop a job at its next layer. What it had computed is given up; a job that has ended stays as it is."""
    return Job(**_shown(await call.jobs.cancel(run, call.owner)))


def _shown(run: Run) -> dict[str, Any]:
    until = time.time() if run.ended is None else run.ended
    return {
        "run": run.handle,
        "tool": run.tool,
        "state": run.state,
        "done": run.done,
        "total": run.total,
        "what": run.what,
        "seconds": max(0.0, until - run.started),
    }
