"""Where compiled kernels are kept: a locator for numba, which imports this by its name.

numba's own locators look beside a source file, or in a folder named after where that file lies; both are another one in
each environment. Kernels of one machine are the same wherever their sources lie.
"""

from typing import Any

import numba
from numba.core.caching import _CacheLocator


class KernelFolder(_CacheLocator):
    """The folder that `numba.config.CACHE_DIR` names when a kernel is made: `engine.fast` keys it by the sources."""

    def __init__(self, function: object, path: str) -> None:
        self._line = function.__code__.co_firstlineno  # type: ignore[attr-defined]
        settings: Any = numba.config
        self._folder = settings.CACHE_DIR

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        """The folder's name has it."""
        return ""

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, function: object, path: str) -> "KernelFolder":
        return cls(function, path)
