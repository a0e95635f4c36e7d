"""One tool call: `Call` finds models and handles, resolves arguments against the model, and follows progress.

Tools run on worker threads. `tick` is given to every engine function that can take long: it stops the work within a
layer of a cancellation and reports progress to the client.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio.from_thread
import numpy as np

from engine import Model
from engine.cost import Cost
from engine.distribution import softmax_of, top_k
from engine.edits import Unit
from engine.errors import InputError, LayerError, PointError, PositionError, VectorError, clipped
from engine.heads import heads_by_layer, name_layers
from engine.lens import embedding_row, unembedding_row
from engine.network import Tokens, check_numbers
from engine.ops import Array
from schemas.arguments import DifferenceVector, HandleVector, RandomVector, TokenVector, ValuesVector
from schemas.base import LEAST_SHOWN, Token, TokenProbability
from server.jobs import Jobs
from server.lab import Lab, LoadedModel
from server.metrics import count_tokens
from server.progress import Teller
from server.store import Record, is_handle

LOCAL = "local"
"""The principal of stdio and of an unauthenticated localhost server."""

ENOUGH = 20
"""Characters of a prompt in a handle."""

COPIES_KEPT = 2
"""What keeping tensors needs beside them: they are packed, and are a file's content then. Reading takes as much."""

BYTES_BY_CHARACTER = 512
"""Of a text that is split into tokens: what the tokenizer keeps of each, where each is a token of its own."""

REPORT_EVERY = 0.1
"""Seconds between progress notifications."""


class Costed(Exception):
    """Ends a dry run: what the work would take, before any of it."""

    def __init__(self, model: Model, cost: Cost, length: int) -> None:
        self.model, self.cost, self.length = model, cost, length


@dataclass(eq=False)
class Call:
    """What a tool is given besides its arguments."""

    lab: Lab
    teller: Teller
    jobs: Jobs
    owner: str = LOCAL
    dry: bool = False
    chat: bool | str = False
    """Texts are the user's turns in the model's chat template; a text is how the answers begin."""
    expected: int | None = None
    needs: int | None = None
    """Bytes that the work takes beside the weights, about, once that is known."""
    notes: list[str] = field(default_factory=list)
    """What the answer's reader must know, told in its notice."""
    _read: dict[tuple[Model, str, bool], list[int]] = field(default_factory=dict)
    _from_disk: dict[str, int] = field(default_factory=dict)
    """Bytes that reading stored tensors takes, by their handle."""
    _ticks: int = 0
    _told: float = 0.0
    _untold: tuple[int, int | None, str] | None = None

    def expect(self, model: Model, cost: Cost, length: int, keeps: int = 0) -> None:
        """Say before any of it what the work on a prompt of `length` tokens will take, and how many bytes of tensors
        it will keep. A dry run ends here. Raises `OutOfSpace` when there is no room for that.
        """
        if keeps:
            self.lab.store.require_room(keeps, self.owner)
            cost = cost.holding(COPIES_KEPT * keeps, **cost.by)
        cost = cost.holding(sum(self._from_disk.values()))
        self.lab.memory.take(self, cost, length)
        if self.dry:
            raise Costed(model, cost, length)
        self.needs = cost.nbytes
        self.expected = self._ticks + cost.layers  # a model may have been loaded before

    def tick(self, done: int, total: int, what: str) -> None:
        """Engine progress, at least once per layer."""
        self._ticks += 1
        self._report(self._ticks, self.expected, what)

    def progress(self, done: int, total: int, what: str) -> None:
        """Progress of something counted in its own units, such as the bytes of a download."""
        self._report(done, total, what)

    def _report(self, done: int, total: int | None, what: str) -> None:
        anyio.from_thread.check_cancelled()
        now = time.monotonic()
        self._untold = done, total, what
        if now - self._told >= REPORT_EVERY:
            self._told, self._untold = now, None
            anyio.from_thread.run_sync(self.teller.tell, done, total, what)

    async def tell_last(self) -> None:
        """Report the last of the progress, so that what is done ends at its total."""
        if self._untold is not None:
            self.teller.tell(*self._untold)
        await self.teller.end()

    def note(self, text: str) -> None:
        """Tell it in the answer's notice, once."""
        if text not in self.notes:
            self.notes.append(text)

    # --- arguments ----------------------------------------------------------------------------------------

    def loaded(self, reference: str | None) -> LoadedModel:
        return self.lab.model(reference, self.tick, self.progress)

    def record(self, handle: str, kind: str | None = None, model: Model | None = None) -> Record:
        """A stored record; `kind` says which kind the argument takes, `model` which model must have made it."""
        if handle.startswith("run:"):
            job = self.lab.store.run(handle, self.owner).handle
            raise InputError(f"{job} is a job, which has no tensors of its own; get_job shows its result")
        record = self.lab.store.get(handle, self.owner)
        if kind is not None and not handle.startswith(f"{kind}:"):
            raise InputError(f"{clipped(handle)} is not a {kind}: handle")
        if model is not None and record.provenance["fingerprint"] != model.fingerprint:
            raise InputError(f"{handle} was made with another model; give model={record.provenance['model']!r}")
        return record

    def tensors(self, record: Record) -> Mapping[str, Array]:
        """A record's tensors. Raises `OutOfSpace` when they have to be read, and there is no room for that."""
        if not record.in_memory and record.handle not in self._from_disk:
            self.expect_read(record)
            self.needs = (self.needs or 0) + self._from_disk[record.handle]
            self.lab.memory.take(self, Cost(nbytes=self.needs), 1)
        return record.tensors

    def expect_read(self, record: Record) -> None:
        """Let what `expect` is told next count the reading of a record's tensors too."""
        if not record.in_memory:
            self._from_disk[record.handle] = COPIES_KEPT * record.nbytes

    def ids(self, model: Model, prompt: str | Sequence[int], inside: bool = False) -> list[int]:
        """The ids of a prompt argument, checked; `inside`: it continues what a cache holds."""
        if not isinstance(prompt, str):
            return self._checked(model, prompt)
        if is_handle(prompt):
            raise InputError(f"{clipped(prompt)} is a handle, which this argument does not take: give a prompt")
        if (model, prompt, inside) not in self._read:
            self._read[model, prompt, inside] = self._checked(model, self._encoded(model, prompt, inside))
        return self._read[model, prompt, inside]

    def _encoded(self, model: Model, text: str, inside: bool) -> Tokens:
        before = Cost(nbytes=self.needs or 0)
        self.lab.memory.take(self, before.holding(BYTES_BY_CHARACTER * len(text), characters=len(text)), 1)
        if not self.chat:
            return model.encode(text, inside)
        return model.encode_chat(text, self.chat if isinstance(self.chat, str) else "", inside)

    def _checked(self, model: Model, ids: Tokens) -> list[int]:
        found = [int(i) for i in model.token_batch(ids)[0]]
        count_tokens("read", len(found))
        return found

    def as_read(self) -> str | None:
        """With a chat template what the model read, exactly; without one, where a text brought its own BOS."""
        if self.chat:
            texts = (f"{model.tokenizer.decode(ids)!r} (tokens {ids})" for (model, *_), ids in self._read.items())
            return f"in the model's chat template: {'; '.join(texts)}"
        begun = [clipped(text) for model, text, inside in self._read if not inside and model.tokenizer.has_bos(text)]
        return f"{', '.join(begun)}: BOS stands there already, and is not put in front again" if begun else None

    def vector(self, model: Model, spec: Any, width: int | None = None) -> Array:
        """The vector a vector argument stands for: (width,), d_model unless said otherwise."""
        width = model.config.d_model if width is None else width
        made = self._vector(model, spec, width)
        if made.ndim > 1:
            heads, each = made.shape
            raise VectorError(
                f"the handle holds {heads} heads of {each} features there, not one vector; read the numbers of one "
                "with read_tensor and give them as values"
            )
        if made.shape != (width,):
            raise VectorError(f"the vector has {len(made)} features; it must have {width}")
        check_numbers(made)
        return made.astype(np.float32, copy=False)

    def _vector(self, model: Model, spec: Any, width: int) -> Array:
        match spec:
            case DifferenceVector(minus=[first, second]):
                return self.vector(model, first, width) - self.vector(model, second, width)
            case TokenVector(token=token, space=space):
                row = embedding_row if space == "embed" else unembedding_row
                return row(model, token_id(model, token))
            case ValuesVector(values=values):
                return np.array(values)  # float64: what float32 cannot hold is refused, not cast
            case RandomVector():
                return self._random_vector(model, spec, width)
            case HandleVector():
                return self._stored_vector(model, spec)
        raise VectorError(f"{spec!r} is not a vector")

    def _random_vector(self, model: Model, spec: RandomVector, width: int) -> Array:
        """Of unit norm, or as long as another vector."""
        if spec.norm_of == "row":
            raise VectorError(
                "norm_of 'row' is for a steering vector by itself: the norm of the rows that it is added to; elsewhere "
                "give a vector"
            )
        drawn = np.random.default_rng(spec.random_seed).standard_normal(width).astype(np.float32)
        length = 1.0 if spec.norm_of is None else np.linalg.norm(self.vector(model, spec.norm_of, width))
        return drawn * np.float32(length / np.linalg.norm(drawn))

    def step(self, model: Model, spec: Any, width: int | None = None) -> tuple[Array, Unit]:
        """A steering vector argument as the vector and what its alpha counts in."""
        if isinstance(spec, RandomVector) and spec.norm_of == "row":
            return self.vector(model, spec.model_copy(update={"norm_of": None}), width), "row"
        return self.vector(model, spec, width), "raw"

    def _stored_vector(self, model: Model, spec: HandleVector) -> Array:
        record = self.record(spec.handle, model=model)
        if "rows" not in record.provenance:
            raise VectorError(f"{spec.handle!r} holds no vectors; give the act: handle of a capture")
        rows = record.provenance["rows"]
        point = _point_of(spec.point, rows["points"])
        layer = _one_of(spec.layer, layers_held(record, point), model.config.n_layers, "layer", LayerError)
        position = _one_of(spec.position, rows["positions"], rows["prompt_length"], "position", PositionError)
        stored: Array = self.tensors(record)[f"{point}.{layer}"][rows["positions"].index(position)]
        return stored


def layers_held(record: Record, point: str) -> list[int]:
    """The layers at which a capture holds a point."""
    named = (name.rpartition(".") for name in record.provenance["tensors"])
    return [int(layer) for found, _, layer in named if found == point]


def _point_of(asked: str | None, held: Sequence[str]) -> str:
    """The point of a capture that is meant; the only one when left out."""
    if asked in held or (asked is None and len(held) == 1):
        return asked or held[0]
    told = "say which point" if asked is None else f"point {clipped(asked)} is not in the capture"
    raise PointError(f"{told}; the capture holds {', '.join(held)}")


def _one_of(asked: int | None, held: Sequence[int], length: int, what: str, error: type[InputError]) -> int:
    """The layer or position of a capture that is meant; the only one when left out."""
    if asked is None:
        if len(held) == 1:
            return held[0]
        raise error(f"say which {what}; the capture holds {list(held)}")
    resolved = asked + length if asked < 0 else asked
    if resolved not in held:
        raise error(f"{what} {asked} is not in the capture, which holds {list(held)}")
    return resolved


def label(model: Model, ids: Sequence[int], what: str) -> str:
    """The readable part of a handle: the end of the prompt, from a whole word on where it is long, and what is held."""
    words = re.sub(r"[^a-z0-9.]+", "-", model.tokenizer.decode(list(ids[-ENOUGH:])).lower()).strip("-")
    if len(words) > ENOUGH:
        words = words[-ENOUGH:].partition("-")[2] or words[-ENOUGH:]
    return f"{words}-{what}"


def token_id(model: Model, token: str | int) -> int:
    """The id of a token argument: an id, or text that is exactly one token."""
    return model.check_token(model.tokenizer.single(token) if isinstance(token, str) else token)


def layer_list(model: Model, layers: Sequence[int] | str) -> list[int]:
    """The layers of a layers argument: numbers, "all" or "start:stop:step"."""
    n = model.config.n_layers
    if isinstance(layers, str):
        if layers == "all":
            return list(range(n))
        first, dash, last = layers.partition("-")
        span = dash and first.isdecimal() and last.isdecimal()  # as results tell one
        try:
            parts = [first, str(int(last) + 1)] if span else layers.split(":")
            numbers = [int(part) if part.strip() else None for part in parts]
            chosen = list(range(n))[slice(*numbers)] if 2 <= len(parts) <= 3 else []
        except ValueError:
            chosen = []
        if not chosen:
            raise LayerError(
                f'layers {clipped(layers)} name no layer; use a list of 0 to {n - 1}, "all" or "start:stop:step"'
            )
        return chosen
    if not layers:
        raise LayerError(f"layers is empty; valid: 0 to {n - 1}")
    return model.resolve_layers(layers)


def head_list(
    model: Model, layers: Sequence[int] | str | None, heads: Any, point: str
) -> dict[int, tuple[int, ...] | None]:
    """{layer: its heads, None for all} of a layers and a heads argument; pairs name their layers, among "all" too."""
    paired = name_layers(heads)
    if layers is None and not paired:
        raise InputError(
            "say which layers: layers is missing, and only [layer, head] pairs in heads name layers themselves"
        )
    chosen = [] if layers is None or (paired and layers == "all") else layer_list(model, layers)
    return heads_by_layer(model, chosen, heads, key_value=point in ("k", "v"))


def position_list(model: Model, positions: str | Sequence[int], length: int) -> list[int]:
    """The positions of a positions argument, absolute and without duplicates."""
    if positions == "all":
        return list(range(length))
    if positions == "last":
        return [length - 1]
    if not positions:
        raise PositionError(f"positions is empty; valid: 0 to {length - 1}")
    return list(dict.fromkeys(model.resolve_position(int(position), length) for position in positions))


def token_shown(model: Model, index: int) -> Token:
    """A token as results show it."""
    return Token(id=index, text=model.tokenizer.piece(index))


def probabilities(model: Model, logits: Array, k: int) -> list[TokenProbability]:
    """The k most probable tokens of (d_vocab,) logits."""
    return ranked(model, top_k(softmax_of(logits), k))


def ranked(model: Model, pairs: Sequence[tuple[int, float]]) -> list[TokenProbability]:
    """(id, probability) pairs as results show them, but those that would show as 0."""
    return [TokenProbability(id=i, text=model.tokenizer.piece(i), probability=p) for i, p in pairs if p >= LEAST_SHOWN]


def require_one(**arguments: Any) -> None:
    """Raise unless exactly one of the arguments is given."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"give exactly one of {', '.join(arguments)}, not {' and '.join(given) or 'none'}")


def of_layers(arrays: Mapping[int, Array], layers: Sequence[int]) -> Array:
    """(layers, ...) from {layer: array}."""
    return np.stack([arrays[layer] for layer in layers])
