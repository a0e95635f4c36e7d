"""`Settings`: the metadata of a GGUF file's architecture, read entry by entry."""

from typing import Any

from engine.errors import DamagedFile, UnknownModel, clipped
from engine.gguf_file import GgufFile

WHOLE_MODEL = {"general.type": "model", "split.count": 1}
"""Entries that say otherwise of adapters, vision parts and files in several parts."""


class Settings:
    """Metadata by their names without the architecture in front: `get("block_count")` is llama.block_count.

    Remembers what was read: an entry that no reader knows could change the computation.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._prefix = f"{file.metadata['general.architecture']}."
        self._read: set[str] = set()
        for key, only in WHOLE_MODEL.items():
            if (found := file.metadata.get(key, only)) != only:
                raise self._refusal(key, found, f"only {only!r} is")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an entry, or `default`."""
        self._read.add(name)
        return self._file.metadata.get(self._prefix + name, default)

    def expect(self, name: str, only: Any, why: str = "") -> None:
        """Refuse any other value; the entry may be absent."""
        if (found := self.get(name, only)) != only:
            raise self.refused(name, found, why or f"only {only!r} is")

    def refused(self, name: str, found: object, why: str) -> UnknownModel:
        """The error for an entry of the architecture."""
        return self._refusal(self._prefix + name, found, why)

    def _refusal(self, key: str, found: object, why: str) -> UnknownModel:
        return UnknownModel(f"{self._file.path.name}: {key} {clipped(found)} is not supported in GGUF files; {why}")

    def missing(self, name: str) -> DamagedFile:
        return DamagedFile(f"{self._file.path.name} has no {self._prefix}{name}; convert the model again")

    def vector(self, name: str) -> list[float] | None:
        """A tensor of one dimension that holds settings, such as factors of rotary frequencies; None if absent."""
        if name not in self._file.tensors:
            return None
        if len(shape := self._file.tensors[name].shape) != 1:
            raise DamagedFile(f"{self._file.path.name}: {name} has shape {shape}; it must have one dimension")
        return [float(value) for value in self._file.dense(name)]

    def tokens(self) -> int | None:
        """The length of the file's vocabulary."""
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, list) else None

    def check_all_read(self) -> None:
        """Raise `UnknownModel` for settings of the architecture that no reader knows."""
        names = (key.removeprefix(self._prefix) for key in self._file.metadata if key.startswith(self._prefix))
        unread = sorted(name for name in names if name not in self._read)
        if unread:
            why = "what it changes is not known here"
            raise self.refused(unread[0], self._file.metadata[self._prefix + unread[0]], why)
