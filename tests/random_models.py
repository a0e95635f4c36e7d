"""Random small configurations of every family, for property tests.

configs   config.json of a family: sizes, windows, rotary settings, biases, norms and multipliers at random
runs      a `Run`: a model of such a config, two prompts of one length, and where in them something happens
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import families
from hypothesis import strategies as st

from engine import Model

Raw = dict[str, Any]

CONTEXT, LONGEST = 32, 12
"""Tokens: of the models' context, and of the prompts. Frequencies that depend on the length stay the same."""

WIDE = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Families whose heads may be of any width."""

UNGROUPED = ("gpt2", "gpt_neo", "gpt_neox")

_flag, _share = st.booleans(), st.floats(0.25, 4.0).map(lambda x: round(x, 3))
_window, _cap = st.integers(1, 9), st.sampled_from([None, 1.5, 8.0])
_gates = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
_biases = {"attention_bias": _flag}
_untied = {"tie_word_embeddings": _flag}
_upper = {"use_sliding_window": _flag, "sliding_window": _window, "max_window_layers": st.integers(0, 3)}
_capped = {"attn_logit_softcapping": _cap, "final_logit_softcapping": _cap}
_scalar = {"query_pre_attn_scalar": st.integers(2, 40), "sliding_window": _window}

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": _biases | _untied | {"mlp_bias": _flag, "hidden_act": _gates},
    "mistral": _untied | {"sliding_window": st.none() | _window},
    "qwen2": _untied | _upper,
    "qwen3": _untied | _upper | _biases,
    "gemma": _biases,
    "gemma2": _biases | _capped | _scalar,
    "gemma3_text": _biases | _capped | _scalar | {"sliding_window_pattern": st.integers(1, 3)},
    "gpt2": _untied | {"scale_attn_by_inverse_layer_idx": _flag, "scale_attn_weights": _flag},
    "gpt_neo": _untied | {"window_size": _window},
    "gpt_neox": _untied | {"use_parallel_residual": _flag, "attention_bias": _flag},
    "phi": {"qk_layernorm": _flag},
    "phi3": {"sliding_window": st.none() | _window},
    "olmo2": _biases | _untied,
    "olmo3": _untied | {"sliding_window": _window},
    "granite": _biases
    | {"embedding_multiplier": _share, "logits_scaling": _share, "residual_multiplier": _share}
    | {"attention_multiplier": _share, "mlp_bias": _flag},
    "smollm3": _untied | {"no_rope_layer_interval": st.integers(1, 3)},
    "stablelm": {"use_qkv_bias": _flag, "qk_layernorm": _flag, "use_parallel_residual": _flag},
    "starcoder2": _untied | {"sliding_window": st.none() | _window, "use_bias": _flag},
}
"""What varies beside the sizes; a family without options here has none to vary."""

PARTIAL = {"gpt_neox": "rotary_pct", "phi": "partial_rotary_factor", "stablelm": "partial_rotary_factor"}
SCALED = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "granite")
BY_LAYER = ("gemma3_text", "olmo3")

_ROPES = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("default")}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": _share}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": st.floats(1.5, 4.0)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": _share,
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.just(4.0),
            "original_max_position_embeddings": st.just(16),
        }
    ),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": _share, "original_max_position_embeddings": st.just(16)}
    ),
)


@st.composite
def configs(draw: st.DrawFn, model_type: str) -> Raw:
    n_layers, kv_heads, d_head = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 2 * draw(st.integers(2, 6))
    heads = kv_heads * draw(st.integers(1, 3)) if kv_heads > 1 else draw(st.integers(2, 4))
    wide = model_type in WIDE
    raw = {
        "model_type": model_type,
        "vocab_size": draw(st.integers(257, 300)),
        "hidden_size": draw(st.integers(8, 40)) if wide else heads * d_head,
        "intermediate_size": draw(st.integers(3, 40)),
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if model_type in UNGROUPED else kv_heads,
        "max_position_embeddings": CONTEXT,
        **({"head_dim": d_head} if wide else {}),
        **draw(st.fixed_dictionaries(OPTIONS.get(model_type, {}))),
    }
    if model_type in PARTIAL:
        raw[PARTIAL[model_type]] = (2 * draw(st.integers(1, d_head // 2)) + 0.5) / d_head
    raw |= draw(_rope_settings(model_type, d_head))
    return raw | _gpt(raw, n_layers)


@st.composite
def _rope_settings(draw: st.DrawFn, model_type: str, d_head: int) -> Raw:
    """`rope_parameters`, of one kind or for each kind of layer."""
    theta = {"rope_theta": draw(st.sampled_from([50.0, 10_000.0]))}
    if model_type in SCALED:
        return {"rope_parameters": draw(_ROPES) | theta}
    if model_type in BY_LAYER:
        return {"rope_parameters": {"full_attention": draw(_ROPES) | theta, "sliding_attention": draw(_ROPES) | theta}}
    if model_type == "phi3" and draw(_flag):
        factors = st.lists(_share, min_size=d_head // 2, max_size=d_head // 2)
        long = {"short_factor": draw(factors), "long_factor": draw(factors), "original_max_position_embeddings": 16}
        return {"rope_parameters": {"rope_type": "longrope", **long, **theta}}
    return {}


def _gpt(raw: Raw, n_layers: int) -> Raw:
    """The names that GPT-2 and GPT-Neo have for sizes."""
    sizes = {"n_embd": raw["hidden_size"], "n_layer": n_layers, "n_head": raw["num_attention_heads"]}
    if raw["model_type"] == "gpt2":
        return sizes | {"n_positions": CONTEXT, "n_inner": raw["intermediate_size"]}
    if raw["model_type"] == "gpt_neo":
        kinds = [["global", "local"][i % 2] for i in range(n_layers)]
        return {"num_layers": n_layers, "num_heads": sizes["n_head"], "attention_types": [[kinds, 1]]}
    return {}


@dataclass(frozen=True)
class Run:
    """A model, two prompts of one length, chunks of that length, a layer, a position, and a seed for vectors."""

    raw: Raw
    ids: list[int]
    donor: list[int]
    chunks: list[int]
    layer: int
    position: int
    seed: int

    @cached_property
    def model(self) -> Model:
        return families.made("random", self.raw, families.Seeded(f"random {self.seed}", self.raw))


@st.composite
def runs(draw: st.DrawFn, model_type: str) -> Run:
    raw, n = draw(configs(model_type)), draw(st.integers(3, LONGEST))
    tokens = st.lists(st.integers(0, 255), min_size=n, max_size=n)
    chunks, left = [], n
    while left:
        chunks.append(draw(st.integers(1, left)))
        left -= chunks[-1]
    layer = draw(st.integers(0, raw["num_hidden_layers"] - 1))
    return Run(raw, draw(tokens), draw(tokens), chunks, layer, draw(st.integers(0, n - 1)), draw(st.integers(0, 99)))
