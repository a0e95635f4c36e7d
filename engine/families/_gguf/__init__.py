"""A GGUF file seen as a Hugging Face checkpoint: `config_json` and `GgufTensors`.

Families then need one reader each. What differs between architectures is a row of `table.ARCHITECTURES`; what a GGUF
file means is what llama.cpp computes from it (src/models/*.cpp), and how files come to be is convert_hf_to_gguf.py.

    settings.py   the metadata of one architecture, each entry counted: what nobody reads is refused
    readers.py    metadata -> entries of config.json
    table.py      one row per architecture: readers, tensor names, how tensors are stored
    tensors.py    tensors by their Hugging Face names, with their rows back in place
"""

from typing import Any

from engine.families._gguf.settings import Settings
from engine.families._gguf.table import architecture
from engine.families._gguf.tensors import GgufTensors
from engine.gguf_file import GgufFile

__all__ = ["GgufTensors", "config_json"]


def config_json(file: GgufFile) -> dict[str, Any]:
    """The file's metadata under the names of config.json.

    Raises `UnknownModel` for an architecture, or a setting of one, that would have to be guessed at.
    """
    row, settings = architecture(file), Settings(file)
    raw: dict[str, Any] = {"gguf": True, "model_type": row.model_type}
    raw["tie_word_embeddings"] = "output" not in row.ends or "output.weight" not in file.tensors
    for reader in row.readers:
        raw |= reader(settings, raw)
    settings.check_all_read()
    return raw
