"""What transformers makes of a directory's tokenizer by its class: `of_directory`.

Some classes take tokenizer.json as it stands. Others take its vocabulary and merges only, and put them into a pipeline
of their own, whatever the file's is: other ids for the same text. What such a class names as special tokens is special
where the files do not say otherwise.

Reference: transformers 5.23, tokenization_auto.py (which class), its file (which pipeline), and
tokenization_utils_tokenizers.py (what is taken from tokenizer.json).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import DamagedFile, UnknownModel, clipped

if TYPE_CHECKING:
    import tokenizers

Settings = Mapping[str, Any]
"""tokenizer_config.json."""
Model = dict[str, Any]
"""What a `tokenizers.models.BPE` is made of."""

AS_FILED = "TokenizersBackend"
"""The class that takes tokenizer.json as it stands."""

OF_MODEL_TYPE = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("granite", "mistral", "olmo2", "olmo3", "phi3", "stablelm"), AS_FILED),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}
"""The class of a model type. A class that the files name counts before it, except where it is `AS_FILED`."""

MISNAMED = ("qwen2",)
"""Model types whose files often name a wrong class, so that theirs counts."""

_OTHERS = """
    AlbertTokenizer AutoTokenizer BartTokenizer BarthezTokenizer BartphoTokenizer BasicTokenizer
    BertGenerationTokenizer BertJapaneseTokenizer BertTokenizer BertweetTokenizer BigBirdTokenizer BioGptTokenizer
    BlenderbotSmallTokenizer BlenderbotTokenizer ByT5Tokenizer CLIPTokenizer CTRLTokenizer CamembertTokenizer
    CanineTokenizer CharacterTokenizer ClvpTokenizer CohereTokenizer ConvBertTokenizer CpmAntTokenizer CpmTokenizer
    DPRContextEncoderTokenizer DPRQuestionEncoderTokenizer DPRReaderTokenizer DebertaTokenizer DebertaV2Tokenizer
    DiaTokenizer DistilBertTokenizer EsmTokenizer EsmcTokenizer FNetTokenizer FSMTTokenizer
    FastSpeech2ConformerTokenizer FlaubertTokenizer FunnelTokenizer GPTNeoXJapaneseTokenizer GPTSw3Tokenizer
    HerbertTokenizer LasrTokenizer LayoutLMv2Tokenizer LayoutLMv3Tokenizer LayoutXLMTokenizer LukeTokenizer
    M2M100Tokenizer MBart50Tokenizer MBartTokenizer MLukeTokenizer MPNetTokenizer MarianTokenizer MarkupLMTokenizer
    MecabTokenizer MgpstrTokenizer MobileBertTokenizer MyT5Tokenizer NllbTokenizer NougatTokenizer OpenAIGPTTokenizer
    PLBartTokenizer ParakeetTokenizer PegasusTokenizer PerceiverTokenizer PhobertTokenizer Pop2PianoTokenizer
    ProphetNetTokenizer Qwen3_5Tokenizer RagTokenizer ReformerTokenizer RemBertTokenizer RoCBertTokenizer
    RoFormerTokenizer RobertaTokenizer SeamlessM4TTokenizer Siglip2Tokenizer SiglipTokenizer Speech2TextTokenizer
    SpeechT5Tokenizer SplinterTokenizer SqueezeBertTokenizer T5Tokenizer TapasTokenizer Tipsv2Tokenizer UdopTokenizer
    VideoPrismTokenizer VitsTokenizer Wav2Vec2CTCTokenizer Wav2Vec2PhonemeCTCTokenizer WhisperTokenizer
    WordpieceTokenizer XGLMTokenizer XLMRobertaTokenizer XLMTokenizer XLNetTokenizer
"""
OTHERS = frozenset(_OTHERS.split())
"""Classes of transformers that do something else again; a name that is none of its classes means `AS_FILED`."""


@dataclass(frozen=True)
class Class:
    """`build` is None for tokenizer.json as it stands. `named` are the special tokens that it has by itself.

    `plain`: its special tokens take no spaces beside them, whatever the files say.
    """

    build: "Callable[[Model, Settings], tokenizers.Tokenizer] | None" = None
    named: Mapping[str, str] = field(default_factory=dict)
    begins: Literal["as filed", "with BOS", "without BOS"] = "as filed"
    plain: bool = False

    def rebuilt(
        self, filed: "tokenizers.Tokenizer", source: Mapping[str, Any], settings: Settings
    ) -> "tokenizers.Tokenizer":
        """The class's tokenizer, without added tokens; `filed` and `source` are tokenizer.json read in two ways."""
        if self.build is None:
            return filed
        model = source.get("model", {})
        if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
            raise UnknownModel(
                f"tokenizer.json holds a {clipped(model.get('type'))} vocabulary, and the directory's tokenizer_class "
                f"is one that makes BPE of it; {_INSTEAD}"
            )
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
        made = self.build({"vocab": model["vocab"], "merges": pairs}, settings)
        if self.begins == "as filed" and filed.post_processor is not None:
            made.post_processor = filed.post_processor
        return made

    def finish(self, library: "tokenizers.Tokenizer", bos: str | None, special: Sequence[str]) -> None:
        """What the class does, whatever the files say, once the added tokens are there."""
        from tokenizers import AddedToken
        from tokenizers.processors import TemplateProcessing

        if self.plain:
            library.add_tokens([AddedToken(text, special=True) for text in special])
        if self.begins == "with BOS" and bos is not None:
            at = library.token_to_id(bos)
            library.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, at)])


_INSTEAD = "if tokenizer.json is as the model was trained, name PreTrainedTokenizerFast in tokenizer_config.json"


def of_directory(settings: Settings, raw: Mapping[str, Any], byte_level: bool) -> Class:
    """`raw` is config.json; `byte_level`: whether tokenizer.json has a part of that name.

    Raises `UnknownModel` for a class that is not followed.
    """
    name = _named(settings, raw, byte_level)
    if name in OTHERS:
        raise UnknownModel(
            f"the directory's tokenizer_class is {name}, whose way of making tokens is not read; {_INSTEAD}"
        )
    return CLASSES.get(name, Class())


def _named(settings: Settings, raw: Mapping[str, Any], byte_level: bool) -> str:
    kind = raw.get("model_type")
    own = OF_MODEL_TYPE.get(kind) if isinstance(kind, str) else None
    declared = settings.get("tokenizer_class") or raw.get("tokenizer_class")
    if declared is None or own == AS_FILED or (own is not None and kind in MISNAMED):
        return own or AS_FILED
    if not isinstance(declared, str):
        raise DamagedFile(f"tokenizer_class is {clipped(declared)}; it must be a name")
    declared = declared.removesuffix("Fast")
    return AS_FILED if declared == "LlamaTokenizer" and byte_level else declared


MARK = "\u2581"


def _llama(model: Model, settings: Settings) -> "tokenizers.Tokenizer":
    from tokenizers.models import BPE

    spaced = _flag(settings, "add_prefix_space", True)
    scheme = "always" if spaced and settings.get("legacy") else "first"
    return _marked(BPE(**model, fuse_unk=True, byte_fallback=True), scheme if spaced else "never", strip=spaced)


def _code_llama(model: Model, settings: Settings) -> "tokenizers.Tokenizer":
    from tokenizers.models import BPE

    core = BPE(**model, unk_token=_unknown(settings), fuse_unk=True, byte_fallback=True)
    return _marked(core, "first" if _flag(settings, "add_prefix_space", True) else "never", strip=True)


def _marked(core: "tokenizers.models.BPE", scheme: str, strip: bool) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    made = Tokenizer(core)
    made.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme=scheme, split=False)
    parts = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return made


def _gemma(model: Model, settings: Settings) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    made = Tokenizer(BPE(**model, unk_token=_unknown(settings), fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", MARK)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _gpt2(model: Model, settings: Settings) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    made = Tokenizer(BPE(**model))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=_flag(settings, "add_prefix_space", False))
    made.decoder = decoders.ByteLevel()
    return made


def _gpt_neox(model: Model, settings: Settings) -> "tokenizers.Tokenizer":
    from tokenizers import normalizers

    made = _gpt2(model, settings)
    made.normalizer = normalizers.NFC()
    return made


_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(model: Model, settings: Settings) -> "tokenizers.Tokenizer":
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    made = _gpt_neox(model, settings)
    spaced = _flag(settings, "add_prefix_space", False)
    words = Split(Regex(_QWEN2_WORDS), "isolated")
    made.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=spaced, use_regex=False)])
    return made


def _flag(settings: Settings, name: str, default: bool) -> bool:
    value = settings.get(name)
    return default if value is None else bool(value)


def _unknown(settings: Settings) -> str:
    """The text of the token for what no token stands for, as text or as a token's fields."""
    value = settings.get("unk_token", "<unk>")
    return str(value["content"] if isinstance(value, dict) else value)


def _same(text: str, *parts: str) -> dict[str, str]:
    return {f"{part}_token": text for part in parts}


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_INFILLING = {f"{part}_token": f"{MARK}<{part[:3].upper()}>" for part in ("prefix", "middle", "suffix", "eot")}
_GPT2 = _same("<|endoftext|>", "bos", "eos", "unk")

CLASSES = {
    "LlamaTokenizer": Class(_llama, _LLAMA),
    "CodeLlamaTokenizer": Class(_code_llama, _LLAMA | _INFILLING | {"fill_token": "<FILL_ME>"}, "with BOS"),
    "GemmaTokenizer": Class(_gemma, {f"{part}_token": f"<{part}>" for part in ("bos", "eos", "unk", "pad", "mask")}),
    "GPT2Tokenizer": Class(_gpt2, _GPT2),
    "CodeGenTokenizer": Class(_gpt2, _GPT2),
    "GPTNeoXTokenizer": Class(_gpt_neox, _GPT2 | {"pad_token": "<|padding|>"}, "without BOS"),
    "Qwen2Tokenizer": Class(_qwen2, _same("<|endoftext|>", "eos", "unk", "pad"), plain=True),
}
