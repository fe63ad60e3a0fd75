"""Tile configurations measured on this machine's own GPUs: where `python -m mistral_kernels.tune` keeps them.

One JSON file for each Triton version and GPU model. The launchers look here first and take their built-in choice
where nothing is found.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from .attention.triton_blocks import Config, padded

FORMAT = 1
_chosen: Path | None = None


def default_folder() -> Path:
    """The platform's folder for caches of this user."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", home / "AppData/Local"))
    elif sys.platform == "darwin":
        base = home / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "mistral_kernels"


def use(folder: str | Path | None) -> None:
    """Takes configurations from `folder` from now on, in this process; None for the platform's folder again."""
    global _chosen
    _chosen = None if folder is None else Path(folder)
    lookup.cache_clear()


def device_name(device: torch.device) -> str | None:
    """The GPU's model; None for a CPU, which has nothing to look up."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def path(name: str, folder: Path | None = None) -> Path:
    """The file of a GPU model, for the Triton that is installed."""
    import triton

    model = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (folder or _chosen or default_folder()) / f"triton-{triton.__version__}-{model}.json"


def key(kernel: str, dim: int, itemsize: int) -> str:
    return f"{kernel} D{max(64, padded(dim))} {8 * itemsize} bits"


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The entries of a file by key; none where it is missing.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT}")
        for entry in content["entries"].values():
            _config(entry)
        return content["entries"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it or run python -m mistral_kernels.tune") from None


def _config(entry: dict[str, Any]) -> Config:
    config = Config(**entry["config"])
    sizes = (config.rows, config.keys, config.warps, config.stages)
    if not all(type(n) is int and n > 0 for n in sizes) or not (type(config.tma) is type(config.lag) is bool):
        raise ValueError(f"no configuration: {entry['config']}")
    return config


def write(file: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Adds entries to the file: written beside it and renamed, so that a reader sees the old one or the new one."""
    content = dict(format=FORMAT, entries=read(file) | entries)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as out:
            json.dump(content, out, indent=1)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    lookup.cache_clear()


def entry(config: Config, seconds: float, built_in: float | None) -> dict[str, Any]:
    """What the file says of one kernel: the fastest configuration, its time, and that of the built-in choice."""
    times = dict(microseconds=round(seconds * 1e6, 2), built_in=built_in and round(built_in * 1e6, 2))
    return dict(config=dataclasses.asdict(config), **times)


@functools.cache
def lookup(kernel: str, device: torch.device, dim: int, itemsize: int) -> Config | None:
    """The measured configuration of a kernel, or None. A damaged file is said once, and counts as none."""
    name = device_name(device)
    if name is None:
        return None
    try:
        found = read(path(name)).get(key(kernel, dim, itemsize))
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}; the built-in configurations are used", stacklevel=2)
        return None
    return _config(found) if found else None
