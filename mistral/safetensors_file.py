"""Folders of safetensors: what lies in them, read tensor by tensor; and files written tensor by tensor."""

import itertools
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from .checkpoint import Checkpoint, Stored, make_checkpoint
from .config import ModelConfig
from .extras import need

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {dtype: kind for kind, dtype in _DTYPES.items()} | {torch.int8: "I8", torch.uint8: "U8"}
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_INDEX = "model.safetensors.index.json"


def refuse_pickle(files: Sequence[Path]) -> None:
    """Raises ValueError where there is a pickle among the files."""
    pickles = sorted(file.name for file in files if file.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{files[0].parent} has its weights only as pickles ({', '.join(pickles[:4])}), and those are never read:"
            " loading one can run any code that is hidden in it. Most models are published as safetensors too;"
            " download those, or convert each file yourself, where that is safe:\n"
            '  python -c "import torch, safetensors.torch as s;'
            f" w = torch.load('{pickles[0]}', weights_only=True, map_location='cpu');"
            " s.save_file({k: v.clone() for k, v in w.items()}, 'FILE.safetensors')\"\n"
            "with consolidated.safetensors or model.safetensors for FILE."
        )


def folder_format(folder: Path) -> str:
    """ "hf" or "mistral", by the files in the folder; "hf" where there are both.

    Mistral's own repositories hold both: the same weights, but config.json states the window and the base of the
    rotary frequencies, which params.json often leaves to its reader.

    Raises:
        ValueError: neither is complete; says what was found and what is needed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file())
    names = {file.name for file in files}
    if "config.json" in names and names & {"model.safetensors", _INDEX}:
        return "hf"
    if "params.json" in names and any(_is_consolidated(name) for name in names):
        return "mistral"
    if not any(file.suffix == ".safetensors" for file in files):
        refuse_pickle(files)
    found = ", ".join(sorted(names)[:20]) or "nothing"
    raise ValueError(
        f"{folder} holds no checkpoint that can be loaded. Found: {found}{' ...' if len(names) > 20 else ''}. Needed:\n"
        "  consolidated.safetensors (or consolidated-00001-of-0000N.safetensors ...) and params.json, or\n"
        f"  model.safetensors (or {_INDEX} and its files) and config.json, or\n"
        "  instead of a folder the path of a .gguf file"
    )


def open_folder(folder: Path) -> Checkpoint:
    """Opens a folder in Mistral's or Hugging Face's format; reads headers only.

    Raises:
        ValueError: files that are missing, cut short or contradictory.
        NotImplementedError: a feature that the model does not have, named.
    """
    format = folder_format(folder)
    config = read_folder_config(folder, format)
    files = _hf_files(folder) if format == "hf" else _consolidated_files(folder)
    stored: dict[str, Stored] = {}
    for file in files:
        for tensor in _open_file(file):
            if tensor.name in stored:
                raise ValueError(f"{folder} has {tensor.name} in two files, {file.name} is the second")
            stored[tensor.name] = tensor
    return make_checkpoint(folder, format, config, stored.values())


def read_folder_config(folder: Path, format: str) -> ModelConfig:
    if format == "hf":
        return ModelConfig.from_hf(read_json(folder / "config.json"))
    return ModelConfig.from_params(read_json(folder / "params.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found


def _is_consolidated(name: str) -> bool:
    shard = _SHARD.fullmatch(name)
    return name == "consolidated.safetensors" or (shard is not None and shard[1] == "consolidated")


def _consolidated_files(folder: Path) -> list[Path]:
    if (whole := folder / "consolidated.safetensors").exists():
        return [whole]
    parts = [
        shard for file in folder.iterdir() if (shard := _SHARD.fullmatch(file.name)) and shard[1] == "consolidated"
    ]
    totals = {shard[3] for shard in parts}
    if len(totals) > 1:
        raise ValueError(f"{folder} has consolidated files of several sets: {', '.join(sorted(s[0] for s in parts))}")
    total = totals.pop()
    needed = [folder / f"consolidated-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    return _all_there(folder, needed)


def _hf_files(folder: Path) -> list[Path]:
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    where = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{folder / _INDEX} has no weight_map of tensors to files")
    names = sorted(set(where.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{folder / _INDEX} names files outside its folder: {', '.join(outside)}")
    return _all_there(folder, [folder / name for name in names])


def _all_there(folder: Path, files: list[Path]) -> list[Path]:
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} files of weights: {', '.join(missing)}")
    return files


def _open_file(path: Path) -> Iterator[Stored]:
    safetensors = need("safetensors")
    try:
        handle = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(24).startswith(b"version https://git-lfs")
        why = "it is only a git-lfs pointer: git lfs pull" if pointer else f"cut short or damaged: {error}"
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is no whole safetensors file; {why}") from error
    for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
        header = handle.get_slice(name)
        kind = header.get_dtype()
        yield Stored(name, tuple(header.get_shape()), _DTYPES.get(kind), partial(handle.get_tensor, name), kind)


# ---- writing ----


class Replacing:
    """Files that are written under temporary names and take their own names together, at the end.

    Each file is flushed to the disk before the first is renamed, and an error before that leaves the folder as it
    was. The renames are one after another, so a machine that stops between two of them leaves whole files, some old.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names: list[str] = []

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.{os.getpid()}.tmp"

    def open(self, name: str) -> BinaryIO:
        """A new file; the caller closes it with `close`."""
        self.names.append(name)
        return self._temporary(name).open("wb")

    def close(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def write(self, name: str, data: bytes) -> None:
        with self.open(name) as file:
            file.write(data)
            self.close(file)

    def __enter__(self) -> "Replacing":
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                for name in self.names:
                    os.replace(self._temporary(name), self.folder / name)
                _sync_folder(self.folder)
        finally:
            for name in self.names:
                self._temporary(name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(files: Replacing, name: str, value: Mapping[str, Any]) -> None:
    files.write(name, (json.dumps(value, indent=2) + "\n").encode())


def write_safetensors(
    files: Replacing,
    name: str,
    tensors: Sequence[Stored],
    bar: Any,
    metadata: Mapping[str, str] | None = None,
    in_order: bool = False,
) -> None:
    """Writes a safetensors file with one tensor in memory at a time, `in_order` where that leaves all aligned.

    A file is the length of its header in 8 bytes, the header in JSON, and the bytes of the tensors back to back.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    # Wider types first, as the library does: then each tensor is aligned to its type.
    typed = [(t, t.dtype) for t in tensors if t.dtype is not None]
    if not in_order or not _aligned(typed):
        typed.sort(key=lambda pair: (-pair[1].itemsize, pair[0].name))
    for tensor, dtype in typed:
        start, end = end, end + tensor.bytes
        header[tensor.name] = dict(dtype=KINDS[dtype], shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.open(name) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor, dtype in typed:
            values = tensor.read().to("cpu", dtype).contiguous()
            file.write(values.flatten().view(torch.uint8).numpy().data)
            bar.update(tensor.bytes)
        files.close(file)


def _aligned(typed: Sequence[tuple[Stored, torch.dtype]]) -> bool:
    """Whether each tensor starts at a multiple of its type's size, one right after the other."""
    ends = itertools.accumulate((tensor.bytes for tensor, _ in typed), initial=0)
    return all(start % dtype.itemsize == 0 for start, (_, dtype) in zip(ends, typed, strict=False))


def split_shards(tensors: Sequence[Stored], max_bytes: int) -> list[list[Stored]]:
    """Tensors in their order, in groups of at most that many bytes; a larger tensor is alone."""
    groups: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    return groups
