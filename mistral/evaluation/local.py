"""Tasks that need no hub: multiple choice, cloze, generation and perplexity in the harness's format, made from text.

The Python reference, which Python carries, serves everywhere; other text can be added, such as Debian's documentation
(`scripts/debian_corpus.py`). What is asked is decided by the text and the seed alone.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..safetensors_file import Replacing
from ..samples import long_text

SAMPLES = 200
CHOICES = 4
# Metric that is reported, and what guessing scores; no value where guessing says nothing.
TASKS: dict[str, tuple[str, float | None]] = {
    "local_endings": ("acc_norm", 1 / CHOICES),
    "local_words": ("acc", 1 / CHOICES),
    "local_order": ("acc", 1 / 2),
    "local_recall": ("acc_norm", 1 / CHOICES),
    "local_cloze": ("acc", None),
    "local_repeat": ("exact_match", None),
    "local_text": ("word_perplexity", None),
}

Doc = dict[str, Any]
_METRIC = "  - metric: {}\n    aggregation: {}\n    higher_is_better: {}\n"
_ACC = _METRIC.format("acc", "mean", "true")
_CHOICE = (
    'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list:\n' + _ACC
)
_HOW = {
    "local_endings": _CHOICE + _METRIC.format("acc_norm", "mean", "true"),
    "local_words": _CHOICE,
    "local_order": _CHOICE,
    "local_recall": _CHOICE + _METRIC.format("acc_norm", "mean", "true"),
    "local_cloze": 'output_type: loglikelihood\ndoc_to_target: "{{answer}}"\nmetric_list:\n'
    + _METRIC.format("perplexity", "perplexity", "false")
    + _ACC,
    "local_repeat": 'output_type: generate_until\ndoc_to_target: "{{answer}}"\n'
    'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 48\n  do_sample: false\nmetric_list:\n'
    + _METRIC.format("exact_match", "mean", "true"),
    "local_text": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{context}}"\nmetric_list:\n'
    + "".join(f"  - metric: {name}\n" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
}


# ---- text ----


def paragraphs(text: str) -> Iterator[list[str]]:
    """The prose of a text: paragraphs as lists of sentences, without code, tables and headings."""
    for block in re.split(r"\n\s*\n", text):
        line = re.sub(r"\s+", " ", block).strip()
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line) < 60 or letters < 0.9 * len(line) or not line[0].isupper() or line[-1] not in ".!?":
            continue
        found = re.split(r"(?<=[a-z\")][.!?]) (?=[A-Z])", line)
        if all(5 <= len(sentence.split()) <= 50 for sentence in found):
            yield found


def read_text(paths: Sequence[Path]) -> str:
    """The Python reference and the texts of files; of a .jsonl, the fields "text"."""
    parts = [long_text()]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        parts.append(text)
    return "\n\n".join(parts)


# ---- questions ----


def endings(prose: list[list[str]], rng: random.Random) -> Iterator[Doc]:
    """Which sentence goes on with the paragraph? The others are of other paragraphs, and about as long."""
    pool = sorted({s for p in prose for s in p[1:]}, key=lambda s: (len(s), s))
    for paragraph in prose:
        if len(paragraph) < 2:
            continue
        right = paragraph[-1]
        near = sorted((s for s in pool if s not in paragraph), key=lambda s: abs(len(s) - len(right)))[:12]
        yield _choice(" ".join(paragraph[:-1]), right, rng.sample(near, CHOICES - 1), rng)


def words(prose: list[list[str]], rng: random.Random) -> Iterator[Doc]:
    """Which word stands in the gap? The others are as common in the text, and the rest of the sentence is scored."""
    count = Counter(w for p in prose for s in p for w in re.findall(r"\b[a-z]{4,}\b", s))
    known = [w for w, n in count.most_common() if n >= 3]
    for paragraph in prose:
        sentence = paragraph[-1]
        gaps = [m for m in re.finditer(r" ([a-z]{4,})\b", sentence) if m[1] in known and m.start() > 20]
        if not gaps:
            continue
        gap = rng.choice(gaps)
        at = known.index(gap[1])
        others = [w for w in known[max(0, at - 30) : at + 30] if w != gap[1]]
        before = " ".join([*paragraph[:-1], sentence[: gap.start()]])
        rest = sentence[gap.end() :]
        yield _choice(before, gap[1] + rest, [w + rest for w in rng.sample(others, CHOICES - 1)], rng)


def order(prose: list[list[str]], rng: random.Random) -> Iterator[Doc]:
    """Which sentence has its words in order? In the other, two neighbours have changed places. There is no context."""
    for paragraph in prose:
        told = rng.choice(paragraph).split(" ")
        at = rng.randrange(1, len(told) - 2)
        if told[at].lower() != told[at + 1].lower():
            swapped = [*told[:at], told[at + 1], told[at], *told[at + 2 :]]
            yield _choice("", " ".join(told), [" ".join(swapped)], rng)


def recall(prose: list[list[str]], rng: random.Random, characters: int = 6000, asked: int = 20) -> Iterator[Doc]:
    """How does a sentence of the long passage before go on? The others end other sentences of the same passage, so
    that only what stands far back tells; all questions on a passage share it."""
    told: list[str] = []
    for sentence in dict.fromkeys(s for p in prose for s in p if 10 <= len(s.split()) <= 30):
        told.append(sentence)
        if sum(map(len, told)) < characters:
            continue
        passage = " ".join(told)
        for sentence in rng.sample(told, min(asked, len(told))):
            cut = len(sentence.split()) // 2
            others = rng.sample([s for s in told if s != sentence], CHOICES - 1)
            halves = [s.split(" ") for s in (sentence, *others)]
            ends = [" ".join(h[cut if i == 0 else len(h) // 2 :]) for i, h in enumerate(halves)]
            yield _choice(f"{passage}\n\n{' '.join(halves[0][:cut])}", ends[0], ends[1:], rng)
        told = []


def cloze(prose: list[list[str]], rng: random.Random) -> Iterator[Doc]:
    """The last word, which the passage has had before (as LAMBADA asks, Paperno et al. 2016)."""
    for paragraph in prose:
        passage = " ".join(paragraph)
        found = re.fullmatch(r"(.{80,}) ([a-z]{4,})\.", passage)
        if found and re.search(rf"\b{found[2]}\b", found[1]):
            yield dict(context=found[1], answer=f" {found[2]}")


def repeat(prose: list[list[str]], rng: random.Random) -> Iterator[Doc]:
    """A sentence, told twice, is begun again: the rest of it."""
    for paragraph in prose:
        told = rng.choice(paragraph)
        parts = told.split(" ")
        if 8 <= len(parts) <= 20:
            yield dict(context=f"{told}\n{told}\n{' '.join(parts[:3])}", answer=" " + " ".join(parts[3:]))


def texts(prose: list[list[str]], rng: random.Random, characters: int = 4000) -> Iterator[Doc]:
    """Prose in a row, some thousand characters each."""
    held = ""
    for paragraph in prose:
        held += " ".join(paragraph) + "\n\n"
        if len(held) >= characters:
            yield dict(context=held)
            held = ""


def _choice(context: str, right: str, wrong: list[str], rng: random.Random) -> Doc:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return dict(context=context, choices=choices, answer=choices.index(right))


_MAKERS: Mapping[str, Callable[[list[list[str]], random.Random], Iterator[Doc]]] = {
    "local_endings": endings,
    "local_words": words,
    "local_order": order,
    "local_recall": recall,
    "local_cloze": cloze,
    "local_repeat": repeat,
    "local_text": texts,
}


# ---- files ----


def make_tasks(folder: str | Path, text: Sequence[Path] = (), samples: int = SAMPLES, seed: int = 0) -> dict[str, int]:
    """Writes tasks for `lm_eval --include_path FOLDER --tasks local`.

    Args:
        folder: made if missing; each task is a .yaml and a .jsonl.
        text: files beside the Python reference; .jsonl with "text" fields, or plain.
        samples: questions of each task, at most; a twentieth as many texts.
        seed: of the choice.

    Returns:
        How many questions each task has.

    Raises:
        ValueError: a text that gives a task no question.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    folder = Path(folder).resolve()
    # Texts repeat themselves, the Python reference for one: a question would have two right answers.
    prose = [list(p) for p in dict.fromkeys(tuple(p) for p in paragraphs(read_text(text)))]
    counts = {}
    with Replacing(folder) as files:
        for name, make in _MAKERS.items():
            rng = random.Random(f"{name} {seed}")
            mixed = prose if name == "local_text" else rng.sample(prose, len(prose))
            most = max(1, samples // 20) if name == "local_text" else samples
            docs = [doc for _, doc in zip(range(most), make(mixed, rng), strict=False)]
            if not docs:
                raise ValueError(f"the text has no paragraph that {name} could ask about; give more text")
            counts[name] = len(docs)
            files.write(f"{name}.jsonl", "".join(json.dumps(doc) + "\n" for doc in docs).encode())
            files.write(f"{name}.yaml", _yaml(name, folder).encode())
    return counts


def _yaml(name: str, folder: Path) -> str:
    delimiter = '" "' if name in ("local_endings", "local_words", "local_recall") else '""'
    asked = '""' if name == "local_text" else '"{{context}}"'
    return (
        f"task: {name}\ntag: local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f'    test: {json.dumps(str(folder / name))[:-1]}.jsonl"\ntest_split: test\ndoc_to_text: {asked}\n'
        f"target_delimiter: {delimiter}\n{_HOW[name]}metadata:\n  version: 1\n"
    )
