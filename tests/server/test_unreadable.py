"""What a server process cannot read is answered, with the id that it names, on every transport."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from clients import SCRIPT
from serving import Served, serving

HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
START = {"jsonrpc": "2.0", "id": "start", "method": "initialize", "params": HELLO}
ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


def tokenizing(text: str) -> str:
    """A call of `tokenize` as it is written, whatever is in the text."""
    call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "tokenize", "arguments": "HERE"}}
    return json.dumps(call).replace('"HERE"', f'{{"text": {text}}}')


UNREADABLE = {
    "half a surrogate": '"\\ud800"',
    "the other half": '"a\\udc00b"',
    "half a surrogate in a key": '1, "\\ud800": 2',
    "five hundred lists": "[" * 500 + "]" * 500,
    "a number of 5000 digits": "1" * 5000,
}


class Piped:
    """`mechscope serve`, spoken to through pipes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([SCRIPT, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.send(json.dumps(START))
        assert self.answer()["id"] == "start"
        self.send('{"jsonrpc": "2.0", "method": "notifications/initialized"}')

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def piped() -> Iterator[Piped]:
    made = Piped()
    yield made
    made.process.communicate(timeout=20)
    assert made.process.returncode == 0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as made:
        yield made


@pytest.mark.parametrize("name", UNREADABLE)
def test_over_stdio_a_request_that_cannot_be_read_gets_an_error_with_its_id(piped: Piped, name: str) -> None:
    piped.send(tokenizing(UNREADABLE[name]))
    told = piped.answer()
    assert (told["id"], told["error"]["code"]) == (7, -32700)
    assert "surrogate" in told["error"]["message"] or "surrogate" not in name
    piped.send('{"jsonrpc": "2.0", "id": 8, "method": "ping"}')
    assert piped.answer() == {"jsonrpc": "2.0", "id": 8, "result": {}}


def test_over_stdio_what_names_no_id_is_answered_and_an_empty_line_is_not(piped: Piped) -> None:
    lines = {"hello": -32700, "[]": -32600, '{"id": 9, "method": "ping"}': -32600, "[" * 5000: -32700}
    for line, code in lines.items():
        piped.send("")
        piped.send(line)
        told = piped.answer()
        assert (told["error"]["code"], told["id"]) == (code, 9 if "9" in line else None)


@pytest.mark.parametrize("id_", [1.5, True, [1], {"a": 1}])
def test_a_request_with_an_id_that_no_answer_can_name_gets_an_error(piped: Piped, served: Served, id_: Any) -> None:
    asked = {"jsonrpc": "2.0", "id": id_, "method": "ping"}
    said = "Invalid request: an id is a text or a whole number"
    piped.send(json.dumps(asked))
    assert piped.answer() == {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": said}}
    piped.send('{"jsonrpc": "2.0", "id": "next", "method": "ping"}')
    assert piped.answer()["id"] == "next"
    session = {"Mcp-Session-Id": httpx.post(f"{served.base}/mcp", json=START, headers=ACCEPT).headers["mcp-session-id"]}
    answer = httpx.post(f"{served.base}/mcp", json=asked, headers=ACCEPT | session)
    assert (answer.status_code, answer.json()["id"]) == (400, None)


@pytest.mark.parametrize("name", UNREADABLE)
def test_over_http_a_request_that_cannot_be_read_gets_an_error_with_its_id(served: Served, name: str) -> None:
    session = {"Mcp-Session-Id": httpx.post(f"{served.base}/mcp", json=START, headers=ACCEPT).headers["mcp-session-id"]}
    answer = httpx.post(f"{served.base}/mcp", content=tokenizing(UNREADABLE[name]), headers=ACCEPT | session)
    assert answer.status_code == 400
    assert (answer.json()["id"], answer.json()["error"]["code"]) == (7, -32700)


def test_over_sse_a_request_that_cannot_be_read_gets_an_error_with_its_id(served: Served) -> None:
    with httpx.stream("GET", f"{served.base}/sse", timeout=20) as events:
        told = (line.removeprefix("data:").strip() for line in events.iter_lines() if line.startswith("data:"))
        place = served.base + next(told)
        assert httpx.post(place, json=START).status_code == 202
        assert json.loads(next(told))["id"] == "start"
        assert httpx.post(place, content=tokenizing('"\\ud800"'), headers=ACCEPT).status_code == 400
        assert json.loads(next(told))["id"] == 7
