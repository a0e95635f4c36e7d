"""Ten thousand calls from hypothesis, on a synthetic model through a real client: each is answered in time, with a
result that its published schema describes or an error in words.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import toolcalls
from anyio.from_thread import BlockingPortal, start_blocking_portal
from clients import connected
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp.types import CallToolResult, Tool

from server.app import build_server
from server.call import LOCAL
from server.lab import Lab
from server.sources import Sources
from server.tools import TOOLS

pytestmark = pytest.mark.e2e

CALLS = 10_000
EACH = math.ceil(CALLS / len(TOOLS))
ACCEPTED = 0.2
"""The least share of calls that must be taken: a fuzzer whose calls are all refused tests the door only."""
WITHIN = 20.0
"""Seconds for one call. The longest of 512 tokens takes one or two on a quiet machine."""
MOST_WORDS = 4000
"""Characters of an error."""

KEPT = {
    "act": ("capture_residuals", {"prompt": toolcalls.TEXTS[0], "positions": "all"}),
    **{
        point: ("capture_residuals", {"prompt": toolcalls.TEXTS[0], "points": [point], "positions": "all"})
        for point in toolcalls.CAPTURED
    },
    "several": ("capture_residuals", {"prompt": toolcalls.TEXTS[1], "points": toolcalls.CAPTURED, "layers": [1, 3]}),
    "grid": ("causal_trace", {"clean": toolcalls.TEXTS[2], "corrupt": toolcalls.TEXTS[3], "metric": "kl"}),
    "run": (
        "start_job",
        {"tool": "generate_with_hooks", "arguments": {"prompt": toolcalls.TEXTS[0], "max_new_tokens": 10}},
    ),
    "kv": ("prefill_inject", {"recipient": toolcalls.TEXTS[0], "donor": toolcalls.TEXTS[1], "keep": True}),
}
"""slot -> the call that makes its handle, where there is such a tool"""


class Session:
    """A server without network and files, a client, and a handle in every slot of `toolcalls`."""

    def __init__(self, portal: BlockingPortal, lab: Lab, client: Client) -> None:
        self._portal, self._lab, self._client = portal, lab, client
        self.tools: dict[str, Tool] = {tool.name: tool for tool in portal.call(client.list_tools).tools}
        self.handles: dict[str, str] = {}
        self.restore()

    def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        answer = self._portal.start_task_soon(self._client.call_tool, tool, arguments)
        assert wait([answer], WITHIN).done, f"no answer within {WITHIN:.0f} s"
        return answer.result()

    def restore(self, running: bool = False) -> None:
        """What calls kept is forgotten, what they released is made again; and the job, if it is to be `running`."""
        for item in self._lab.models[1:] if len(self._lab.models) > 1 else ():
            self._lab.release_model(item.handle)
        if not self._lab.models:
            self._lab.load("synthetic", "dense")
        self.handles["model"] = self._lab.models[0].handle
        store = self._lab.store
        states = {run.handle: run.state for run in store.runs(LOCAL)}
        held = {record.handle for record in store.records(LOCAL)} | states.keys()
        for handle in held - set(self.handles.values()):
            store.release(handle, LOCAL)
        held -= {handle for handle, state in states.items() if running and state != "running"}
        for slot, (tool, arguments) in KEPT.items():
            if tool in self.tools and self.handles.get(slot) not in held:
                made = self.call(tool, arguments).structured_content
                assert made is not None
                self.handles[slot] = made["run" if slot == "run" else "handle"]
        if self.handles.get("vec") not in held:
            vector = {"vector": np.linspace(-1, 1, toolcalls.WIDTH, dtype=np.float32)}
            model = self._lab.models[0]
            made_by = {"model": model.handle, "fingerprint": model.model.fingerprint}
            self.handles["vec"] = store.put("vec", "ramp", LOCAL, vector, {"about": "a ramp"} | made_by)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr("engine.catalog.cache_dir", lambda: tmp_path)
    lab = Lab(sources=Sources([], downloads=False))
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(connected(build_server(lab))) as client,
    ):
        yield Session(portal, lab, client)


def judge(result: CallToolResult, schema: dict[str, Any]) -> None:
    """What every answer to any call must be."""
    text = "".join(part.text for part in result.content if part.type == "text")
    text.encode()
    if result.is_error:
        assert result.structured_content is None
        assert not text.startswith("Error executing tool"), text
        assert "failed inside mechscope" not in text, text
        assert 10 < len(text) < MOST_WORDS, text
        return
    jsonschema.Draft202012Validator(schema).validate(result.structured_content)
    json.dumps(result.structured_content, allow_nan=False, ensure_ascii=False).encode()


def drawn(examples: int) -> settings:
    """The same draws at every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("tool", [function.__name__ for function in TOOLS])
def test_every_call_is_answered_by_its_schema_or_in_words(session: Session, tool: str) -> None:
    listed = session.tools[tool]
    about_jobs = "run" in listed.input_schema["properties"]
    outcomes: Counter[bool] = Counter()

    @drawn(EACH)
    @given(toolcalls.calls(tool, listed.input_schema))
    def every_call(arguments: dict[str, Any]) -> None:
        result = session.call(tool, toolcalls.filled(arguments, session.handles))
        judge(result, listed.output_schema or {})
        outcomes[not result.is_error] += 1
        if not result.is_error:
            session.restore(running=about_jobs)

    every_call()
    assert outcomes.total() >= EACH
    share = outcomes[True] / outcomes.total()
    print(f"{tool}: {share:.0%} of {outcomes.total()} calls accepted")
    assert share >= ACCEPTED


SEQUENCES = 40
"""Drawn pairs of calls for each tool that makes a handle."""


@pytest.mark.parametrize("maker", toolcalls.FOLLOWED)
def test_what_a_drawn_call_made_the_next_calls_take_or_refuse_in_words(session: Session, maker: str) -> None:
    fixed, follow = toolcalls.FOLLOWED[maker]
    outcomes: Counter[bool] = Counter()

    def answered(tool: str, arguments: dict[str, Any], made: str = "") -> CallToolResult:
        result = session.call(tool, toolcalls.filled(arguments, session.handles | {"made": made}))
        judge(result, session.tools[tool].output_schema or {})
        return result

    @drawn(SEQUENCES)
    @given(st.data())
    def both_calls(data: st.DataObject) -> None:
        arguments = data.draw(toolcalls.sound(maker, session.tools[maker].input_schema))
        made = answered(maker, arguments | fixed).structured_content
        if made is None:
            return
        for tool, asked in follow.items():
            taken = answered(tool, data.draw(asked), made["run" if maker == "start_job" else "handle"])
            outcomes[not taken.is_error] += 1
        session.restore()

    both_calls()
    share = outcomes[True] / outcomes.total()
    print(f"{maker}: {share:.0%} of {outcomes.total()} calls about what it made were accepted")
    assert share >= ACCEPTED


def test_every_layer_that_a_capture_of_any_point_lists_is_there(session: Session) -> None:
    for point in ("resid_post", *toolcalls.CAPTURED):
        made = session.call("capture_residuals", {"prompt": toolcalls.TEXTS[0], "points": [point]}).structured_content
        assert made is not None
        for layer in made["layers"]:
            page = session.call("read_tensor", {"handle": made["handle"], "tensor": f"{point}.{layer}"})
            assert not page.is_error, (point, layer)
