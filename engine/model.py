"""`Model`, what `load_model` returns: the Python API, and the checks every entry point shares.

A prompt is text, tokenized with the model's own tokenizer and BOS rule, or a list of token ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import lens
from engine.config import Config
from engine.decoder import Tokens
from engine.errors import InputError, LayerError, PositionError, PromptError, TokenError, VectorError
from engine.generate import generate
from engine.hooks import CompositeHook, PatchHook, SteerHook, ZeroAblateHook
from engine.ops import Array, IntArray
from engine.params import Params
from engine.patching import capture_donor_state, trace_forward
from engine.tokenizer import Tokenizer

Steer = tuple[int, Array, float]
"""(layer, vector (d_model,), alpha)."""


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model. `fingerprint` is the sha256 of its weights; `weights` says how they are kept:
    "dense" or "scoped"; `synthetic` is True for random or hand-written weights.
    """

    name: str
    config: Config
    params: Params
    tokenizer: Tokenizer
    fingerprint: str
    weights: str
    synthetic: bool = False

    # --- captures -----------------------------------------------------------------------------------------

    def capture_residuals(self, prompt: str | Tokens, layers: Iterable[int]) -> dict[int, Array]:
        """{layer: (d_model,)}: last-token `resid_post`."""
        return _last(trace_forward(self, self.encode(prompt), capture_layers=layers).residuals)

    def forward_with_capture(self, prompt: str | Tokens, layers: Iterable[int]) -> dict[int, Array]:
        """{layer: (seq, d_model)}: `resid_post` at every position."""
        return trace_forward(self, self.encode(prompt), capture_layers=layers).residuals

    # --- interventions ------------------------------------------------------------------------------------

    def forward_ablate(
        self, prompt: str | Tokens, ablate_layers: Iterable[int], capture_layers: Iterable[int]
    ) -> dict[int, Array]:
        """Set `resid_post` of the layers to zero, all rows; {layer: (d_model,)} at the last token."""
        hook = ZeroAblateHook.for_layers(self.resolve_layers(ablate_layers))
        return _last(trace_forward(self, self.encode(prompt), hook=hook, capture_layers=capture_layers).residuals)

    def forward_steer(
        self, prompt: str | Tokens, steers: Iterable[Steer], capture_layers: Iterable[int]
    ) -> dict[int, Array]:
        """`h[last] += alpha * vec` at `resid_post`; {layer: (d_model,)} at the last token."""
        hook = self.steer_hook(steers)
        return _last(trace_forward(self, self.encode(prompt), hook=hook, capture_layers=capture_layers).residuals)

    def patch_activations(
        self,
        donor: str | Tokens,
        recipient: str | Tokens,
        targets: Iterable[tuple[int, int]],
        capture_layers: Iterable[int],
    ) -> dict[int, Array]:
        """Write the donor's `resid_post` rows into the recipient's run; {layer: (d_model,)} at the last token.

        A position -1 is the last of each prompt.
        """
        wanted = [(self.resolve_layer(layer), position) for layer, position in targets]
        donor_ids, recipient_ids = self.encode(donor), self.encode(recipient)
        rows = capture_donor_state(self, donor_ids, wanted).rows
        lengths = [self.token_batch(ids).shape[1] for ids in (donor_ids, recipient_ids)]
        places = [(layer, *(self.resolve_position(p, n) for n in lengths)) for layer, p in wanted]
        hook = PatchHook({(layer, to): rows[layer, source] for layer, source, to in places})
        return _last(trace_forward(self, recipient_ids, hook=hook, capture_layers=capture_layers).residuals)

    def generate_with_hooks(
        self,
        prompt: str | Tokens,
        max_new_tokens: int,
        ablate_layers: Iterable[int] | None = None,
        steers: Iterable[Steer] | None = None,
        **sampling: Any,
    ) -> tuple[str, list[int]]:
        """(text, ids) of the new tokens: greedy, ablation then steering at every step.

        `sampling` goes to `generate`: temperature, top_p, seed, window, on_token.
        """
        ablation = ZeroAblateHook.for_layers(self.resolve_layers(ablate_layers or ()))
        hook = CompositeHook([ablation, self.steer_hook(steers or ())])
        made = generate(self, self.encode(prompt), max_new_tokens, hook=hook, **sampling)
        return made.text, made.ids

    # --- vocabulary ---------------------------------------------------------------------------------------

    def logit_lens(self, residual: Array, k: int = 10) -> lens.Ranked | list[lens.Ranked]:
        """[(token id, probability)]: see `lens.logit_lens_topk`."""
        return lens.logit_lens_topk(self, residual, k)

    def track_token_at(self, residual: Array, token_id: int) -> float | list[float]:
        """The token's probability under the lens."""
        return lens.track_token(self, residual, token_id)

    def track_race(
        self, residuals: Mapping[int, Array], k: int = 5
    ) -> dict[int, lens.Ranked] | dict[int, list[lens.Ranked]]:
        """{layer: [(token id, probability)]}."""
        return lens.track_race(self, residuals, k)

    def embedding_neighbors(self, query: Array, k: int = 10) -> lens.Ranked | list[lens.Ranked]:
        """[(token id, cosine)] against the unscaled W_E."""
        return lens.embedding_neighbors(self, query, k)

    def project_through_unembed(self, vec: Array, k: int = 10) -> lens.Ranked | list[lens.Ranked]:
        """[(token id, logit)]: raw W_U @ vec, no norm, no softcap."""
        return lens.project_through_unembed(self, vec, k)

    def embedding_for(self, token_id: int, scaled: bool = True) -> Array:
        """(d_model,): the token's row of W_E, times the embedding scale unless `scaled` is False."""
        return lens.embedding_row_scaled(self, token_id) if scaled else lens.embedding_row(self, token_id)

    def unembedding_for(self, token_id: int) -> Array:
        """(d_model,): the token's row of W_U."""
        return lens.unembedding_row(self, token_id)

    # --- checks -------------------------------------------------------------------------------------------

    def encode(self, prompt: str | Tokens) -> Tokens:
        """Token ids of a prompt; ids pass through."""
        if isinstance(prompt, str) and not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

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
            raise TokenError(f"token id {token_id} does not exist; valid: 0 to {self.config.d_vocab - 1}")
        return int(token_id)

    def check_vector(self, vector: Array) -> Array:
        """float32 (d_model,) or (n, d_model), finite; raises `VectorError`."""
        try:
            checked = np.asarray(vector, np.float32)
        except (TypeError, ValueError):
            raise VectorError(f"a vector is {self.config.d_model} numbers") from None
        if checked.ndim not in (1, 2) or checked.shape[-1] != self.config.d_model:
            raise VectorError(f"the vector has shape {checked.shape}; it must have {self.config.d_model} features")
        if not np.isfinite(checked).all():
            raise VectorError("the vector holds NaN or infinity; every feature must be finite")
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

    def steer_hook(self, steers: Iterable[Steer]) -> SteerHook:
        """The hook of [(layer, vector, alpha), ...], checked."""
        hook = SteerHook()
        for layer, vec, alpha in steers:
            vector = self.check_vector(vec)
            if vector.ndim != 1:
                raise VectorError("steering takes one vector, not several rows")
            if not np.isfinite(alpha):
                raise VectorError(f"alpha is {alpha}; it must be finite")
            hook.add(self.resolve_layer(layer), vector, float(alpha))
        return hook


def _last(residuals: dict[int, Array]) -> dict[int, Array]:
    return {layer: rows[..., -1, :] for layer, rows in residuals.items()}
