"""`Sources`: which models `load_model` may be asked for. What a client names is checked before anything is opened."""

import stat
from collections.abc import Sequence
from pathlib import Path

from engine.catalog import CATALOGUE, SYNTHETIC, is_cached, is_hub_id, meant
from engine.errors import UnknownModel, clipped
from engine.weight_files import OPENED


class Sources:
    """Paths below some folders (anywhere when None), and downloads or none.

    A path is followed to where it really leads, through `..` and symbolic links: that place, and everything the engine
    would open there, must be an ordinary file below the folders. What is elsewhere is answered as if it did not exist.
    """

    def __init__(self, roots: Sequence[Path] | None = None, downloads: bool = True) -> None:
        self._roots = None if roots is None else [root.resolve() for root in roots]
        self._downloads = downloads

    def checked(self, name: str) -> str:
        """The name to load by, from wherever: an absolute path, below folders the real one. Raises `UnknownModel`."""
        if name.split(":", 1)[0] == SYNTHETIC:
            return name
        if name in CATALOGUE:
            if not self._downloads and not is_cached(name):
                raise UnknownModel(f"{name} is not in the cache, and downloads are switched off; {self._valid()}")
            return name
        if (path := self._found(name)) is not None:
            self._check_files(path)
            return str(Path(name).expanduser().absolute() if self._roots is None else path)
        if is_hub_id(name) and self._downloads and not _exists(Path(name)):
            return name
        if self._roots is None and not is_hub_id(name):
            return name  # the engine says what is wrong with it
        raise UnknownModel(f"there is no model {clipped(name)} here{meant(name) * self._downloads}; {self._valid()}")

    def allows(self, source: str) -> bool:
        """Whether `load_model` would be let look for it; a file that is gone may still be asked for."""
        try:
            self.checked(source)
        except UnknownModel:
            return False
        return True

    def names(self) -> list[str]:
        """What may be loaded by a path relative to the folders: directories with a config.json, and .gguf files."""
        found = [path for root in self._roots or () for path in sorted(root.iterdir())]
        return [path.name for path in found if path.suffix == ".gguf" or (path / "config.json").is_file()]

    def _found(self, name: str) -> Path | None:
        try:
            path = Path(name).expanduser()
            places = [path] if self._roots is None or path.is_absolute() else [root / path for root in self._roots]
            real = [place.resolve() for place in places if name and place.exists()]
        except (OSError, RuntimeError, ValueError):  # too long, no such home, forbidden, a NUL
            return None
        return next((place for place in real if self._allowed(place)), None)

    def _allowed(self, real: Path) -> bool:
        return self._roots is None or any(real.is_relative_to(root) for root in self._roots)

    def _check_files(self, path: Path) -> None:
        files = [path] if not path.is_dir() else [file for pattern in OPENED for file in path.glob(pattern)]
        for file in files:
            real = file.resolve()
            if not _exists(real) or not stat.S_ISREG(real.stat().st_mode) or not self._allowed(real):
                raise UnknownModel(
                    f"{clipped(file.name)} is not an ordinary file in a folder that models are loaded from: devices, "
                    "pipes and links that lead elsewhere are not opened"
                )

    def _valid(self) -> str:
        hub = ", a hub id" if self._downloads else ""
        paths = "any path"
        if self._roots is not None:
            folders = " or ".join(map(str, self._roots))
            paths = f"a directory or .gguf file in {folders}" if folders else "no paths, for want of a --models-dir"
        return f"valid: {', '.join([*CATALOGUE, SYNTHETIC])}{hub}, {paths}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
