"""Resources: what is loaded and held, as JSON to read.

mechscope://models             models that are loaded, and names that load_model knows
mechscope://session            what list_session shows
mechscope://tensors/{handle}   how a record was made, and its tensors' shapes and statistics
mechscope://runs/{handle}      a job: what was asked, how far it is, what came of it

The listing has the first two and the caller's own handles, page by page.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import anyio.to_thread
from mcp import MCPError
from mcp.server import MCPServer
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver.exceptions import ResourceNotFoundError
from mcp.types import INVALID_PARAMS, ListResourcesResult, PaginatedRequestParams, Resource

from engine.catalog import CATALOGUE, is_cached
from engine.cost import Cost
from schemas.jobs import RunRecord
from schemas.session import KnownModel, Models, TensorRecord, TensorSummary
from server.auth import principal
from server.call import COPIES_KEPT
from server.lab import Lab
from server.store import Record, StoreError
from server.tools.session import described, held, statistics

SCHEME = "mechscope://"
TENSORS, RUNS = f"{SCHEME}tensors/{{handle}}", f"{SCHEME}runs/{{handle}}"
JSON = "application/json"
PAGE = 50
MOST_TENSORS = 40
"""That a record shows."""
MOST_ITEMS = 64
"""Of a list in a record's provenance."""

Kept = TypeVar("Kept")


class Resources:
    """What is read of one lab, always for the caller."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def models(self) -> str:
        """The models that are loaded, with handle and shape, and those that load_model knows by name."""
        loaded = [described(item) for item in self._lab.models]
        known = [KnownModel(name=name, cached=is_cached(name)) for name in CATALOGUE]
        return Models(loaded=loaded, known=known).model_dump_json()

    def session(self) -> str:
        """What you hold and what it costs, as list_session shows it: the newest handles, and how many there are."""
        return held(self._lab, principal()).model_dump_json(exclude_defaults=True)

    def tensors(self, handle: str) -> str:
        """How captured tensors or a kept cache were made, and the tensors' shapes and statistics."""
        return _found(lambda handle, owner: self._read(self._lab.store.get(handle, owner)), handle).model_dump_json()

    def _read(self, record: Record) -> TensorRecord:
        """Raises `OutOfSpace` when the tensors have to be read, and there is no room for that."""
        reader = object()
        try:
            self._lab.memory.take(reader, Cost(nbytes=0 if record.in_memory else COPIES_KEPT * record.nbytes), 1)
            return _record(record)
        finally:
            self._lab.memory.give_back(reader)

    def runs(self, handle: str) -> str:
        """A job: its tool and arguments, how far it is, its result or error."""
        run = _found(self._lab.store.run, handle)
        fields = {name: getattr(run, name) for name in RunRecord.model_fields if name != "run"}
        return RunRecord.model_validate(fields | {"run": run.handle}).model_dump_json()

    async def page(self, ctx: ServerRequestContext[Any], params: PaginatedRequestParams) -> ListResourcesResult:
        """The listing from a cursor on. It is in the order of addresses, so that nothing is skipped or told twice when
        handles come and go between two pages; a cursor is the last address of the page before.
        """
        if params.cursor is not None and not params.cursor.startswith(SCHEME):
            raise MCPError(INVALID_PARAMS, "this cursor is not of this server; list without a cursor from the start")
        every = await anyio.to_thread.run_sync(lambda: sorted(self._listed(), key=lambda resource: resource.uri))
        left = [resource for resource in every if params.cursor is None or resource.uri > params.cursor]
        shown = left[:PAGE]
        return ListResourcesResult(resources=shown, next_cursor=shown[-1].uri if len(left) > PAGE else None)

    def _listed(self) -> Iterator[Resource]:
        store, owner = self._lab.store, principal()
        yield _entry(f"{SCHEME}models", "models", self.models.__doc__)
        yield _entry(f"{SCHEME}session", "session", self.session.__doc__)
        for record in store.records(owner):
            yield _entry(TENSORS.format(handle=record.handle), record.handle, record.provenance.get("about"))
        for run in store.runs(owner):
            yield _entry(RUNS.format(handle=run.handle), run.handle, f"{run.tool}, {run.state}")


def add_resources(server: MCPServer[Any], lab: Lab) -> None:
    """Register the resources, their templates and their listing."""
    found = Resources(lab)
    for uri, read, title in (
        (f"{SCHEME}models", found.models, "Models"),
        (f"{SCHEME}session", found.session, "Session"),
        (TENSORS, found.tensors, "Stored tensors"),
        (RUNS, found.runs, "Job"),
    ):
        server.resource(uri, title=title, mime_type=JSON)(read)
    # MCPServer's own listing knows neither pages nor callers; its low-level server takes another handler.
    server._lowlevel_server.add_request_handler("resources/list", PaginatedRequestParams, found.page)


def _found(get: Callable[[str, str], Kept], handle: str) -> Kept:
    try:
        return get(handle, principal())
    except StoreError as error:
        raise ResourceNotFoundError(str(error)) from None


def _entry(uri: str, name: str, about: str | None) -> Resource:
    return Resource(uri=uri, name=name, description=about or None, mime_type=JSON)


def _record(record: Record) -> TensorRecord:
    shown = list(record.tensors.items())[:MOST_TENSORS]
    return TensorRecord(
        handle=record.handle,
        provenance={name: _short(value) for name, value in record.provenance.items() if name != "tensors"},
        bytes=record.nbytes,
        tensor_count=len(record.tensors),
        tensors=[
            TensorSummary(name=name, shape=list(array.shape), dtype=str(array.dtype), **statistics(array))
            for name, array in shown
        ],
    )


def _short(value: Any) -> Any:
    """JSON in which long lists say how much was left out."""
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        left = [f"... and {len(value) - MOST_ITEMS} more"] if len(value) > MOST_ITEMS else []
        return [*(_short(inner) for inner in value[:MOST_ITEMS]), *left]
    return value
