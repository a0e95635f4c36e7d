"""`Network`: a config, its weights and its tokenizer, and the checks that every entry point shares.

Everything below the Python API takes a `Network`. A prompt is text, tokenized with the model's own tokenizer and BOS
rule, or a list of token ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.chat import Message
from engine.config import Config
from engine.errors import InputError, LayerError, PointError, PositionError, PromptError, TokenError, VectorError
from engine.ops import LARGEST, Array, IntArray
from engine.params import Params
from engine.tokenizer import Tokenizer

ROUNDED = ":bf16"
"""At the end of the fingerprint of weights that were rounded to bfloat16."""

Tokens = Sequence[int] | Sequence[Sequence[int]]
"""Token ids of one prompt, or of several prompts of one length."""


def check_numbers(vector: Array, what: str = "the vector") -> None:
    """Raise `VectorError` for NaN, infinity, and what the next norm could not square."""
    if not np.isfinite(vector).all():
        raise VectorError(f"{what} holds NaN or infinity; every feature must be finite")
    if (largest := np.abs(vector).max(initial=0)) > LARGEST:
        raise VectorError(f"{what} holds {largest:.3g}; beyond {LARGEST:.0e} the layers after it leave float32")


@dataclass(frozen=True, eq=False)
class Network:
    """A loaded model. `fingerprint` is the sha256 of its weights; `weights` says how they are kept: "dense", "scoped",
    "packed", or rounded as "bf16"; `synthetic` is True for random or hand-written weights. `conversion` says how a
    dense model came by its weights (see `converted.py`): "used" a conversion, "made" one for the next start,
    "not kept: " and why, or "none". `left_aside` names the weight files beside the model's own, which were not read.
    """

    name: str
    config: Config
    params: Params
    tokenizer: Tokenizer
    fingerprint: str
    weights: str
    synthetic: bool = False
    conversion: str = "none"
    left_aside: tuple[str, ...] = ()

    def encode(self, prompt: str | Tokens, inside: bool = False) -> Tokens:
        """Token ids of a prompt, which may continue what a cache holds (`inside`: no BOS); ids pass through."""
        if isinstance(prompt, str) and not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        return self.tokenizer.encode(prompt, inside) if isinstance(prompt, str) else prompt

    def encode_chat(
        self, prompt: str | Sequence[Message], opening: str = "", inside: bool = False, **given: Any
    ) -> list[int]:
        """Token ids of a conversation in the model's own chat template; text is one turn of the user's.

        `opening` is how the assistant's answer begins, `inside` is as in `encode`, and `given` goes to the template:
        tools, documents, template (the name of another than the default), and what that template alone knows. Raises
        `InputError` for a model without a template, or messages that it does not take.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.encode_chat(messages, opening, inside, **given)

    def token_batch(self, tokens: Tokens) -> IntArray:
        """(batch, seq) ids, checked; raises `PromptError` or `TokenError`."""
        rows: Sequence[Any] = (
            [tokens] if len(tokens) == 0 or not isinstance(tokens[0], Sequence | np.ndarray) else tokens
        )
        if any(len(row) == 0 for row in rows):
            raise PromptError("the prompt is empty; give at least one token")
        if len({len(row) for row in rows}) > 1:
            raise PromptError("the prompts of a batch must have the same number of tokens; run them in groups")
        try:
            ids = np.asarray(rows)
        except ValueError:  # numbers and lists mixed
            ids = np.zeros(0)
        if ids.dtype.kind not in "iu" or ids.ndim != 2:
            raise PromptError("a prompt is text or a list of whole-number token ids")
        for token in (int(ids.min()), int(ids.max())):
            self.check_token(token)
        self.check_context(ids.shape[1])
        return ids.astype(np.int64)

    def check_context(self, length: int) -> None:
        """Raise `PromptError` for more tokens than the model's context holds."""
        if length > self.config.n_ctx:
            raise PromptError(f"{length} tokens are more than the context of {self.config.n_ctx}")

    def check_token(self, token_id: int) -> int:
        """A valid token id; raises `TokenError`."""
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            raise TokenError(f"a token id is a whole number, not {token_id!r}")
        if not 0 <= token_id < self.config.d_vocab:
            why, words = "does not exist", self.tokenizer
            if words.backend.has(int(token_id)):
                why = f"is the tokenizer's {words.piece(int(token_id))!r}, which the model has no embedding for"
            raise TokenError(f"token id {token_id} {why}; valid: 0 to {self.config.d_vocab - 1}")
        return int(token_id)

    def check_vector(self, vector: Array) -> Array:
        """float32 (d_model,) or (n, d_model), finite; raises `VectorError`."""
        try:
            checked = np.asarray(vector, np.float32)
        except (TypeError, ValueError):
            raise VectorError(f"a vector is {self.config.d_model} numbers") from None
        if checked.ndim not in (1, 2) or checked.shape[-1] != self.config.d_model:
            raise VectorError(
                f"the vector has shape {checked.shape}; it must be "
                f"({self.config.d_model},), or (n, {self.config.d_model}) for several"
            )
        check_numbers(checked)
        return checked

    def resolve_layer(self, layer: int) -> int:
        """A layer index; negative ones count from the end; raises `LayerError`."""
        n = self.config.n_layers
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise LayerError(f"a layer is a whole number, not {layer!r}")
        if not -n <= layer < n:
            raise LayerError(f"layer {layer} does not exist; valid: 0 to {n - 1}, or -{n} to -1 from the end")
        return int(layer) % n

    def resolve_layers(self, layers: Iterable[int]) -> list[int]:
        """Layer indices without duplicates, in the order given."""
        return list(dict.fromkeys(self.resolve_layer(layer) for layer in layers))

    def resolve_position(self, position: int, length: int) -> int:
        """An absolute position in a prompt of `length` tokens; raises `PositionError`."""
        if isinstance(position, bool) or not isinstance(position, int | np.integer):
            raise PositionError(f"a position is a whole number, not {position!r}")
        if not -length <= position < length:
            raise PositionError(
                f"position {position} does not exist in a prompt of {length} tokens; "
                f"valid: 0 to {length - 1}, or -{length} to -1 from the end"
            )
        return int(position) % length

    def resolve_head(self, head: int, key_value: bool = False) -> int:
        """A head index (of the key-value heads when `key_value`); raises `InputError`."""
        n = self.config.n_kv_heads if key_value else self.config.n_heads
        if isinstance(head, bool) or not isinstance(head, int | np.integer) or not -n <= head < n:
            raise InputError(f"{'key-value ' * key_value}head {head!r} does not exist; valid: 0 to {n - 1}")
        return int(head) % n

    def check_point(self, name: str) -> None:
        """Raise `PointError` for a point that this model's blocks do not have."""
        if name == "resid_mid" and self.config.parallel:
            raise PointError("resid_mid does not exist in parallel blocks: attention and MLP read the same residual")
