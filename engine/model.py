"""`Model`, what `load_model` returns: a `Network` with the Python API as methods."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from engine import lens
from engine.cache import KVCache
from engine.errors import VectorError
from engine.generate import generate
from engine.hooks import CompositeHook, PatchHook, SteerHook, ZeroAblateHook
from engine.network import Network, Tokens
from engine.ops import Array
from engine.patching import capture_donor_state, destinations, trace_forward

Steer = tuple[int, Array, float]
"""(layer, vector (d_model,), alpha)."""


class Model(Network):
    """A loaded model with the Python API as methods."""

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
        first, second = (self.token_batch(ids).shape[1] for ids in (donor_ids, recipient_ids))
        places = [(layer, self.resolve_position(p, first), self.resolve_position(p, second)) for layer, p in wanted]
        hook = PatchHook({(layer, to): rows[layer, source] for (layer, to), source in destinations(places).items()})
        return _last(trace_forward(self, recipient_ids, hook=hook, capture_layers=capture_layers).residuals)

    def generate_with_hooks(
        self,
        prompt: str | Tokens,
        max_new_tokens: int,
        ablate_layers: Iterable[int] | None = None,
        steers: Iterable[Steer] | None = None,
        cache: KVCache | None = None,
        **sampling: Any,
    ) -> tuple[str, list[int]]:
        """(text, ids) of the new tokens: greedy, ablation then steering at every step.

        A prompt continues what `cache` holds, so that no BOS stands between them. `sampling` goes to `generate`:
        temperature, top_p, seed, window, on_token.
        """
        ids = self.encode(prompt, inside=cache is not None and cache.next_position > 0)
        ablation = ZeroAblateHook.for_layers(self.resolve_layers(ablate_layers or ()))
        hook = CompositeHook([ablation, self.steer_hook(steers or ())])
        made = generate(self, ids, max_new_tokens, hook=hook, cache=cache, **sampling)
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
