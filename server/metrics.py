"""What is counted while serving, in Prometheus' terms: `Metrics`, one per server.

Tokens are counted deep inside a call, where nobody hands `Metrics` on; the one in use there is in a context variable
(`measuring`), which worker threads and tasks inherit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from server.gate import Gate
from server.lab import Lab

BUCKETS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
LATENESS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
SAMPLE = 0.02
"""Seconds between looks at the event loop."""

_measuring: ContextVar["Metrics | None"] = ContextVar("measuring", default=None)


class Metrics:
    """Counters of calls, and gauges that look at the lab and the gate when they are read."""

    def __init__(self, lab: Lab, gate: Gate) -> None:
        self.registry = made = CollectorRegistry()
        ProcessCollector(registry=made)
        self.calls = Counter("mechscope_calls", "Tool calls by outcome", ["tool", "outcome"], registry=made)
        self.seconds = Histogram(
            "mechscope_call_seconds", "Time of tool calls, waiting included", ["tool"], buckets=BUCKETS, registry=made
        )
        self.tokens = Counter("mechscope_tokens", "Tokens read as prompts and tokens written", ["kind"], registry=made)
        self.faults = Counter("mechscope_faults", "Calls that failed inside mechscope: defects", registry=made)
        self.requests = Counter("mechscope_http_requests", "HTTP requests", ["path", "status"], registry=made)
        self.lateness = Histogram(
            "mechscope_loop_delay_seconds", "How late the event loop wakes a timer", buckets=LATENESS, registry=made
        )
        held = Gauge("mechscope_bytes_held", "Bytes in memory", ["what"], registry=made)
        held.labels("models").set_function(lambda: sum(item.model.params.nbytes for item in lab.models))
        held.labels("records").set_function(lambda: lab.store.bytes_in_memory)
        disk = Gauge("mechscope_bytes_on_disk", "Bytes of records and runs in the workspace", registry=made)
        disk.set_function(lambda: lab.store.bytes_on_disk)
        inside = Gauge("mechscope_calls_inside", "Tool calls that run or wait", registry=made)
        inside.set_function(lambda: gate.inside)
        queue = Gauge("mechscope_queue", "Tool calls that wait for a model", registry=made)
        queue.set_function(lambda: sum(slot.limiter.statistics().tasks_waiting for slot in lab.slots))

    async def follow_loop(self) -> None:
        """Set timers for ever, and note how late they go off: while a loop is held up, nobody is answered."""
        while True:
            due = anyio.current_time() + SAMPLE
            await anyio.sleep_until(due)
            self.lateness.observe(max(anyio.current_time() - due, 0.0))

    def shown(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """`count_tokens` and `count_fault` count here, for the length of a `with` block."""
        token = _measuring.set(self)
        try:
            yield
        finally:
            _measuring.reset(token)


def count_tokens(kind: str, count: int) -> None:
    """Count tokens of the call that is running, if it is measured; `kind` is "read" or "written"."""
    if (metrics := _measuring.get()) is not None:
        metrics.tokens.labels(kind).inc(count)


def count_fault() -> None:
    """Count a defect that the call that is running met."""
    if (metrics := _measuring.get()) is not None:
        metrics.faults.inc()
