"""The tokenizer inside a GGUF file, rebuilt with Hugging Face's `tokenizers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .extras import need
from .gguf_file import metadata, read_gguf
from .tokenizer import JsonTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# Tokens that end a turn though metadata may name only one of them.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How text is split into words before byte pairs are merged; None is GPT-2's own way.
_PATTERNS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_SINGLE_DIGITS = ("smollm",)
_WHOLE_WORDS = ("llama-bpe", "tekken")  # a word that is a token is taken whole, whatever the merges say
_BOS_BY_DEFAULT = ("llama-bpe", "tekken")


def gguf_tokenizer(path: Path) -> JsonTokenizer:
    """Raises ValueError for missing metadata, NotImplementedError for a kind that is not known."""
    values = metadata(read_gguf(path))
    given = {n.removeprefix("tokenizer.ggml."): v for n, v in values.items() if n.startswith("tokenizer.ggml.")}
    return build(given, values.get("tokenizer.chat_template"), str(path))


def build(given: Mapping[str, Any], chat_template: str | None, where: str = "the metadata") -> JsonTokenizer:
    """A tokenizer from the keys tokenizer.ggml.*, without that prefix.

    Raises:
        ValueError: missing keys.
        NotImplementedError: a kind of tokenizer, or a way to split words, that is not known.
    """
    kind = given.get("model")
    needed = {"gpt2": ("tokens", "merges", "token_type"), "llama": ("tokens", "scores", "token_type")}
    if kind not in needed:
        raise NotImplementedError(f"{where} has tokenizer.ggml.model {kind!r}; supported are {', '.join(needed)}")
    if missing := [f"tokenizer.ggml.{name}" for name in needed[kind] if name not in given]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    tokens = given["tokens"]
    library = _byte_level(given, where) if kind == "gpt2" else _sentencepiece(given)
    _add_special(library, tokens, given["token_type"])
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
    special = {name: tokens[given[key]] for name, key in names.items() if key in given}
    adds = given.get("add_bos_token", kind == "llama" or given.get("pre") in _BOS_BY_DEFAULT)
    bos = special.get("bos_token") if adds else None
    if bos is not None:
        processors = need("tokenizers.processors")
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, library.token_to_id(bos))]
        )
    stop = [given[f"{name}_token_id"] for name in ("eos", "eot", "eom") if f"{name}_token_id" in given]
    types = dict(zip(tokens, given["token_type"], strict=True))
    stop += [library.token_to_id(token) for token in _ENDS if types.get(token) == _CONTROL]
    return JsonTokenizer(library, bos, stop, special, chat_template)


def _add_special(library: Any, tokens: list[str], types: list[int]) -> None:
    make = need("tokenizers").AddedToken
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            library.add_special_tokens([make(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            library.add_tokens([make(token, special=False, normalized=False)])


def _byte_level(given: Mapping[str, Any], where: str) -> Any:
    """GPT-2's kind: bytes are written as printable characters, and the merges are listed."""
    t, pre = need("tokenizers"), given.get("pre")
    if pre not in _PATTERNS:
        raise NotImplementedError(f"{where} has tokenizer.ggml.pre {pre!r}; supported are {', '.join(_PATTERNS)}")
    vocab = {token: i for i, token in enumerate(given["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in given["merges"]]
    library = t.Tokenizer(t.models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS))
    steps = [t.pre_tokenizers.Digits(individual_digits=True)] if pre in _SINGLE_DIGITS else []
    pattern = _PATTERNS[pre]
    if pattern is not None:
        steps.append(t.pre_tokenizers.Split(t.Regex(pattern), behavior="isolated"))
    steps.append(t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    library.pre_tokenizer = t.pre_tokenizers.Sequence(steps)
    library.decoder = t.decoders.ByteLevel()
    return library


def _sentencepiece(given: Mapping[str, Any]) -> Any:
    """SentencePiece's kind: pieces have scores, and the pair that makes the best piece is merged first."""
    t, tokens, types = need("tokenizers"), given["tokens"], given["token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for piece, score, kind in zip(tokens, given["scores"], types, strict=True):
        for cut in range(1, len(piece) if kind == _NORMAL else 0):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    library = t.Tokenizer(t.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = given.get("add_space_prefix", True)
    steps = [t.normalizers.Prepend("▁")] if prefix else []
    library.normalizer = t.normalizers.Sequence([*steps, t.normalizers.Replace(" ", "▁")])
    undo = [t.decoders.Replace("▁", " "), t.decoders.ByteFallback(), t.decoders.Fuse()]
    library.decoder = t.decoders.Sequence([*undo, t.decoders.Strip(" ", 1, 0)] if prefix else undo)
    return library
