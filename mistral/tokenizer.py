"""One interface to Mistral's own tokenizers, Hugging Face's tokenizer.json and the tokenizer inside a GGUF file.

The libraries behind it (mistral-common, tokenizers, gguf, jinja2) are imported when a file needs them.
"""

import abc
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .extras import need
from .safetensors_file import Replacing, read_json, write_json

Message = Mapping[str, str]


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are below it.
        bos_id: what `encode` puts first, or None where the model was trained without.
        stop_ids: ids that end a generated text.
        chat_template: in Jinja, or None where there is none or it is no template.
    """

    vocab_size: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: str | None = None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text; `bos` puts `bos_id` first, where there is one.

        Special tokens that are spelled out in the text count as such, except in Mistral's own tokenizers.
        """
        first = [self.bos_id] if bos and self.bos_id is not None else []
        return first + self._encode(text)

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; bytes that make no whole character become U+FFFD."""

    def special(self, name: str) -> tuple[int, str] | None:
        """Id and text of "bos_token" or "eos_token", whether texts begin with it or not; None where there is none."""
        return None

    def chat_text(self, messages: Sequence[Message], answer: bool = True) -> str:
        """A conversation as text with its special tokens spelled out, which `encode` reads as such.

        Args:
            messages: as for `encode_chat`.
            answer: up to where the assistant's answer begins; else the last message is left open, to be continued.

        Raises:
            ValueError: as `encode_chat`.
            NotImplementedError: a tokenizer that reads no special tokens from text.
        """
        raise NotImplementedError("this tokenizer reads no special tokens from text; use encode_chat")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's answer begins.

        Args:
            messages: mappings with the strings "role" ("system", "user" or "assistant") and "content".

        Raises:
            ValueError: messages of another form or order, or a tokenizer without a chat template.
        """
        _check_messages(messages)
        return self._encode_chat(messages)

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _encode_chat(self, messages: Sequence[Message]) -> list[int]: ...


def _check_messages(messages: Sequence[Message]) -> None:
    for message in messages:
        strings = all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not strings or message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"{message!r} must have the role system, user or assistant and a string as content")
    if not messages:
        raise ValueError("messages is empty; at least one is needed")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    Args:
        path: the checkpoint's folder, a .gguf file, or a tokenizer file itself. In a folder the first of these counts:
            Mistral's tekken.json or tokenizer.model.v*, Hugging Face's tokenizer.json, a tokenizer.model.

    Raises:
        FileNotFoundError: no such path, or no tokenizer in the folder.
        ValueError: a file that is no tokenizer.
        ModuleNotFoundError: a library is missing; says what to install.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    file = _in_folder(path) if path.is_dir() else path
    with file.open("rb") as opened:
        if opened.read(4) == b"GGUF":
            from .gguf_tokenizer import gguf_tokenizer

            return gguf_tokenizer(file)
    if _is_mistral(file.name) or file.name == "tokenizer.model":
        return MistralTokenizer(file)
    if file.suffix == ".json":
        return _from_folder(file)
    raise ValueError(f"{file} is no tokenizer; known are tekken.json, tokenizer.model.v*, tokenizer.json and .gguf")


def _is_mistral(name: str) -> bool:
    return re.fullmatch(r"tekken.*\.json|.*\.model\.v\d+(m\d+)?", name) is not None


def _in_folder(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    wanted = [name for name in names if _is_mistral(name)][-1:]
    wanted += [name for name in ("tokenizer.json", "tokenizer.model") if name in names]
    if not wanted:
        found = ", ".join(names[:20]) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds no tokenizer: found {found}; needed is tekken.json, tokenizer.model.v*, tokenizer.json or"
            " tokenizer.model"
        )
    return folder / wanted[0]


class MistralTokenizer(Tokenizer):
    """Mistral's own tokenizer and chat format, by mistral-common. Text never makes a special token."""

    def __init__(self, file: Path):
        self._library = need("mistral_common.tokens.tokenizers.mistral").MistralTokenizer.from_file(str(file))
        self._text = self._library.instruct_tokenizer.tokenizer
        self.vocab_size = self._text.n_words
        self.bos_id = self._text.bos_id
        self.stop_ids = (self._text.eos_id,)

    def _encode(self, text: str) -> list[int]:
        return self._text.encode(text, bos=False, eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        policy = need("mistral_common.tokens.tokenizers.base").SpecialTokenPolicy.IGNORE
        return self._text.decode(list(ids), special_token_policy=policy)

    def special(self, name: str) -> tuple[int, str] | None:
        found = dict(bos_token=self._text.bos_id, eos_token=self._text.eos_id)[name]
        return found, self._text.id_to_piece(found)

    @property
    def control(self) -> dict[str, int]:
        """The special tokens' texts and ids."""
        return {self._text.id_to_piece(i): i for i in self._text.special_ids}

    def spelled(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        special = {i: text for text, i in self.control.items()}
        runs = itertools.groupby(ids, key=lambda i: special.get(i))
        return "".join(self.decode(list(run)) if text is None else text * len(list(run)) for text, run in runs)

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        kinds = need("mistral_common.protocol.instruct.messages")
        request = need("mistral_common.protocol.instruct.request").ChatCompletionRequest
        errors = need("mistral_common.exceptions").MistralCommonException
        made = [getattr(kinds, f"{m['role'].capitalize()}Message")(content=m["content"]) for m in messages]
        try:
            return self._library.encode_chat_completion(request(messages=made)).tokens
        except errors as error:
            raise ValueError(f"these messages do not fit Mistral's chat format: {error}") from error


class JsonTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's library `tokenizers`.

    Args:
        library: a `tokenizers.Tokenizer`.
        bos: the token that texts begin with, or None.
        stop: the tokens that end a generated text.
        special: further names for the chat template, such as eos_token.
        chat_template: in Jinja, or None.
    """

    def __init__(
        self,
        library: Any,
        bos: str | None,
        stop: Iterable[int],
        special: Mapping[str, str],
        chat_template: str | None,
    ):
        self._library = library
        self.vocab_size = library.get_vocab_size()
        self.bos_id = None if bos is None else library.token_to_id(bos)
        self.stop_ids = tuple(dict.fromkeys(stop))
        self._special = dict(special)
        self.chat_template = chat_template

    def _encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._encode(self.chat_text(messages))

    def special(self, name: str) -> tuple[int, str] | None:
        text = self._special.get(name)
        found = None if text is None else self._library.token_to_id(text)
        return None if text is None or found is None else (found, text)

    def chat_text(self, messages: Sequence[Message], answer: bool = True) -> str:
        _check_messages(messages)
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: it is of a base model, use encode")
        text = _render(self.chat_template, messages, self._special, answer)
        last = messages[-1]["content"].strip()
        return text if answer else text[: text.rindex(last) + len(last)]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json, as Hugging Face reads them."""
        settings: dict[str, Any] = dict(tokenizer_class="PreTrainedTokenizerFast", **self._special)
        settings["add_bos_token"] = self.bos_id is not None
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        with Replacing(Path(folder)) as files:
            files.write("tokenizer.json", self._library.to_str().encode())
            write_json(files, "tokenizer_config.json", settings)
            if self.stop_ids:
                write_json(files, "generation_config.json", {"eos_token_id": list(self.stop_ids)})


def _render(template: str, messages: Sequence[Message], special: Mapping[str, str], answer: bool = True) -> str:
    """The conversation as text. Templates come with a checkpoint: they run in Jinja's sandbox and see only strings."""
    sandbox, errors = need("jinja2.sandbox"), need("jinja2.exceptions")

    def raise_exception(message: str) -> None:
        raise errors.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=_strftime_now)
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return environment.from_string(template).render(messages=plain, add_generation_prompt=answer, **special)
    except errors.TemplateError as error:
        raise ValueError(f"these messages do not fit the tokenizer's chat template: {error}") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)


# ---- Hugging Face's files ----


def _from_folder(file: Path) -> JsonTokenizer:
    try:
        library = need("tokenizers").Tokenizer.from_file(str(file))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error
    settings = _optional_json(file.with_name("tokenizer_config.json"))
    special = {name: _token(settings[name]) for name in ("bos_token", "eos_token", "unk_token") if settings.get(name)}
    first = library.encode("", add_special_tokens=True).ids[:1]
    added = library.id_to_token(first[0]) if first else None
    adds = settings.get("add_bos_token")
    bos = special.get("bos_token", added) if adds or (adds is None and added is not None) else None
    return JsonTokenizer(library, bos, _stop_ids(file.parent, library, special), special, _template(file, settings))


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _token(value: Any) -> str:
    """Older files have an object with the text in it."""
    return value["content"] if isinstance(value, Mapping) else value


def _stop_ids(folder: Path, library: Any, special: Mapping[str, str]) -> list[int]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _optional_json(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    eos = library.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return found if eos is None else [*found, eos]


def _template(file: Path, settings: Mapping[str, Any]) -> str | None:
    own = file.with_name("chat_template.jinja")
    if own.exists():
        return own.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found
