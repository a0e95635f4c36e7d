"""Tokenizer directories read by transformers: `golden/directory_ids.json`, and whether it is still so.

`python -m oracle.directories --write` writes it anew.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizer_dirs
import transformers
from oracle.measure import Measure, Result
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from engine import families
from engine.tokenizer_classes import AS_FILED, CLASSES, MISNAMED, OF_MODEL_TYPE, OTHERS

FILE = Path(__file__).parents[1] / "golden" / "directory_ids.json"


def asked() -> dict[str, Any]:
    """What transformers makes of every directory: ids with BOS, special tokens, chats."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            name: _read(tokenizer_dirs.directory(Path(scratch) / name, "byte level", beside), tokenizer_dirs.TEXTS)
            for name, beside in tokenizer_dirs.FILES.items()
        }
        kinds = {
            kind: _read(
                tokenizer_dirs.directory(Path(scratch) / kind, kind, {"tokenizer_config.json": tokenizer_dirs.FAST}),
                tokenizer_dirs.PIECE_TEXTS,
            )
            for kind in tokenizer_dirs.SENTENCEPIECE
        }
        classes = {
            name: _read(tokenizer_dirs.directory(Path(scratch) / "classes" / name, *of), tokenizer_dirs.CLASS_TEXTS)
            for name, of in tokenizer_dirs.CLASSES.items()
        }
    return {"files": files, "kinds": kinds, "classes": classes}


def _read(directory: Path, texts: list[str]) -> dict[str, Any]:
    words = AutoTokenizer.from_pretrained(directory)
    ids = [words(text)["input_ids"] for text in texts]
    said: dict[str, Any] = {"ids": ids, "texts": [*map(words.decode, ids)], "special": words.special_tokens_map}
    if words.chat_template is not None:
        said["chats"] = {name: _chat(words, given) for name, given in tokenizer_dirs.ASKED.items()}
    return said


def _chat(words: Any, given: dict[str, Any]) -> str | None:
    known = words.chat_template if isinstance(words.chat_template, dict) else {}
    if given.get("chat_template", "default") not in {"default", *known}:
        return None
    text: str = words.apply_chat_template(tokenizer_dirs.TURNS, tokenize=False, add_generation_prompt=True, **given)
    return text


def directories_agree() -> Iterable[Result]:
    """The committed answers are transformers' answers, and the classes are its classes."""
    differ = asked() != json.loads(FILE.read_text("utf-8"))
    yield Result("tokenizer directories", "answers that differ from the committed ones", Measure(int(differ), 0.0))
    yield Result("tokenizer directories", "classes that differ", Measure(len(_classes_that_differ()), 0.0))


def _classes_that_differ() -> set[str]:
    """Names of classes, and model types with another class than ours or with files that count less than it."""
    named = {name for name in dir(transformers) if name.endswith("Tokenizer")} - {"PreTrainedTokenizer"}
    kinds = [path.stem for path in Path(families.__file__).parent.glob("[a-z]*.py")]
    mapped = {kind for kind in kinds if TOKENIZER_MAPPING_NAMES.get(kind) != OF_MODEL_TYPE.get(kind)}
    rebuilt = {kind for kind in kinds if OF_MODEL_TYPE.get(kind) not in (None, AS_FILED)}
    misnamed = (rebuilt & MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS) ^ {*MISNAMED}
    return (named ^ (OTHERS | CLASSES.keys())) | mapped | misnamed


if __name__ == "__main__" and "--write" in sys.argv:
    FILE.write_text(json.dumps(asked(), ensure_ascii=False, indent=1) + "\n", "utf-8")
