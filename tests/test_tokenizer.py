"""Tokenizers against their own libraries: mistral-common, sentencepiece, transformers."""

import json
import sys
from pathlib import Path

import pytest

from mistral import gguf_tokenizer
from mistral.generate import stream_text
from mistral.gguf_file import metadata, read_gguf
from mistral.samples import long_text, smollm2_path
from mistral.tokenizer import JsonTokenizer, load_tokenizer

TEXTS = [
    "",
    "The sea looks blue.",
    " leading, trailing ",
    "two  three   four\ttab\n\nlines\r\n  indented\n",
    "digits 7 42 12345 3.14159 ²⅓Ⅷ٣",
    "naïve café, Ünïcödé, ſ, ﬁ, e\u0301",
    "日本語 中文 한국어 हिन्दी العربية עברית ไทย",
    "🙂 👨‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 \u200b\u00a0\u3000",
    "def f(x):\n    return {'a': x[0], \"b\": x**2}  # I'm, you'LL, they've\n",
    "CamelCaseABCdef snake_case /usr/bin//x https://example.org?q=1&r=%20",
    "\x00\x01\x7f control",
    "word" * 40,
]
CHAT = [{"role": "user", "content": "What is the sea?"}]


@pytest.fixture(scope="module")
def data() -> Path:
    """Mistral's own tokenizer files, which mistral-common carries."""
    return Path(pytest.importorskip("mistral_common").__file__).parent / "data"


@pytest.fixture(scope="module")
def smollm2() -> JsonTokenizer:
    return load_tokenizer(smollm2_path())


@pytest.fixture(scope="module")
def sample_keys() -> dict:
    values = metadata(read_gguf(smollm2_path()))
    return {n.removeprefix("tokenizer.ggml."): v for n, v in values.items() if n.startswith("tokenizer.ggml.")}


# ---- Mistral's own ----

V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
TEKKEN = "tekken_240911.json"


PINNED = {
    V1: (32_000, [1, 733, 16289, 28793, 1824, 349, 272, 6163, 28804, 733, 28748, 16289, 28793]),
    "mistral_instruct_tokenizer_240216.model.v2": (32_768, [1, 3, 2592, 1117, 1040, 6931, 29572, 4]),
    V3: (32_768, [1, 3, 2592, 1117, 1040, 6931, 29572, 4]),
    TEKKEN: (131_072, [1, 3, 7493, 1395, 1278, 11196, 1063, 4]),
}


@pytest.mark.parametrize("name", PINNED)
def test_mistrals_own_ids_are_pinned(data, name):
    size, ids = PINNED[name]
    tokenizer = load_tokenizer(data / name)
    assert tokenizer.encode_chat(CHAT) == ids  # [INST] What is the sea? [/INST]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids) == (size, 1, (2,))
    for text in TEXTS:
        found = tokenizer.encode(text)
        assert found[0] == 1 and found[1:] == tokenizer.encode(text, bos=False)
        if "\x00" not in text:
            assert tokenizer.decode(found) == text
    assert 3 not in tokenizer.encode("[INST] </s>") and 2 not in tokenizer.encode("[INST] </s>")


def test_mistrals_chat_has_turns_and_a_system_prompt(data):
    tokenizer = load_tokenizer(data / V3)
    turns = [*CHAT, {"role": "assistant", "content": "Water."}, {"role": "user", "content": "Why?"}]
    ids = tokenizer.encode_chat(turns)
    first = tokenizer.encode_chat(CHAT)
    assert ids[: len(first)] == first and ids.count(3) == ids.count(4) == 2 and ids.count(2) == 1
    assert tokenizer.decode(ids) == "What is the sea? Water. Why?"
    told = tokenizer.encode_chat([{"role": "system", "content": "Be terse."}, *CHAT])
    assert tokenizer.decode(told) == "Be terse.\n\nWhat is the sea?"
    with pytest.raises(ValueError, match="Mistral's chat format"):
        tokenizer.encode_chat([*CHAT, *CHAT, turns[1]])


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "user", "content": ["x"]}]],
)
def test_messages_of_another_form_are_refused(data, smollm2, messages):
    for tokenizer in (load_tokenizer(data / V3), smollm2):
        with pytest.raises(ValueError, match=r"must have the role|is empty"):
            tokenizer.encode_chat(messages)


# ---- GGUF ----


def test_the_samples_ids_are_those_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    path = smollm2_path()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXTS, long_text()[:20_000], "a<|im_end|>b <|im_start|> <|endoftext|>x"]:
        ids = smollm2.encode(text)
        if "²" not in text:  # transformers leaves out that the model was trained with every numeral alone
            assert ids == theirs(text).input_ids, text
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chat = [{"role": "system", "content": "Be terse."}, *CHAT, {"role": "assistant", "content": "Water."}, *CHAT]
    for messages in (CHAT, chat):
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert smollm2.encode_chat(messages) == wanted
    assert (smollm2.bos_id, smollm2.stop_ids, smollm2.vocab_size) == (None, (2, 0), 49_152)


@pytest.mark.parametrize("text", TEXTS)
def test_the_sample_gives_text_back_in_any_pieces(smollm2, text):
    ids = smollm2.encode(text)
    assert smollm2.decode(ids) == text
    assert "".join(stream_text(smollm2, ids)) == text


def test_a_character_in_pieces_is_held_back(smollm2):
    ids = smollm2.encode("𝔘")
    assert len(ids) > 1 and smollm2.decode(ids[:-1]) in ("", "\ufffd") and smollm2.decode(ids) == "𝔘"


@pytest.mark.parametrize("name", [V1, V3])
def test_sentencepiece_in_gguf_is_mistrals_own(data, name):
    """What llama.cpp's converter makes of tokenizer.model, rebuilt, has the ids and the text of sentencepiece."""
    sp = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    sp.load(str(data / name))
    ids = range(sp.vocab_size())
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
    given = dict(model="llama", tokens=[sp.id_to_piece(i) for i in ids], scores=[sp.get_score(i) for i in ids])
    given |= dict(token_type=types, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    ours, theirs = gguf_tokenizer.build(given, None), load_tokenizer(data / name)
    for text in TEXTS:
        if text:  # sentencepiece puts no space before nothing
            assert ours.encode(text) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_id, ours.stop_ids, ours.vocab_size) == (1, (2,), sp.vocab_size())
    with pytest.raises(ValueError, match="no chat template"):
        ours.encode_chat(CHAT)


def test_tekkens_words_in_gguf_are_mistrals_own(data):
    pattern = json.loads((data / TEKKEN).read_text(encoding="utf-8"))["config"]["pattern"]
    assert gguf_tokenizer._PATTERNS["tekken"] == pattern


# Where the words of "x12345 CamelABCdef //y\n\n  z's" end.
WORDS = {
    "gpt-2": "x|12345| CamelABCdef| //|y|\n\n | z|'s",
    "smollm": "x|1|2|3|4|5| CamelABCdef| //|y|\n\n | z|'s",
    "llama-bpe": "x|123|45| CamelABCdef| //|y|\n\n| | z|'s",
    "qwen2": "x|1|2|3|4|5| CamelABCdef| //|y|\n\n| | z|'s",
    "tekken": "x|1|2|3|4|5| Camel|ABCdef| //|y|\n\n| | z|'s",
}
# The ids that llama.cpp (llama_cpp_python 0.3.36) gives where its words differ, on the sample's vocabulary.
MIDDLES = {"smollm": [8866, 15486], "gpt-2": [8866, 15486], "llama-bpe": [1116, 216, 15486]}
ENDS = {"smollm": [15290], "gpt-2": [2738, 197]}


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_split_as_in_llama_cpp(pre, sample_keys):
    ours = gguf_tokenizer.build({**sample_keys, "pre": pre}, None)
    words = WORDS[pre].split("|")
    text = "".join(words)
    spans = [span for _, span in ours._library.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[a:b] for a, b in spans] == words
    middle, end = MIDDLES.get(pre, MIDDLES["llama-bpe"]), ENDS.get(pre, ENDS["gpt-2"])
    assert ours.encode("I'LL don't 12345 CamelCaseABCdef //x\n\n  naïve\r\n\t3²", bos=False) == [
        *(57, 23, 16421, 1326, 982, 216, 33, 34, 35, 36, 37, 5784, 299, 10802, 35542, 1604, 13241, 104),
        *(*middle, 46494, *end, 35, 19133),
    ]


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(model="bert"), NotImplementedError, "'bert'; supported are gpt2, llama"),
        (dict(model="gpt2", tokens=[]), ValueError, r"lacks tokenizer\.ggml\.merges, tokenizer\.ggml\.token_type"),
        (dict(model="gpt2", tokens=[], merges=[], token_type=[]), NotImplementedError, "pre None"),
    ],
)
def test_unknown_kinds_in_gguf_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        gguf_tokenizer.build(given, None)


# ---- tokenizer.json ----


@pytest.fixture
def folder(tmp_path, smollm2) -> Path:
    smollm2.save(tmp_path)
    return tmp_path


def settings(folder: Path, file="tokenizer_config.json", **changes) -> None:
    path = folder / file
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}), encoding="utf-8")


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(folder, smollm2):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == smollm2.encode(text) == theirs(text).input_ids
    chat = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode_chat(CHAT) == smollm2.encode_chat(CHAT) == chat
    assert ours.stop_ids == smollm2.stop_ids


def test_settings_beside_tokenizer_json_are_read(folder, smollm2):
    token = {"content": "<|im_start|>", "lstrip": False}
    settings(folder, bos_token=token, eos_token="<|endoftext|>", add_bos_token=True, chat_template=None)
    settings(folder, "generation_config.json", eos_token_id=2)
    found = load_tokenizer(folder)
    assert found.encode("x") == [1, *smollm2.encode("x")] and found.encode("x", bos=False) == smollm2.encode("x")
    assert (found.bos_id, found.stop_ids) == (1, (2, 0))
    with pytest.raises(ValueError, match="no chat template"):
        found.encode_chat(CHAT)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(folder).encode_chat(CHAT) == [1, *smollm2.encode("What is the sea?")]
    named = [dict(name="tool_use", template="x"), dict(name="default", template="{{ eos_token }}")]
    (folder / "chat_template.jinja").unlink()
    settings(folder, chat_template=named)
    assert load_tokenizer(folder).encode_chat(CHAT) == [0]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|access to attribute"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe|access to attribute"),
        ("{% if %}", "chat template"),
    ],
)
def test_templates_run_in_a_sandbox(folder, template, message):
    settings(folder, chat_template=template)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder).encode_chat(CHAT)


def test_the_first_tokenizer_in_a_folder_counts(folder, data, tmp_path_factory):
    (folder / V3).write_bytes((data / V3).read_bytes())
    assert load_tokenizer(folder).vocab_size == 32_768
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"found nothing; needed is tekken\.json"):
        load_tokenizer(empty)
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        load_tokenizer(empty)
    (empty / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="is no tokenizer; known are"):
        load_tokenizer(empty / "notes.txt")


@pytest.mark.parametrize("missing, name", [("mistral_common", V3), ("tokenizers", "tokenizer.json")])
def test_a_missing_library_says_what_to_install(folder, data, monkeypatch, missing, name):
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Block(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=rf"{missing}.*pip install 'mistral-kernels\[model\]'"):
        load_tokenizer((data if name == V3 else folder) / name)
