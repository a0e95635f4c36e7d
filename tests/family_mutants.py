"""Mutants of the architectures: a feature of one family, or of what families share, taken away or done wrongly.

FAMILY_MUTANTS   (name, file in engine/, text that is there exactly once, what it becomes, features that it takes away)
concerns         the rows that must notice a mutant: those with one of its features
uncovered        features of a row without a mutant, and mutants without a feature

`tests/golden/families.*` must notice each mutant on each of its rows, by at least 100 times what is allowed there.
"""

from collections.abc import Iterator
from functools import cache

import families
from features import features
from mutant import Mutant


def _m(name: str, file: str, old: str, new: str, *features: str) -> Mutant:
    return Mutant(name, file, old, new, features=features)


FAMILY_MUTANTS = (
    # --- what the decoder and the parts that families share do
    _m("an RMS norm is centred", "decoder.py", 'if cfg.norm == "rms":', 'if cfg.norm == "none":', "rms norm"),
    _m("epsilon x 10", "ops.py", "scale += np.float32(eps)", "scale += np.float32(eps * 10)", "epsilon"),
    _m("norm before attention dropped", "decoder.py", "attention(norm(x, p.attn_norm, cfg),", "attention(x,",
       "norm before attention"),
    _m("norm before the MLP dropped", "decoder.py", "mlp(norm(mid, p.mlp_norm, cfg),", "mlp(mid,",
       "norm before the MLP"),
    _m("final norm dropped", "decoder.py", "return unembed(model, norm(x[:, rows], model.params.final_norm, run.cfg))",
       "return unembed(model, x[:, rows])", "final norm"),
    _m("queries are not rotated", "decoder.py", "q = rotate(q, *", "q, *_ = (q, *",
       "rotary positions"),
    _m("values of the wrong group", "ops.py", "-1, s_kv) @ v\n", "-1, s_kv) @ v[:, ::-1]\n", "grouped queries"),
    _m("gate and up swapped", "decoder.py",
       "run.cfg.activation, *branches)", "run.cfg.activation, *branches[::-1])", "gated MLP"),
    _m("a plain MLP gates itself", "decoder.py", "run.cfg.activation, *branches)",
       "run.cfg.activation, *(branches * 2)[:2])", "plain MLP"),
    _m("MLP reads the layer's input", "decoder.py", "m = norm(mlp(norm(mid,", "m = norm(mlp(norm(x,",
       "sequential blocks"),
    _m("bias of q, k and v dropped", "decoder.py", "linear(x, p.qkv.weight, p.qkv.bias)",
       "linear(x, p.qkv.weight)", "bias of q, k and v"),
    _m("bias of attention's output dropped", "decoder.py", "p.o.weight, p.o.bias)", "p.o.weight)",
       "bias of attention's output"),
    _m("bias of the MLP's input dropped", "decoder.py", "linear(x, p.gate_up.weight, p.gate_up.bias)",
       "linear(x, p.gate_up.weight)", "bias of the MLP"),
    _m("bias of the MLP's output dropped", "decoder.py", "p.down.weight, p.down.bias)", "p.down.weight)",
       "bias of the MLP"),
    _m("attention scale of the heads' width everywhere", "decoder.py", "scale=cfg.attn_scales[layer]",
       "scale=cfg.d_head**-0.5", "attention scale"),
    _m("window of layer 0 everywhere", "decoder.py", "window=cfg.windows[layer]", "window=cfg.windows[0]",
       "windows in some layers"),
    _m("window wider by one", "ops.py", "hidden |= distance >= window", "hidden |= distance > window", "window"),
    _m("SiLU as GELU", "activations.py", '"silu": _silu,', '"silu": _gelu,', "activation silu"),
    _m("frequencies do not follow the length", "config.py", "np.asarray(self.frequencies(length))",
       "np.asarray(self.inv_freq)", "frequencies of long sequences"),
    _m("cosines and sines without the attention factor", "config.py",
       "np.cos(angle) * self.scale).astype(np.float32), (np.sin(angle) * self.scale)",
       "np.cos(angle)).astype(np.float32), (np.sin(angle))", "attention factor of the rope"),
    _m("every rotary base 10000", "families/_rope.py", 'return real(settings, "rope_theta", 10_000.0, least=1.0)',
       "return 10_000.0", "rotary base"),
    _m("heads as wide as the model allows", "families/_parts.py",
       'whole(raw, "head_dim", max(whole', "max(1, max(whole",
       "heads wider than the model"),
    _m("an untied head is read as tied", "families/_parts.py", "tensors.get(head, shape)",
       "tensors.get(embed, shape)", "untied head"),
    _m("a tied head is read as untied", "families/_parts.py", "if not cfg.tied:", "if True:", "tied head"),
    _m("query and key norms dropped", "decoder.py", "flat = norm(flat, weight, cfg)", "pass",
       "queries normed", "keys normed"),
    _m("norm after attention dropped", "decoder.py", "p, layer, run), p.attn_post_norm,", "p, layer, run), None,",
       "norm after attention"),
    _m("norm after the MLP dropped", "decoder.py", "p, layer, run), p.mlp_post_norm,", "p, layer, run), None,",
       "norm after the MLP"),
    _m("each head divided by the norm of all", "ops.py", "scale = np.vecdot(x, x)[..., None]",
       "scale = np.vecdot(x, x).mean(-1, keepdims=True)[..., None]", "heads normed one by one"),
    _m("each head divided by its own norm", "decoder.py", "flat = norm(flat, weight, cfg)",
       "flat = norm(flat, weight and Norm(weight.weight.reshape(-1, cfg.d_head)), cfg)",
       "heads normed together"),
    _m("keys normed with the queries' gain", "decoder.py", 'heads(k, p.k_norm, "k")', 'heads(k, p.q_norm, "k")',
       "keys normed"),
    _m("embedding scale ignored", "decoder.py", "return x * np.float32(model.config.embed_scale) if", "return x if",
       "embedding scale"),
    _m("residual multiplier ignored", "decoder.py", "return x if factor == 1 else", "return x if True else",
       "residual multiplier"),
    _m("logit scale ignored", "decoder.py", "logits *= np.float32(model.config.logit_scale)", "pass", "logit scale"),
    _m("attention softcap ignored", "decoder.py", "cap=cfg.attn_softcap", "cap=None", "attention softcap"),
    _m("final softcap ignored", "decoder.py", "softcap(logits, model.config.final_softcap)", "softcap(logits, None)",
       "final softcap"),
    _m("window ignored", "decoder.py", "window=cfg.windows[layer]", "window=None", "window"),
    _m("attention scale of layer 0 everywhere", "decoder.py", "cfg.attn_scales[layer]", "cfg.attn_scales[0]",
       "attention scale by layer"),
    _m("rotary embedding of layer 0 everywhere", "decoder.py", "rope = cfg.ropes[layer]", "rope = cfg.ropes[0]",
       "rotary frequencies by layer", "layers without rotary"),
    _m("learned positions off by one", "decoder.py", "model.params.positions[pos]", "model.params.positions[pos + 1]",
       "learned positions"),
    _m("learned positions dropped", "decoder.py", "x + model.params.positions[pos]", "x", "learned positions"),
    _m("parallel blocks run in sequence", "decoder.py", "mid = x if cfg.parallel else", "mid = x if False else",
       "parallel blocks"),
    _m("bias of the unembedding dropped", "decoder.py", "if ends.unembed_bias is not None:", "if False:",
       "bias of the head"),
    _m("layer norm not centred", "ops.py", "centred = x - x.mean(-1, keepdims=True)", "centred = x", "layer norm"),
    _m("bias of layer norms dropped", "ops.py", "        out += bias\n    return out\n\n\ndef rotate",
       "        pass\n    return out\n\n\ndef rotate", "bias of norms"),
    _m("plain GELU as its tanh approximation", "activations.py", '"gelu": _gelu,', '"gelu": _gelu_tanh,',
       "activation gelu"),
    _m("gelu_new as plain GELU", "activations.py", '"gelu_new": _gelu_tanh,', '"gelu_new": _gelu,',
       "activation gelu_new"),
    _m("gelu_pytorch_tanh as plain GELU", "activations.py", '"gelu_pytorch_tanh": _gelu_tanh,',
       '"gelu_pytorch_tanh": _gelu,', "activation gelu_pytorch_tanh"),
    _m("factors for long sequences ignored", "config.py", "return self.long[1]", "return self.inv_freq",
       "longrope rope"),
    _m("dynamic scaling never grows", "config.py", "return Rope.plain(grown, width).inv_freq", "return self.inv_freq",
       "dynamic rope"),
    _m("linear rope read as plain", "families/_rope.py", '"linear": _linear,', '"linear": _default,', "linear rope"),
    _m("llama3 rope read as plain", "families/_rope.py", '"llama3": _llama3,', '"llama3": _default,', "llama3 rope"),
    _m("yarn rope read as plain", "families/_rope.py", '"yarn": _yarn,', '"yarn": _default,', "yarn rope"),
    _m("dynamic rope read as plain", "families/_rope.py", '"dynamic": _dynamic,', '"dynamic": _default,',
       "dynamic rope"),
    _m("longrope rope read as plain", "families/_rope.py", '"longrope": _longrope,', '"longrope": _default,',
       "longrope rope"),
    _m("yarn without its attention factor", "families/_rope.py", ", _yarn_scale(settings, factor))", ")", "yarn rope"),
    _m("longrope without its attention factor", "families/_rope.py", 'real(settings, "attention_factor", scale), long',
       "1.0, long", "longrope rope"),
    _m("partial rotary made full", "families/_parts.py",
       "width = d_head if fraction is None else", "width = d_head if True else", "partial rotary"),
    _m("gain stored as gain - 1 used as it is", "families/_parts.py", "weight + np.float32(1) if plus_one",
       "weight if plus_one", "gains stored as gain - 1"),
    # --- families
    _m("llama: biases of attention not read", "families/llama.py", '_parts.has_bias(raw, "attention_bias")', "False",
       "bias of q, k and v", "bias of attention's output"),
    _m("llama: biases of the MLP not read", "families/llama.py", '_parts.has_bias(raw, "mlp_bias")', "False",
       "bias of the MLP"),
    _m("mistral: no window", "families/mistral.py", 'else "sliding_attention"', 'else "full_attention"', "window"),
    _m("qwen2: biases not read", "families/qwen2.py", "qkv_bias=True", "qkv_bias=False", "bias of q, k and v"),
    _m("qwen2: windows one layer too late", "families/qwen2.py", "if i >= first else", "if i > first else",
       "windows in some layers"),
    _m("qwen3: keys have the queries' norm", "families/qwen3.py", '.k_norm"', '.q_norm"', "keys normed"),
    _m("gemma: embedding not scaled", "families/gemma.py", 'embed_scale=whole(raw, "hidden_size") ** 0.5',
       "embed_scale=1.0", "embedding scale"),
    _m("gemma: head untied", "families/gemma.py", '"tie_word_embeddings": True', '"tie_word_embeddings": False',
       "tied head"),
    _m("gemma2: scores divided by the heads' width", "families/gemma2.py", 'real(raw, "query_pre_attn_scalar", 256)',
       'whole(raw, "head_dim", 256)', "attention scale"),
    _m("gemma2: windows in the other layers", "families/gemma2.py",
       '"full_attention" if i % 2 else "sliding_attention"', '"sliding_attention" if i % 2 else "full_attention"',
       "windows in some layers"),
    _m("gemma2: attention softcap not read", "families/gemma2.py", "attn_softcap=optional_cap(",
       "attn_softcap=(lambda *a: None)(", "attention softcap"),
    _m("gemma2: norms around the MLP swapped", "families/gemma2.py", ".pre_feedforward_layernorm",
       ".post_attention_layernorm", "norm after the MLP"),
    _m("gemma3: one rotary base for all layers", "families/gemma3_text.py", '"sliding_attention": 10_000.0',
       '"sliding_attention": 1_000_000.0', "rotary frequencies by layer"),
    _m("gemma3: full layers in the wrong places", "families/gemma3_text.py", "(i + 1) % pattern", "i % pattern",
       "windows in some layers"),
    _m("gemma3: scores divided by the heads' width", "families/gemma3_text.py",
       'real(raw, "query_pre_attn_scalar", 256)', 'whole(raw, "head_dim", 256)', "attention scale"),
    _m("gpt2: keys and values swapped", "families/gpt2.py",
       'qkv=_conv1d(tensors, f"{at}.attn.c_attn", cfg.d_model, *cfg.qkv_widths)',
       'qkv=Joined.of(*(_conv1d(tensors, f"{at}.attn.c_attn", cfg.d_model, *cfg.qkv_widths).parts()[i] '
       "for i in (0, 2, 1)))", "q, k and v fused"),
    _m("gpt2: scale not divided by the layer", "families/gpt2.py", "scale / (i + 1) if by_layer", "scale if by_layer",
       "attention scale by layer"),
    _m("gpt2: fused weights split by rows of heads", "families/gpt2.py",
       'qkv=_conv1d(tensors, f"{at}.attn.c_attn", cfg.d_model, *cfg.qkv_widths)',
       'qkv=Joined((w := _conv1d(tensors, f"{at}.attn.c_attn", cfg.d_model, *cfg.qkv_widths)).weight'
       ".reshape(cfg.d_model, -1, 3).swapaxes(1, 2).reshape(cfg.d_model, -1), w.bias, widths=w.widths)",
       "q, k and v fused"),
    _m("gpt2: matrices read as (out, in)", "families/gpt2.py",
       'tensors.get(f"{name}.weight", (d_in, d_out))', 'tensors.get(f"{name}.weight", (d_out, d_in)).T',
       "matrices stored (in, out)"),
    _m("gpt_neo: windows in the global layers", "families/gpt_neo.py", 'kind == "local"', 'kind == "global"',
       "windows in some layers"),
    _m("gpt_neo: scores divided", "families/gpt_neo.py", "attn_scales=(1.0,)", "attn_scales=(0.3,)", "attention scale"),
    _m("gpt_neo: bias of the output not read", "families/gpt_neo.py", "o_bias=True", "o_bias=False",
       "bias of attention's output"),
    _m("gpt_neox: heads and q, k, v mixed up", "families/gpt_neox.py", ".reshape(cfg.n_heads, 3, cfg.d_head, d_model)",
       ".reshape(3, cfg.n_heads, cfg.d_head, d_model).swapaxes(0, 1)", "q, k and v fused"),
    _m("gpt_neox: always parallel", "families/gpt_neox.py", 'parallel=flag(raw, "use_parallel_residual", True)',
       "parallel=True", "sequential blocks"),
    _m("gpt_neox: another share rotated", "families/gpt_neox.py", 'real(raw, "rotary_pct", 0.25)', "0.7",
       "partial rotary"),
    _m("granite: embedding multiplier not read", "families/granite.py", 'real(raw, "embedding_multiplier", 1.0)', "1.0",
       "embedding scale"),
    _m("granite: attention multiplier not read", "families/granite.py", 'real(raw, "attention_multiplier", 1.0)', "0.3",
       "attention scale"),
    _m("granite: residual multiplier not read", "families/granite.py", 'real(raw, "residual_multiplier", 1.0)', "1.0",
       "residual multiplier"),
    _m("granite: logits multiplied", "families/granite.py", "logit_scale=1 / real", "logit_scale=real", "logit scale"),
    _m("olmo2: norms before attention", "families/olmo2.py", "attn_post_norm=", "attn_norm=", "norm after attention"),
    _m("olmo2: norms before the MLP", "families/olmo2.py", "mlp_post_norm=", "mlp_norm=", "norm after the MLP"),
    _m("olmo3: full layers in the wrong places", "families/olmo3.py", "(i + 1) % 4", "(i + 1) % 2",
       "windows in some layers"),
    _m("olmo3: another rotary base", "families/olmo3.py", "500_000.0", "10_000.0", "rotary base"),
    _m("phi: heads not normed", "families/phi.py", 'normed = flag(raw, "qk_layernorm", False)', "normed = False",
       "keys normed"),
    _m("phi: blocks in sequence", "families/phi.py", "parallel=True", "parallel=False", "parallel blocks"),
    _m("phi: head without bias", "families/phi.py", "head_bias=True", "head_bias=False", "bias of the head"),
    _m("phi3: keys and values swapped", "families/phi3.py",
       'qkv=_fused(tensors, f"{at}.self_attn.qkv_proj", cfg.d_model, *cfg.qkv_widths)',
       'qkv=Joined.of(*(_fused(tensors, f"{at}.self_attn.qkv_proj", cfg.d_model, *cfg.qkv_widths).parts()[i] '
       "for i in (0, 2, 1)))", "q, k and v fused"),
    _m("phi3: gate and up swapped", "families/phi3.py",
       'gate_up=_fused(tensors, f"{at}.mlp.gate_up_proj", cfg.d_model, cfg.d_mlp, cfg.d_mlp)',
       'gate_up=Joined.of(*_fused(tensors, f"{at}.mlp.gate_up_proj", cfg.d_model, cfg.d_mlp, cfg.d_mlp)'
       ".parts()[::-1])",
       "gate and up fused"),
    _m("phi3: no window", "families/phi3.py", 'else "sliding_attention"', 'else "full_attention"', "window"),
    _m("phi3: another epsilon", "families/phi3.py", "1e-5", "1e-6", "default epsilon"),
    _m("smollm3: every layer rotated", "families/smollm3.py", "rope if r else None", "rope", "layers without rotary"),
    _m("smollm3: another rotary base", "families/smollm3.py", "2_000_000.0", "10_000.0", "rotary base"),
    _m("stablelm: heads not normed", "families/stablelm.py", 'normed = flag(raw, "qk_layernorm", False)',
       "normed = False", "keys normed"),
    _m("stablelm: one gain for all heads", "families/stablelm.py", ".norms.{head}.weight", ".norms.0.weight",
       "gains by head"),
    _m("stablelm: never parallel", "families/stablelm.py", 'parallel=flag(raw, "use_parallel_residual", False)',
       "parallel=False", "parallel blocks"),
    _m("stablelm: all features rotated", "families/stablelm.py", "fraction=0.25", "fraction=1.0", "partial rotary"),
    _m("starcoder2: no window", "families/starcoder2.py", 'else "sliding_attention"', 'else "full_attention"',
       "window"),
    _m("starcoder2: biases not read", "families/starcoder2.py", 'flag(raw, "use_bias", True)', "False",
       "bias of q, k and v", "bias of attention's output", "bias of the MLP"),
    _m("starcoder2: RMS norms", "families/starcoder2.py", 'norm="layer"', 'norm="rms"', "layer norm"),
    _m("phi: the MLP has a norm of its own", "families/phi.py", "mlp_norm=shared",
       'mlp_norm=_parts.norm(tensors, f"{at}.post_attention_layernorm", cfg.d_model, bias=True)',
       "one norm for attention and MLP"),
    _m("stablelm: parallel blocks with two norms", "families/stablelm.py", "second = first if cfg.parallel else",
       "second = first if False else", "one norm for attention and MLP"),
)  # fmt: skip


@cache
def _features(row: str) -> frozenset[str]:
    return frozenset(features(row))


def concerns(mutant: Mutant) -> list[str]:
    """The rows with a feature that the mutant takes away; of one family, if the mutant is in its file."""
    module = mutant.file.removeprefix("families/").removesuffix(".py")
    own = mutant.file.startswith("families/") and not module.startswith("_")
    return [
        row
        for row, raw in families.ROWS.items()
        if (raw["model_type"] == module or not own) and _features(row) & {*mutant.features}
    ]


def uncovered() -> Iterator[str]:
    """Features of rows that no mutant takes away, and mutants that take away what no row has."""
    rows = {mutant: concerns(mutant) for mutant in FAMILY_MUTANTS}
    for row in families.ROWS:
        taken = {feature for mutant in FAMILY_MUTANTS if row in rows[mutant] for feature in mutant.features}
        yield from (f"{row} has a feature without a mutant: {name}" for name in sorted(_features(row) - taken))
    for mutant in FAMILY_MUTANTS:
        unknown = {*mutant.features} - set().union(*(_features(row) for row in rows[mutant]))
        if unknown or not mutant.features:
            yield f"the mutant {mutant.name!r} takes away what no row has: {', '.join(sorted(unknown)) or 'nothing'}"
