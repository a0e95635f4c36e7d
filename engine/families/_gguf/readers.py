"""Metadata of a GGUF file -> entries of config.json; each reader takes the settings and what was read before it.

sizes           lengths, heads, epsilons          plain_rope      no scaling
scaled_rope     none, linear or yarn              llama_rope      and llama3's factors by frequency
longrope        Phi-3's factors, rotated in part  gemma2_layers   windows and the scale of scores
gemma3_layers   and two rotary bases
"""

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import DamagedFile
from engine.families._gguf.settings import Settings
from engine.families._read import whole

Raw = dict[str, Any]
Reader = Callable[[Settings, Raw], Raw]

NO_CHANGE: Mapping[str, Any] = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
"""Settings that change the computation -> the value that changes nothing."""

IGNORED = ("tensor_data_layout", "rope.scaling.finetuned", "vocab_size")
"""Settings that llama.cpp reads and that change nothing (the vocabulary's size is read where it is needed)."""


def sizes(names: Mapping[str, str], free_width: bool = True) -> Reader:
    """Reader of entries under `names` (GGUF -> config.json). `free_width`: heads may be of any width."""

    def read(s: Settings, _: Raw) -> Raw:
        raw = {key: value for name, key in names.items() if (value := s.get(name)) is not None}
        if missing := [name for name, key in names.items() if key not in {*raw, "num_key_value_heads"}]:
            raise s.missing(missing[0])
        raw["vocab_size"] = s.get("vocab_size", s.tokens())
        if (tokens := s.tokens()) is not None and tokens > (rows := whole(raw, "vocab_size")):  # as llama.cpp does
            raise DamagedFile(f"the tokenizer has {tokens} tokens, the model only {rows} embeddings")
        for name, harmless in NO_CHANGE.items():
            s.expect(name, harmless)
        for name in IGNORED:
            s.get(name)
        return raw | {"head_dim": _head_width(s, raw, free_width)}

    return read


def _head_width(s: Settings, raw: Raw, free: bool) -> int:
    """The width of a head; llama.cpp takes keys and values from the model's width where the file is silent."""
    usual = whole(raw, "hidden_size" if "hidden_size" in raw else "n_embd")
    usual = max(usual // whole(raw, "num_attention_heads" if "num_attention_heads" in raw else "n_head"), 1)
    width = whole({"head_dim": s.get("attention.key_length")}, "head_dim", usual)
    if width != usual and not free:
        raise s.refused("attention.key_length", width, f"here a head is {usual} wide")
    if (values := s.get("attention.value_length", usual)) != width:
        raise s.refused("attention.value_length", values, f"a head is {width} wide")
    return width


def plain_rope(s: Settings, raw: Raw) -> Raw:
    """The base, over the whole head; llama.cpp's default for it is 10000 everywhere."""
    width = whole(raw, "head_dim")
    if (turned := s.get("rope.dimension_count", width)) != width:
        raise s.refused("rope.dimension_count", turned, f"it must be the head width {width}")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": s.get("rope.freq_base", 10_000.0)}}


def scaled_rope(*kinds: str) -> Reader:
    """Reader of the rotary embedding where `kinds` of scaling are known; linear is llama.cpp's default kind."""

    def read(s: Settings, raw: Raw) -> Raw:
        plain = plain_rope(s, raw)["rope_parameters"]
        kind, factor = s.get("rope.scaling.type", "linear"), _factor(s)
        original = s.get("rope.scaling.original_context_length")
        s.expect("rope.scaling.attn_factor", 1.0)
        if kind == "none" or (kind == "linear" and factor == 1):
            return {"rope_parameters": plain}
        if kind not in kinds:
            raise s.refused("rope.scaling.type", kind, f"the supported ones are none, {', '.join(kinds)}")
        scaled = plain | {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            for name, usual in (("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0), ("yarn_ext_factor", 1.0)):
                s.expect(f"rope.scaling.{name}", usual, why="llama.cpp and transformers do not agree about it")
            scaled["original_max_position_embeddings"] = original or raw.get("max_position_embeddings")
        return {"rope_parameters": scaled}

    return read


def _factor(s: Settings) -> Any:
    """How far positions are stretched, under its present or its older name; 0 means not at all."""
    old = s.get("rope.scale_linear", 0.0)
    return s.get("rope.scaling.factor", old) or 1.0


def llama_rope(s: Settings, raw: Raw) -> Raw:
    """Llama 3.1's scaling comes as a tensor: a divisor for each frequency."""
    read = scaled_rope("linear", "yarn")(s, raw)
    divisors = s.vector("rope_freqs.weight")
    if divisors is None:
        return read
    settings = read["rope_parameters"]
    if settings["rope_type"] != "default":
        raise s.refused("rope.scaling.type", settings["rope_type"], "the file holds rope_freqs.weight, another scaling")
    return {"rope_parameters": settings | {"rope_type": "divided", "divisors": divisors}}


def longrope(s: Settings, raw: Raw) -> Raw:
    """Phi-3: two tensors of factors beyond and within the original context, or none; heads may be rotated in part.

    The converter states no kind of scaling for them: the tensors do.
    """
    width = whole(raw, "head_dim")
    turned = whole({"rope.dimension_count": s.get("rope.dimension_count")}, "rope.dimension_count", width)
    if turned > width:
        raise s.refused("rope.dimension_count", turned, f"a head is {width} wide")
    share = {"partial_rotary_factor": (turned + 0.5) / width} if turned < width else {}  # readers cut to whole features
    short, long = s.vector("rope_factors_short.weight"), s.vector("rope_factors_long.weight")
    if short is None and long is None:
        whole_head = scaled_rope("linear", "yarn")(s, raw | {"head_dim": turned})["rope_parameters"]
        return {"rope_parameters": whole_head | share}
    if short is None or long is None:
        raise DamagedFile("the file holds one of rope_factors_short.weight and rope_factors_long.weight, not both")
    if (kind := s.get("rope.scaling.type", "longrope")) != "longrope" or (kind := _factor(s)) != 1:
        raise s.refused("rope.scaling", kind, "the file holds factors of longrope, another scaling")
    settings = {
        "rope_type": "longrope",
        "rope_theta": s.get("rope.freq_base", 10_000.0),
        "short_factor": short,
        "long_factor": long,
        "attention_factor": s.get("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": s.get(
            "rope.scaling.original_context_length", raw.get("max_position_embeddings")
        ),
    }
    return {"rope_parameters": settings | share}


def phi3_window(s: Settings, raw: Raw) -> Raw:
    """0 is none. llama.cpp leaves Phi-3's window out (its pull request 13676); the model was trained with it."""
    return {"sliding_window": s.get("attention.sliding_window") or None}


def gemma2_layers(s: Settings, raw: Raw) -> Raw:
    """Every second layer has a window; softcaps have llama.cpp's defaults, which are Gemma 2's."""
    return {
        "sliding_window": s.get("attention.sliding_window", 4096),
        "layer_types": _layer_types(s, raw, 2),
        "attn_logit_softcapping": s.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": s.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _score_width(raw, of_27b=46),
    }


def gemma3_layers(s: Settings, raw: Raw) -> Raw:
    """Five windowed layers to a full one, each kind with its own base; scaling is that of the full ones."""
    window = s.get("attention.sliding_window") or None
    types = _layer_types(s, raw, 6) if window else ["full_attention"] * whole(raw, "num_hidden_layers")
    local = {"rope_type": "default", "rope_theta": s.get("rope.freq_base_swa", 10_000.0)}
    s.get("attention.sliding_window_pattern")  # changes nothing without a window
    return {
        "sliding_window": window,
        "layer_types": types,
        "rope_parameters": {"full_attention": raw["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": s.get("final_logit_softcapping") or None,
        "query_pre_attn_scalar": _score_width(raw, of_27b=62),
    }


def _layer_types(s: Settings, raw: Raw, usual: int) -> list[str]:
    """`attention.sliding_window_pattern`: a flag for each layer, or every how many layers one is full (0: none)."""
    n_layers, pattern = whole(raw, "num_hidden_layers"), s.get("attention.sliding_window_pattern", usual)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(n_layers)]
    if not isinstance(pattern, list) or len(pattern) != n_layers:
        raise s.refused(
            "attention.sliding_window_pattern", pattern, f"it must have an entry for each of {n_layers} layers"
        )
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _score_width(raw: Raw, of_27b: int) -> int:
    """Scores are divided by the root of this. Files do not say: llama.cpp knows the 27B models by their layers."""
    if whole(raw, "num_hidden_layers") == of_27b:
        return whole(raw, "hidden_size") // whole(raw, "num_attention_heads")
    return whole(raw, "head_dim")
