"""What `load_model` says of a directory's files."""

from pathlib import Path

import pytest
import tiny_files
from clients import ask, connected

from server.app import build_server
from server.lab import Lab

pytestmark = pytest.mark.anyio


async def test_weight_files_that_were_not_read_are_named_in_the_receipt_and_only_there(tmp_path: Path) -> None:
    plain, strewn = (tiny_files.hf_directory(tmp_path / name) for name in ("plain", "strewn"))
    for i in range(14):
        (strewn / f"stray-{i:02}.safetensors").write_bytes(b"")
    async with connected(build_server(Lab())) as client:
        receipts = [await ask(client, "load_model", model=str(path)) for path in (plain, strewn)]
        tokens = await ask(client, "tokenize", text="the", model=receipts[1]["model"])
    assert [receipt.get("notice") for receipt in (receipts[0], tokens)] == [None, None]
    names = ", ".join(f"stray-{i:02}.safetensors" for i in range(12))
    assert receipts[1]["notice"] == f"weight files beside the model's own were not read: {names} and 2 more"
