"""SentencePiece tokenization as llama.cpp does it: neighbouring pieces merge, the best-scored token first.

Reference: llama.cpp, src/llama-vocab.cpp, `llm_tokenizer_spm_session`; the algorithm of Kudo & Richardson 2018 for BPE
models. Equal scores merge from the left; any two neighbours may merge, whether or not they are tokens themselves.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import TokenError

SPACE = "\u2581"
"""What stands for a space in pieces."""


class SentencePiece:
    """`encode` of text in which spaces are `SPACE` already."""

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float]) -> None:
        """`ids`: token -> id; `scores`: by id. Bytes outside the vocabulary are tokens <0x00> to <0xFF>."""
        self._ids, self._scores = ids, scores

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._merged(text):
            known = self._ids.get(piece)
            ids += [known] if known is not None else map(self._byte, piece.encode())
        return ids

    def _byte(self, byte: int) -> int:
        token = f"<0x{byte:02X}>"
        if token not in self._ids:
            raise TokenError(f"the vocabulary has neither this text nor the byte {token}; leave it out of the prompt")
        return self._ids[token]

    def _merged(self, text: str) -> list[str]:
        """The pieces of a text when nothing merges any more."""
        chain = _Chain(list(text))
        queue: list[tuple[float, int, int, str]] = []

        def propose(left: int, right: int) -> None:
            if left >= 0 and right < len(chain.pieces):
                both = chain.pieces[left] + chain.pieces[right]
                if both in self._ids:
                    heapq.heappush(queue, (-self._scores[self._ids[both]], left, right, both))

        for right in range(1, len(chain.pieces)):
            propose(right - 1, right)
        while queue:
            _, left, right, both = heapq.heappop(queue)
            if chain.joins(left, right, both):
                propose(chain.before[left], left)
                propose(left, chain.after[left])
        return [piece for piece in chain.pieces if piece]


@dataclass
class _Chain:
    """Pieces and their neighbours; a piece that merged into the one on its left is empty."""

    pieces: list[str]
    before: list[int] = field(init=False)
    after: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.before = list(range(-1, len(self.pieces) - 1))
        self.after = list(range(1, len(self.pieces) + 1))

    def joins(self, left: int, right: int, both: str) -> bool:
        """Merge two neighbours into `both`; False if they have changed since that was proposed."""
        parts = self.pieces[left], self.pieces[right]
        if not all(parts) or "".join(parts) != both or self.after[left] != right:
            return False
        self.pieces[left], self.pieces[right] = both, ""
        self.after[left] = self.after[right]
        if self.after[left] < len(self.pieces):
            self.before[self.after[left]] = left
        return True
