"""Conversations as text for Mistral's own tokenizers, which read no special tokens from text by themselves."""

import re
from collections.abc import Sequence

from ..tokenizer import Message, MistralTokenizer


def mistral_chat_text(tokenizer: MistralTokenizer, messages: Sequence[Message], answer: bool = True) -> str:
    """The conversation with its control tokens spelled out, for `mistral_encode`.

    Raises:
        NotImplementedError: a message that is left open; a tokenizer whose conversations are not the same when their
            text is encoded again (SentencePiece's may not be: it puts a space before every piece of text).
    """
    if not answer:
        raise NotImplementedError("Mistral's own tokenizers leave no message open; do without gen_prefix")
    ids = tokenizer.encode_chat(messages)
    text = tokenizer.spelled(ids)
    if mistral_encode(tokenizer, text, bos=False) != ids:
        raise NotImplementedError(
            "this tokenizer encodes the text of a conversation differently from the conversation; use the checkpoint's"
            " tokenizer.json"
        )
    return text


def mistral_encode(tokenizer: MistralTokenizer, text: str, bos: bool) -> list[int]:
    """The ids of a text in which control tokens count as such; `bos` puts it first where the text does not."""
    known = tokenizer.control
    pattern = "|".join(re.escape(token) for token in sorted(known, key=len, reverse=True))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        ids += [known[piece]] if piece in known else tokenizer.encode(piece, bos=False) if piece else []
    assert tokenizer.bos_id is not None
    return ids if not bos or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
