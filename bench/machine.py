"""Where figures come from: machine, versions, commit, threads, allocator."""

import ctypes
import datetime
import math
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mistral_kernels import testing, verify

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("triton", "transformers", "liger-kernel", "flash-attn", "flash-attn-4", "quack-kernels")
ALLOCATORS = ("default", "keep")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def facts(device: str, allocator: str) -> dict[str, Any]:
    """What a reader needs to judge a figure by."""
    found: dict[str, Any] = dict(verify.machine())
    found |= {name: version for name in VERSIONS if (version := _version(name)) is not None}
    found |= dict(
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        architecture=platform.machine(),
        instruction_set=(testing.isa_tiers() or ["none"])[-1],
        device=device,
        allocator=allocator,
        commit=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        modified=bool(_git("status", "--porcelain", "--untracked-files=no")),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        load_at_start=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )
    return found


def last_cache_bytes() -> int:
    """The largest CPU cache, 32 MB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM]?)", file.read_text().strip()):
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return max(sizes, default=32 << 20)


def cold_copies(size: int) -> int:
    """How many copies of so many bytes, taken in turn, are twice the last cache, so that each comes from memory."""
    return math.ceil(2 * last_cache_bytes() / size)


def set_allocator(name: str) -> None:
    """Makes glibc keep freed memory ("keep") instead of returning it, so that nobody's large outputs cost page faults.

    Raises:
        NotImplementedError: the C library has no mallopt.
    """
    if name not in ALLOCATORS:
        raise ValueError(f"allocator is {name!r}; it must be one of {', '.join(ALLOCATORS)}")
    if name == "default":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise NotImplementedError("allocator 'keep' needs glibc's mallopt")
    trim_threshold, mmap_max = -1, -4
    if not (library.mallopt(mmap_max, 0) and library.mallopt(trim_threshold, 2**31 - 1)):
        raise NotImplementedError("glibc refused to keep freed memory (mallopt returned 0)")
