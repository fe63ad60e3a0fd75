"""Documents from text, JSONL and Parquet files, or from Hugging Face's `datasets`; tokenised once."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..extras import need
from ..tokenizer import Tokenizer
from .shards import Index, ShardWriter, fingerprint, is_current, read_index

_TEXT = (".txt", ".md", ".rst", ".text")
_SUFFIXES = (*_TEXT, ".jsonl", ".ndjson", ".parquet")


def find_files(source: str) -> list[Path]:
    """The files of one entry of `data`, in order.

    Raises:
        ValueError: no such path, a kind of file that is not read, or a folder without any that is.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in _SUFFIXES)
        if not found:
            raise ValueError(f"data: the folder {path} has no file that ends in {' '.join(_SUFFIXES)}")
        return found
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; name files, folders or hf:NAME[/CONFIG][@SPLIT]")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"data: {path} ends in {path.suffix or 'nothing'}; read are {' '.join(_SUFFIXES)}")
    return [path]


def documents(sources: Sequence[str], text_key: str = "text", limit: int = 0) -> Iterator[str]:
    """The texts of all sources in order; a plain text file is one document, a line or row of the others each one.

    Raises:
        ValueError: what cannot be read, named with file and line.
    """
    count = 0
    for source in sources:
        made = _hf(source, text_key) if source.startswith("hf:") else _of_files(source, text_key)
        for text in made:
            if limit and count >= limit:
                return
            if text.strip():
                count += 1
                yield text


def _of_files(source: str, text_key: str) -> Iterator[str]:
    for path in find_files(source):
        if path.suffix == ".parquet":
            yield from _parquet(path, text_key)
        elif path.suffix in _TEXT:
            yield _decode(path)
        else:
            yield from _jsonl(path, text_key)


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}; convert it, for example with iconv") from error


def _text_of(row: Any, key: str, where: str) -> str:
    text = row.get(key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} has no text under {key!r} (it has {keys}); set text_key")
    return text


def _jsonl(path: Path, key: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
            yield _text_of(row, key, f"{path}, line {number}")


def _parquet(path: Path, key: str) -> Iterator[str]:
    parquet = need("pyarrow.parquet", "train")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own kinds, which are known only once it is imported
        raise ValueError(f"{path} is no whole Parquet file: {error}") from error
    if key not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {key!r} (it has {', '.join(file.schema_arrow.names)}); set text_key")
    for batch in file.iter_batches(columns=[key]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _hf(source: str, key: str) -> Iterator[str]:
    """Streams a dataset of the Hugging Face hub: hf:NAME, hf:NAME@SPLIT, hf:OWNER/NAME/CONFIG@SPLIT."""
    name, _, split = source.removeprefix("hf:").partition("@")
    parts = name.split("/")
    path, config = ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (name, None)
    library = need("datasets", "train")
    try:
        rows = library.load_dataset(path, config, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _text_of(row, key, f"{source}, row {number}")
    except ValueError:
        raise
    except Exception as error:  # network and hub errors are of many kinds
        raise ValueError(
            f"{source} cannot be streamed: {type(error).__name__}: {error}; without a network, name local files"
        ) from error


# ---- tokenisation ----


def source_fingerprint(settings: Any, tokenizer: Tokenizer) -> str:
    """Changes where files, sizes, times, the tokenizer or the way of splitting change."""
    files = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for source in settings.data
        if not source.startswith("hf:")
        for file in find_files(source)
    ]
    named = [source for source in settings.data if source.startswith("hf:")]
    how = [settings.text_key, settings.eval_fraction, settings.max_documents]
    return fingerprint(files, named, how, tokenizer_fingerprint(tokenizer))


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of how a tokenizer treats text: its size, its special ids and the ids of a sample."""
    sample = "The quick brown fox, 1234567890 naïve façades — 東京\n\n\tdef f(x): return x**2  # ÄÖÜß 🙂"
    return fingerprint(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.stop_ids, tokenizer.encode(sample))


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its text alone, so that duplicates fall on one side."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def prepare(settings: Any, tokenizer: Tokenizer, progress: bool = True) -> Index:
    """Tokenises the text of the settings into `shard_folder`/train and /eval, unless that is done.

    Each document is bos, its tokens and the first stop token, as far as the tokenizer has them.

    Returns:
        The index of the training shards.

    Raises:
        ValueError: no text, or text that cannot be read.
    """
    folder = settings.shard_folder
    wanted = source_fingerprint(settings, tokenizer)
    parts = ["train", "eval"] if settings.eval_fraction else ["train"]
    if all(is_current(folder / part, wanted) for part in parts):
        return read_index(folder / "train")
    end = list(tokenizer.stop_ids[:1])
    texts = documents(settings.data, settings.text_key, settings.max_documents)
    bar = need("tqdm").tqdm(texts, desc="tokenising", unit=" documents", disable=None if progress else True)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(folder / part, tokenizer.vocab_size, wanted)) for part in parts]
        for text in bar:
            writers[held_out(text, settings.eval_fraction)].add([*tokenizer.encode(text), *end])
    index = read_index(folder / "train")
    if index.tokens == 0:
        raise ValueError(f"data {settings.data} has no text to train on; name other files")
    return index
