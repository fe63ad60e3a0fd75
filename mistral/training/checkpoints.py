"""Checkpoints of a run: torch.distributed.checkpoint, made whole under another name and renamed, the newest kept.

A folder named step-N is whole: everything in it was flushed to the disk before it got that name. What a killed
process leaves is a folder with another name, which the next run removes.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from .parallel import World

_STATE = "run.json"
_OPTIONS = StateDictOptions(ignore_frozen_params=True)


def step_folders(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [f for f in folder.iterdir() if re.fullmatch(r"step-\d{8}", f.name)] if folder.is_dir() else []
    return sorted(f for f in found if f.is_dir())


def newest(folder: Path) -> Path | None:
    return next(reversed(step_folders(folder)), None)


def save(folder: Path, step: int, module: nn.Module, optimizer: Any, state: dict[str, Any], world: World) -> Path:
    """Writes folder/step-N; what is frozen (the base of LoRA) is left out.

    Args:
        folder: of all checkpoints of the run.
        step: optimizer steps done.
        module, optimizer: what is saved, sharded or not.
        state: what JSON can hold, returned by `read_state`.
        world: all its processes call this together.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f"{final.name}.partial"
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    world.barrier()
    values, moments = get_state_dict(module, optimizer, options=_OPTIONS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # with no_dist on purpose
        dcp.save(
            dict(model=values, optimizer=moments),
            storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
            no_dist=world.size == 1,
        )
    world.barrier()
    if world.first:
        with (partial / _STATE).open("w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(partial)
        if final.exists():  # the same step of a run that began anew
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
    world.barrier()
    return final


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tidy(folder: Path, keep: int) -> None:
    """Removes what a killed process left half written, and all but the newest `keep` checkpoints."""
    if not folder.is_dir():
        return
    for old in step_folders(folder)[:-keep]:
        # Renamed first: a folder that is half removed must not pass for a whole one.
        old = old.rename(old.with_name(old.name + ".partial"))
        shutil.rmtree(old)
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError for one that is broken."""
    try:
        return json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} cannot be read ({error}); remove it to go on from the one before") from error


def _last_line(error: BaseException) -> str:
    """What went wrong, without the traceback that the library puts into its message."""
    return str(error).strip().rpartition("\n")[2].strip()


def load(checkpoint: Path, module: nn.Module, optimizer: Any, world: World) -> None:
    """Fills module and optimizer in place, from any number of processes into any other.

    Raises:
        ValueError: it does not fit, or it is damaged.
    """
    values, moments = get_state_dict(module, optimizer, options=_OPTIONS)
    wanted: dict[str, Any] = dict(model=values, optimizer=moments)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(wanted, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:  # the second is a BaseException
        raise ValueError(
            f"{checkpoint} does not fit this run, or is damaged: {_last_line(error)}; use the settings it was made"
            " with, or remove it to go on from the one before"
        ) from error
    set_state_dict(
        module,
        optimizer,
        model_state_dict=wanted["model"],
        optim_state_dict=wanted["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
