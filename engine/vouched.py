"""`Vouched`: arrays of a mapped file that are compared with their digests before they are used.

A digest is the CRC-32 of the sums, over rows and over columns, of a piece's 64-bit words laid out as a matrix. It reads
7 GB/s on one core, where CRC-32 alone reads 3 and the SHA family 0.5 to 1.5, and a start must not wait for half a
gigabyte. Damaged pages and flipped bits change it; it is no proof against somebody who forges a file.
"""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.errors import DamagedConversion
from engine.matrices import Array

PIECE, ROW = 4 << 20, 4 << 10
"""Bytes that share a digest, and those of a row of its matrix."""

Digests = dict[str, list[int]]
"""By the name of an array: of its pieces, in order."""


Bytes = npt.NDArray[np.uint8]


class _Piece(NamedTuple):
    name: str
    content: Bytes
    digest: int

    def is_whole(self) -> bool:
        return _digest(self.content) == self.digest


class Vouched:
    """The arrays of an open file in parts. A part is looked at by who uses it first, if threads have not got there.

    Nobody waits for anybody, so that a process may fork meanwhile; a piece may be looked at twice.
    """

    def __init__(self, file: Path, opened: int, parts: Mapping[int, Mapping[str, Array]], digests: Digests) -> None:
        """`opened` is the file's descriptor, which may be closed afterwards."""
        self._file, self._stat = file, os.fstat(opened)
        self._pieces, self._open = list[_Piece](), dict[int, range]()
        for part, arrays in parts.items():
            start = len(self._pieces)
            for name, array in arrays.items():
                self._pieces += [_Piece(name, *row) for row in zip(_pieces(array), digests[name], strict=True)]
            self._open[part] = range(start, len(self._pieces))
        self._whole: list[bool | None] = [None] * len(self._pieces)

    def look_ahead(self) -> Thread:
        """Begin to compare, from the end: who uses the arrays meanwhile begins at the front."""
        thread = Thread(target=self._look, args=(range(len(self._pieces))[::-1],), daemon=True)
        thread.start()
        return thread

    def require(self, part: int) -> None:
        """Raise `DamagedConversion`, and delete the file, unless a part is as it was written."""
        if (pieces := self._open.get(part)) is not None:
            self._look(pieces)
            if not all(self._whole[i] for i in pieces):
                raise self._damaged()
            self._open.pop(part, None)  # of several threads one

    def require_all(self) -> None:
        """The same of every part, and of what was written into the file since then."""
        for part in list(self._open):
            self.require(part)
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Raise `DamagedConversion` if the file was written to: what is mapped changes with it."""
        now, then = self._still_there(), self._stat
        if now is None:
            return
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise self._damaged()
        if now.st_ctime_ns != then.st_ctime_ns:  # its mode or links, or bytes and then its time set back: look again
            self._stat, self._whole = now, [None] * len(self._pieces)
            if self.damaged():
                raise self._damaged()

    def damaged(self) -> list[str]:
        """The names of arrays that are not as they were written; all are looked at."""
        self._look(range(len(self._pieces)))
        return list(dict.fromkeys(p.name for p, whole in zip(self._pieces, self._whole, strict=True) if not whole))

    def _look(self, order: Iterable[int]) -> None:
        for i in order:
            if self._whole[i] is None:
                self._whole[i] = self._pieces[i].is_whole()

    def _still_there(self) -> os.stat_result | None:
        """None when another file is in its place, or none: what is mapped stays then."""
        try:
            now = self._file.stat()
        except OSError:
            return None
        return now if os.path.samestat(now, self._stat) else None

    def _damaged(self) -> DamagedConversion:
        try:
            if self._still_there() is not None:
                self._file.unlink()
            done = "they were deleted: load the model again, which reads its own files"
        except OSError as error:
            done = f"delete {self._file} ({error.strerror}), and load the model again"
        return DamagedConversion(f"the converted weights {self._file.name} are not those that were written; {done}")


def digests(arrays: Mapping[str, Array]) -> Digests:
    """Of every array."""
    return {name: [_digest(piece) for piece in _pieces(array)] for name, array in arrays.items()}


def _pieces(array: Array) -> Sequence[Bytes]:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [flat[start : start + PIECE] for start in range(0, flat.size, PIECE)]


def _digest(piece: Bytes) -> int:
    rows = piece.size // ROW
    words = piece[: rows * ROW].view(np.uint64).reshape(rows, ROW // 8)
    return zlib.crc32(piece[rows * ROW :].data, zlib.crc32(words.sum(axis=1), zlib.crc32(words.sum(axis=0))))
