"""Calls that go on by themselves: start_job, get_job, cancel_job."""

import time
from typing import Annotated, Any

from pydantic import Field

from engine.errors import InputError
from schemas.jobs import Job, JobState, Started
from server.call import Call

RunHandle = Annotated[str, Field(description="run: handle of a job")]


async def start_job(
    call: Call,
    tool: str,
    arguments: Annotated[dict[str, Any], Field(description="the tool's own")],
    dry_run: Annotated[bool, Field(description="only estimate forwards, seconds, bytes")] = False,
) -> Started:
    """Start a tool as a job that outlives this call and the connection. Returns its run: handle at once.

    For work that may take more than 30 seconds; dry_run=true tells beforehand. Then get_job for progress and result,
    cancel_job to stop it.
    """
    if not dry_run:
        return Started(run=(await call.jobs.start(tool, arguments, call.owner)).handle)
    if tool == "load_model":
        raise InputError("load_model cannot be estimated without loading; list_session shows what is loaded already")
    return Started(estimate=await call.jobs.estimate(tool, arguments))


async def get_job(
    call: Call,
    run: RunHandle,
    wait_seconds: Annotated[float, Field(ge=0, le=20)] = 10,
) -> Job:
    """Get a job's state, progress and, when it is done, the tool's own result; waits for its end, as long as asked.

    While it is running, call again. Results stay until release.
    """
    found = await call.jobs.state(run, call.owner, wait_seconds)
    until = time.time() if found.ended is None else found.ended
    return Job(
        run=found.handle,
        tool=found.tool,
        state=found.state,
        done=found.done,
        total=found.total,
        what=found.what,
        seconds=max(0.0, until - found.started),
        result=None if found.result is None else dict(found.result),
        error=found.error,
    )


async def cancel_job(call: Call, run: RunHandle) -> JobState:
    """Stop a job at its next layer. What it had computed is given up; a job that has ended stays as it is."""
    found = await call.jobs.cancel(run, call.owner)
    return JobState(run=found.handle, state=found.state)
