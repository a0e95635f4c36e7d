"""Small vocabularies of every tokenizer kind that GGUF files hold, and llama.cpp's ids of awkward text: `read()`.

`make oracle-gguf` asks llama.cpp again; `oracle/vocabularies.py` says how the vocabularies came to be.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "golden" / "gguf_ids.json"
Metadata = dict[str, Any]


@dataclass
class Ids:
    """`kinds`: name -> [the vocabulary it uses, what it adds]; `ids`: name -> ids of each text, with BOS."""

    made_with: str
    vocabularies: dict[str, Metadata]
    kinds: dict[str, tuple[str, Metadata]]
    texts: list[str]
    ids: dict[str, list[list[int]]]

    def metadata(self, kind: str) -> Metadata:
        """As it stands in a GGUF file."""
        vocabulary, more = self.kinds[kind]
        return self.vocabularies[vocabulary] | more

    def write(self) -> None:
        lines = json.dumps(asdict(self), ensure_ascii=False).replace("]], ", "]],\n").replace("], ", "],\n")
        FILE.write_text(lines + "\n", "utf-8")


def read() -> Ids:
    return Ids(**json.loads(FILE.read_text("utf-8")))
