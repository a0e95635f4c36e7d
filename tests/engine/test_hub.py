"""What a hub id fetches: what would be read of a directory. The hub library speaks to a small hub of the tests' own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_files

import engine

COMMIT = "0123abcd" * 5
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LOAD = """
import sys, engine
try:
    model = engine.load_model(sys.argv[1], converted=False)
    print(model.fingerprint)
except engine.EngineError as error:
    print(f"{type(error).__name__}: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Serves the files of one directory as the repository owner/name; `given` are those that were asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.given = root, set[str]()

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/owner/name/revision/main":
            self._send(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "oid": _oid(self.server.root / name)} for name in self.server.files()
            ]
            sizes = [(self.server.root / name).stat().st_size for name in self.server.files()]
            self._send(json.dumps([row | {"size": size} for row, size in zip(rows, sizes, strict=True)]).encode())
        elif (name := path.removeprefix(f"/owner/name/resolve/{COMMIT}/")) in self.server.files():
            self.server.given.add(name)
            self._send((self.server.root / name).read_bytes(), {"ETag": _oid(self.server.root / name)})
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "repository").mkdir()
    with Hub(tmp_path / "repository") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def loaded(hub: Hub, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(hub.root.with_name("home"))}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OPENBLAS_NUM_THREADS": "1"} | more
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, "owner/name"], env=environment, cwd=hub.root.parent, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def fill(hub: Hub, shards: int = 1) -> str:
    """A repository with all that belongs to a model, and much beside it; the fingerprint of the model."""
    hub.root.rmdir()
    path = tiny_files.hf_directory(hub.root, shards=shards)
    fingerprint = engine.load_model(path, converted=False).fingerprint
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json"):
        (path / name).write_text("{}")
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{{ messages[0]['content'] }}")
    for name in STRANGERS:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"not to be fetched")
    return fingerprint


BESIDE = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
}  # fmt: skip
STRANGERS = (
    "consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors", "optimizer.bin",
    "pytorch_model.bin", "modeling.py", "README.md", "original/consolidated.00.pth", "original/config.json",
    "onnx/model.safetensors", "tokenizer/tokenizer.json", "trainer_state.json",
)  # fmt: skip


def test_a_hub_id_fetches_what_is_read_of_a_directory_and_nothing_else(hub: Hub) -> None:
    fingerprint = fill(hub)
    assert loaded(hub) == fingerprint
    assert hub.given == BESIDE | {SINGLE}


def test_and_of_shards_those_that_the_index_names(hub: Hub) -> None:
    fingerprint = fill(hub, shards=2)
    (hub.root / "model-00003-of-00003.safetensors").write_bytes(b"of another set")
    assert loaded(hub) == fingerprint
    assert hub.given == BESIDE | {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_shards_beside_a_single_file_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    fill(hub, shards=2)
    single = tiny_files.hf_directory(tmp_path / "single", tiny_files.weights(seed=1))
    (hub.root / SINGLE).write_bytes((single / SINGLE).read_bytes())
    assert loaded(hub) == engine.load_model(single, converted=False).fingerprint
    assert hub.given == BESIDE | {INDEX, SINGLE}


def test_a_file_that_config_json_names_is_fetched(hub: Hub) -> None:
    fingerprint = fill(hub)
    (hub.root / SINGLE).rename(hub.root / "mine.safetensors")
    (hub.root / "config.json").write_text(json.dumps(tiny_files.CONFIG | {"transformers_weights": "mine.safetensors"}))
    assert loaded(hub) == fingerprint
    assert hub.given == BESIDE | {"mine.safetensors"}


def test_what_was_fetched_is_loaded_without_a_network(hub: Hub) -> None:
    fingerprint = fill(hub, shards=2)
    assert loaded(hub) == fingerprint
    hub.given.clear()
    assert loaded(hub, HF_HUB_OFFLINE="1") == fingerprint
    assert hub.given == set()


def test_a_repository_of_a_variant_alone_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    fill(hub)
    (hub.root / SINGLE).unlink()
    assert loaded(hub).startswith("UnknownModel: 'owner/name' has no model.safetensors on the hub, nor an index")
    assert hub.given == BESIDE
