"""`Jobs`: tool calls that go on by themselves, whatever becomes of the request or the connection that started them.

A job is an asyncio task of its own. It runs the very tool that a direct call runs: the same checks, limiter, thread and
words. Instead of telling a client, its progress goes into its run, which the session store keeps; so does what came of
it. It is inside the gate, so that limits hold and stopping the server ends it too. All methods belong to the event
loop's thread.
"""

import asyncio
import platform
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

import anyio
import anyio.to_thread
import numpy as np
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

from engine.errors import InputError, clipped
from schemas.jobs import Estimate
from server import published
from server.gate import UNWIND, Gate, Stopped
from server.logs import log
from server.store import Run, SessionStore, State

SAVE_EVERY = 1.0
"""Seconds between saves of a run's progress."""
clock = time.monotonic
"""What they are counted by."""


class JobTool(Protocol):
    """A tool as jobs use it."""

    name: str

    def check(self, arguments: dict[str, Any]) -> None:
        """Raise a `ToolError` for arguments that do not fit."""
        ...

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any]) -> Any:
        """The tool's result, or a `ToolError`."""
        ...


@dataclass(eq=False)
class Job:
    """A run that is going on in this process."""

    run: Run
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    begun: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)
    task: asyncio.Task[None] | None = None
    saved: float = field(default_factory=lambda: clock())


class Jobs:
    """Starts, shows and cancels jobs. `count` is told the tool, outcome and seconds of each that ended."""

    def __init__(self, store: SessionStore, gate: Gate, count: Callable[[str, str, float], None]) -> None:
        self._store, self._gate, self._count = store, gate, count
        self._tools: dict[str, JobTool] = {}
        self._going: dict[str, Job] = {}

    def offer(self, tools: Iterable[JobTool]) -> None:
        """The tools that may run as jobs."""
        self._tools = {tool.name: tool for tool in tools}

    def _checked(self, name: str, arguments: dict[str, Any]) -> JobTool:
        if name not in self._tools:
            raise InputError(f"{clipped(name)} does not run as a job; these do: {', '.join(self._tools)}")
        tool = self._tools[name]
        tool.check(arguments)
        return tool

    async def estimate(self, name: str, arguments: dict[str, Any]) -> Estimate:
        """What a job would take: the tool's own checks run, and passes that are timed, but not its work."""
        made: Estimate = await self._checked(name, arguments).run(arguments, DryRun())
        return made

    async def start(self, name: str, arguments: dict[str, Any], owner: str) -> Run:
        """Begin a job; raises `InputError` or `ToolError` for a tool or arguments that cannot be one.

        Returns when the job is inside the gate: until then the caller's place is its place.
        """
        tool = self._checked(name, arguments)
        run = await anyio.to_thread.run_sync(self._store.start_run, owner, name, arguments, _versions())
        job = self._going[run.handle] = Job(run)
        job.task = asyncio.get_running_loop().create_task(self._work(job, tool))
        await job.begun.wait()
        return run

    async def state(self, handle: str, owner: str, wait: float = 0) -> Run:
        """The run as it stands, or as it ends within so many seconds. Raises `UnknownHandle`."""
        job = self._going.get(handle)  # before the store is read: a job that is not here has saved its end
        run = await anyio.to_thread.run_sync(self._store.run, handle, owner)
        if job is None:
            return run
        with anyio.move_on_after(wait):
            await job.ended.wait()
        return job.run

    async def cancel(self, handle: str, owner: str) -> Run:
        """Stop a job at its next layer; returns its run, which may still be running when a layer takes long."""
        run = await self.state(handle, owner)
        if run.state != "running":
            return run
        if (job := self._going.get(handle)) is None:
            raise InputError(f"{handle} runs in another server process; it is cancelled where it was started")
        job.scope.cancel()
        return await self.state(handle, owner, UNWIND)

    # --- inside the job's own task --------------------------------------------------------------------------

    async def _work(self, job: Job, tool: JobTool) -> None:
        try:
            with self._gate.taken_over(job.run.owner):
                job.begun.set()
                await self._call(job, tool)
        except Stopped:
            pass  # its run says so
        except Exception:
            log.exception("how %s ended could not be saved", job.run.handle)
        finally:
            del self._going[job.run.handle]
            job.ended.set()

    async def _call(self, job: Job, tool: JobTool) -> None:
        """Run the tool and save what came of it before the gate is left."""
        end: dict[str, Any] = {"state": "interrupted", "error": "the server was stopped while this job was running"}
        try:
            with job.scope:
                result: BaseModel = await tool.run(dict(job.run.arguments), Reporter(partial(self._progress, job)))
                end = {"state": "done", "result": published.content(result)}
            if job.scope.cancelled_caught:
                end = {"state": "cancelled"}
        except ToolError as error:
            end = {"state": "failed", "error": str(error)}
        finally:
            now = time.time()
            job.run = replace(job.run, ended=now, **end)
            with anyio.CancelScope(shield=True):
                await self._save(job)
            self._count(tool.name, OUTCOMES[job.run.state], now - job.run.started)

    async def _progress(self, job: Job, done: float, total: float | None, what: str | None) -> None:
        job.run = replace(job.run, done=int(done), total=None if total is None else int(total), what=what or "")
        if clock() - job.saved < SAVE_EVERY:
            return
        try:
            await self._save(job)
        except Exception:  # a job is not given up for that: its end is what matters
            log.exception("how far %s is could not be saved", job.run.handle)

    async def _save(self, job: Job) -> None:
        job.saved = clock()
        await anyio.to_thread.run_sync(self._store.save_run, job.run)


OUTCOMES: dict[State, str] = {"done": "ok", "failed": "error", "cancelled": "cancelled", "interrupted": "stopped"}
"""A run's end as metrics call it."""


class Reporter(Context[Any, Any]):
    """The context of a call that no client waits for: progress goes to `told`."""

    _told: Callable[..., Awaitable[None]]

    def __init__(self, told: Callable[..., Awaitable[None]]) -> None:
        super().__init__()
        self._told = told

    async def report_progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        await self._told(progress, total, message)


class DryRun(Context[Any, Any]):
    """The context of a call that only says what it would take."""

    def __init__(self) -> None:
        super().__init__()


def _versions() -> dict[str, str]:
    return {"mechscope": version("mechscope"), "numpy": np.__version__, "python": platform.python_version()}
