"""Resources: JSON about what is loaded and held, listed page by page, for the caller only."""

import json

import pytest
from clients import ERAS, ask, connected
from mcp import Client, MCPError

from server.app import build_server
from server.auth import LOCAL
from server.lab import Lab
from server.resources import MOST_ITEMS, PAGE

pytestmark = pytest.mark.anyio


async def read(client: Client, uri: str) -> dict:
    (content,) = (await client.read_resource(uri)).contents
    assert content.mime_type == "application/json"
    return json.loads(content.text)


async def listed(client: Client) -> list[str]:
    pages = [await client.list_resources()]
    while pages[-1].next_cursor is not None:
        pages.append(await client.list_resources(cursor=pages[-1].next_cursor))
    return [resource.uri for page in pages for resource in page.resources]


@pytest.mark.parametrize("mode", ERAS)
async def test_the_resources_show_models_session_tensors_and_runs(lab: Lab, mode: str) -> None:
    async with connected(build_server(lab), mode) as client:
        act = (await ask(client, "capture_residuals", prompt="hello", positions="all"))["handle"]
        run = (await ask(client, "start_job", tool="logit_lens", arguments={"prompt": "hello"}))["run"]
        job = await ask(client, "get_job", run=run)
        assert await listed(client) == [
            "mechscope://models",
            f"mechscope://runs/{run}",
            "mechscope://session",
            f"mechscope://tensors/{act}",
        ]
        model = await ask(client, "load_model", model="synthetic")
        models = await read(client, "mechscope://models")
        assert models["loaded"] == [{name: value for name, value in model.items() if name != "seconds"}]
        assert [known["name"] for known in models["known"]] == ["smollm2-135m-instruct"]
        assert await read(client, "mechscope://session") == await ask(client, "list_session")
        kept = await read(client, f"mechscope://runs/{run}")
        assert (kept["arguments"], kept["result"], kept["state"]) == ({"prompt": "hello"}, job["result"], "done")


async def test_a_tensors_resource_has_shapes_and_statistics_and_no_numbers(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        act = (await ask(client, "capture_residuals", prompt="x" * 100, positions="all"))["handle"]
        record = await read(client, f"mechscope://tensors/{act}")
        page = await ask(client, "read_tensor", handle=act, tensor="resid_post.2")
        encoded = await read(client, f"mechscope://tensors/{act.replace(':', '%3A')}")
    summary = next(tensor for tensor in record["tensors"] if tensor["name"] == "resid_post.2")
    assert summary == {name: page[name] for name in ("shape", "mean", "std", "min", "max", "norm")} | {
        "name": "resid_post.2",
        "dtype": "float32",
    }
    assert record["provenance"]["prompt_ids"] == [120] * MOST_ITEMS + [f"... and {100 - MOST_ITEMS} more"]
    assert len(json.dumps(record)) < 4000
    assert encoded == record


async def test_the_listing_comes_in_pages_that_hold_everything_once(lab: Lab) -> None:
    handles = [lab.store.put("act", f"{i}", LOCAL, {}, {}) for i in range(2 * PAGE + 10)]
    async with connected(build_server(lab)) as client:
        first = await client.list_resources()
        assert len(first.resources) == PAGE
        gone = handles[0]
        lab.store.release(gone, LOCAL)
        uris = await listed(client)
    assert len(uris) == len(set(uris)) == 2 * PAGE + 10 - 1 + 2
    assert {f"mechscope://tensors/{handle}" for handle in handles if handle != gone} < set(uris)


async def test_a_handle_released_between_two_pages_skips_nothing(lab: Lab) -> None:
    for i in range(PAGE + 10):
        lab.store.put("act", f"{i}", LOCAL, {}, {})
    async with connected(build_server(lab)) as client:
        first = await client.list_resources()
        for resource in first.resources[5:10]:
            if resource.name.startswith("act:"):
                lab.store.release(resource.name, LOCAL)
        second = await client.list_resources(cursor=first.next_cursor)
    assert len(second.resources) == 12
    assert second.next_cursor is None


async def test_a_cursor_from_elsewhere_is_refused(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        with pytest.raises(MCPError, match="without a cursor"):
            await client.list_resources(cursor="17")


@pytest.mark.parametrize("mode", ERAS)
@pytest.mark.parametrize("uri", ["tensors/act:gone-00", "runs/run:gone-00"])
async def test_an_unknown_handle_is_not_found_in_words_that_help(lab: Lab, uri: str, mode: str) -> None:
    async with connected(build_server(lab), mode) as client:
        with pytest.raises(MCPError, match="list_session shows the handles") as missing:
            await client.read_resource(f"mechscope://{uri}")
    assert missing.value.error.code == -32602
    assert missing.value.error.data == {"uri": f"mechscope://{uri}"}


async def test_another_principals_handles_are_not_found_and_not_listed(lab: Lab) -> None:
    act, run = lab.store.put("act", "x", "ann", {}, {}), lab.store.start_run("ann", "logit_lens", {}, {}).handle
    async with connected(build_server(lab)) as client:
        assert await listed(client) == ["mechscope://models", "mechscope://session"]
        for uri in (f"mechscope://tensors/{act}", f"mechscope://runs/{run}"):
            with pytest.raises(MCPError, match="no such handle"):
                await client.read_resource(uri)


async def test_listings_are_never_cached_for_others(lab: Lab) -> None:
    async with connected(build_server(lab)) as client:
        listing = await client.list_resources()
        session = await client.read_resource("mechscope://session")
    assert [(r.ttl_ms, r.cache_scope) for r in (listing, session)] == [(0, "private")] * 2
