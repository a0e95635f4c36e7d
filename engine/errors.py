"""Everything the engine raises on purpose.

    EngineError
    ├── ModelError             the model or its files
    │   ├── UnknownModel       no such name, directory, file or family
    │   ├── DamagedFile        a weights, config or tokenizer file that cannot be trusted
    │   │   └── DamagedConversion  converted weights that are not those that were written
    │   └── FetchFailed        a download that did not arrive whole
    └── InputError             what the caller asked for
        ├── PromptError        empty, too long, not token ids
        ├── LayerError         no such layer
        ├── PositionError      no such position
        ├── TokenError         no such token, or text that is not one token
        ├── VectorError        wrong length, NaN, infinite, or zero where a direction is needed
        ├── PointError         no such point, or a point this architecture does not have
        ├── HookError          a hook returned something that cannot replace what it was given, or erases another's work
        └── CacheError         key-value caches that do not fit together

A message says what was wrong, what is valid, and, where it helps, what to do. What comes from a file or a caller is
shown in it through `clipped`.
"""

import reprlib


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class ModelError(EngineError):
    """The model or its files."""


class UnknownModel(ModelError):
    """No such catalogue name, directory, file or architecture."""


class DamagedFile(ModelError):
    """A file that is truncated, inconsistent or of an unsupported kind."""


class DamagedConversion(DamagedFile):
    """Converted weights that are not those that were written: they are deleted, so load the model again."""


class FetchFailed(ModelError):
    """A download that did not arrive whole."""


class InputError(EngineError):
    """What the caller asked for cannot be done."""


class PromptError(InputError):
    """Empty, longer than the context, or not token ids."""


class LayerError(InputError):
    """A layer the model does not have."""


class PositionError(InputError):
    """A position the prompt does not have."""


class TokenError(InputError):
    """A token id outside the vocabulary, or text that is not exactly one token."""


class VectorError(InputError):
    """A vector of the wrong length, with NaN or infinity, or zero where a direction is needed."""


class PointError(InputError):
    """A point that does not exist, or not in this architecture."""


class HookError(InputError):
    """A hook returned something that cannot replace what it was given, or would leave nothing of another's work."""


class CacheError(InputError):
    """Key-value caches that do not fit together."""


def clipped(value: object, most: int = 80) -> str:
    """`repr` of a value of any size in at most about `most` characters, without making the long one."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    shown = short.repr(value)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."
