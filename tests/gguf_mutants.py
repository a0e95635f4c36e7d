"""Mutants of loading: what GGUF files, llama.cpp's tokenizers and multimodal checkpoints say, read wrongly.

GGUF_MUTANTS   caught by llama.cpp's golden logits and ids, and by the tests of the text part of Gemma 3
"""

from mutant import Mutant

_READERS, _TABLE = "families/_gguf/readers.py", "families/_gguf/table.py"
_TENSORS, _WORDS = "families/_gguf/tensors.py", "gguf_tokenizer.py"

_FILES = (
    ("rows of queries and keys left interleaved", _TENSORS, "if part in self._heads:", "if False:"),
    ("keys put back by the heads of queries", _TENSORS, "kv_heads if kv else heads for", "heads for"),
    ("rows put back in the wrong order", _TENSORS, "heads, -1, 2, *rows", "heads, 2, -1, *rows"),
    ("rows of qwen2 put back too", _TABLE, 'readers.scaled_rope("linear", "yarn")), _ENDS, _LLAMA\n    ),',
     'readers.scaled_rope("linear", "yarn")), _ENDS, _LLAMA, interleaved={"attn_q": False, "attn_k": True}\n    ),'),
    ("gpt2: matrices not transposed", _TABLE, '"attn_qkv", "attn_output", "ffn_up", "ffn_down"),',
     '"attn_qkv", "ffn_up", "ffn_down"),'),
    ("gains given their 1 twice", "families/_parts.py", 'return not raw.get("gguf")', "return True"),
    ("gemma: norms swapped", _TABLE, '"post_attention_norm": "post_attention_layernorm"',
     '"post_attention_norm": "post_feedforward_layernorm"'),
    ("head norms swapped", _TABLE, '{"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}',
     '{"attn_q_norm": "self_attn.k_norm", "attn_k_norm": "self_attn.q_norm"}'),
    ("base of windowed layers ignored", _READERS, 's.get("rope.freq_base_swa", 10_000.0)',
     's.get("rope.freq_base_swa") and 10_000.0'),
    ("linear scaling ignored", _READERS, '(kind == "linear" and factor == 1)', 'kind == "linear"'),
    ("yarn's original context ignored", _READERS, "original or raw.get", "raw.get"),
    ("llama3's divisors ignored", _READERS, "    if divisors is None:", "    if True:"),
    ("llama3's divisors multiply", "families/_rope.py", "tuple(f / d for f, d", "tuple(f * d for f, d"),
    ("longrope: factors swapped", _READERS, '"short_factor": short,\n        "long_factor": long,',
     '"short_factor": long,\n        "long_factor": short,'),
    ("longrope: attention factor ignored", _READERS, '"attention_factor": s.get("rope.scaling.attn_factor", 1.0)',
     '"attention_factor": 1.0 * bool(s.get("rope.scaling.attn_factor"))'),
    ("longrope: original context ignored", _READERS,
     '"rope.scaling.original_context_length", raw.get("max_position_embeddings")\n',
     '"rope.scaling.original", s.get("rope.scaling.original_context_length") and raw.get("max_position_embeddings")\n'),
    ("longrope: the whole head rotated", _READERS, "if turned < width else {}", "if False else {}"),
    ("window ignored", _READERS, 'window = s.get("attention.sliding_window") or None',
     'window = s.get("attention.sliding_window") and None'),
    ("gemma2: every third layer full", _READERS, "_layer_types(s, raw, 2)", "_layer_types(s, raw, 3)"),
    ("gemma3: every fifth layer full", _READERS, "_layer_types(s, raw, 6)", "_layer_types(s, raw, 5)"),
    ("full layers first", _READERS, "i % pattern < pattern - 1", "i % pattern > 0"),
    ("gemma2: softcap of scores ignored", _READERS, '"attn_logit_softcapping": s.get("attn_logit_softcapping", 50.0)',
     '"attn_logit_softcapping": s.get("attn_logit_softcapping", 50.0) and 50.0'),
    ("gemma2: final softcap ignored", _READERS, '"final_logit_softcapping": s.get("final_logit_softcapping", 30.0)',
     '"final_logit_softcapping": s.get("final_logit_softcapping", 30.0) and 30.0'),
    ("gemma3: final softcap ignored", _READERS, 's.get("final_logit_softcapping") or None',
     's.get("final_logit_softcapping") and None'),
    ("gemma2: 27B's scale of scores ignored", _READERS, "of_27b=46", "of_27b=47"),
    ("gemma3: 27B's scale of scores ignored", _READERS, "of_27b=62", "of_27b=63"),
    ("phi3: window left out", _READERS, 'return {"sliding_window": s.get("attention.sliding_window") or None}',
     'return {"sliding_window": s.get("attention.sliding_window") and None or None}'),
    ("unknown settings ignored", "families/_gguf/settings.py", "        if unread:", "        if False:"),
)  # fmt: skip

_TOKENIZERS = (
    ("digits in threes for qwen2", _WORDS, '_QWEN2 = PreTokenizer(lambda: _split(r"\\p{N}"))',
     '_QWEN2 = PreTokenizer(lambda: _split(r"\\p{N}{1,3}"))'),
    ("contractions in small letters only", _WORDS, "'[sS]|'[tT]", "'s|'t"),
    ("newlines not kept with punctuation", _WORDS, r"+[\r\n]*|\s*", r"+|\s*"),
    ("the last space not left to the word", _WORDS, r"|\s+(?!\S)|\s+", r"|\s+"),
    ("whole words not looked up first", _WORDS, "words_first=True, adds_bos", "words_first=False, adds_bos"),
    ("BOS of llama-bpe forgotten", _WORDS, "adds_bos=True", "adds_bos=False"),
    ("BOS of SentencePiece forgotten", _WORDS, "True, 1), partial", "False, 1), partial"),
    ("shortest special token first", _WORDS, "key=lambda i: -len(", "key=lambda i: len("),
    ("unknown token not special", _WORDS, "kinds = (UNKNOWN, CONTROL,", "kinds = (CONTROL,"),
    ("tokens special by name forgotten", _WORDS, " or token in SPECIAL_BY_NAME", ""),
    ("phi3: blanks after special tokens kept", _WORDS, "text.lstrip(BLANK) for", "text for"),
    ("no space put in front", _WORDS, "if prefixed and not inside else", "if False else"),
    ("worst score first", "spm.py", "(-self._scores[", "(self._scores["),
    ("merges with what has changed", "spm.py", 'or "".join(parts) != both or', "or"),
    ("bytes by another name", "spm.py", "{byte:02X}", "{byte:02x}"),
)  # fmt: skip

_MULTIMODAL = (
    ("anything may be left unread", "families/gemma3.py", "if not stored.startswith(VISION):",
     'if "language" in stored:'),
    ("nothing may be left unread", "families/gemma3.py", "if not stored.startswith(VISION):", "if True:"),
    ("defaults before what is stated", "families/gemma3.py", "{**DEFAULTS, **inner}", "{**inner, **DEFAULTS}"),
    ("older names not known", "families/gemma3.py", '"model.language_model.": "model."', '"x.": "model."'),
)  # fmt: skip

GGUF_MUTANTS = (
    *(Mutant(f"GGUF: {name}", *rest, "test_gguf_families.py") for name, *rest in _FILES),
    *(Mutant(f"GGUF ids: {name}", *rest, "test_gguf_tokenizers.py") for name, *rest in _TOKENIZERS),
    *(Mutant(f"gemma3: {name}", *rest, "test_multimodal.py") for name, *rest in _MULTIMODAL),
)
