"""Where the time of one step goes: the longest operations, and the share of communication."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from .log import replace_text

_COMMUNICATION = ("nccl", "gloo:", "c10d::")


def profiled(step: Callable[[], dict[str, Any]], path: Path | None, device: torch.device) -> dict[str, Any]:
    """Runs a step under torch's profiler and writes what it took to a JSON file.

    On a GPU the times are of kernels, and communication that is hidden behind computation counts as well. On a CPU
    they are of operations without those that they call.
    """
    gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    start = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profile:
        row = step()
        if gpu:
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if path is None:
        return row
    taken: list[tuple[str, float, int]] = []
    for event in profile.key_averages():
        micro = event.self_device_time_total if gpu else event.self_cpu_time_total
        # Beside the kernels stand the operations and annotations around them, with the same time once more.
        kernel = event.device_type != DeviceType.CPU and not getattr(event, "is_user_annotation", False)
        if micro > 0 and (kernel or not gpu):
            taken.append((event.key, micro / 1e6, event.count))
    taken.sort(key=lambda entry: -entry[1])
    together = sum(t for name, t, _ in taken if name.lower().startswith(_COMMUNICATION) or "nccl" in name.lower())
    found = dict(
        step=row["step"],
        seconds=seconds,
        busy_seconds=sum(t for _, t, _ in taken),
        communication_seconds=together,
        communication_share_of_step=together / seconds,
        longest=[dict(name=name, seconds=t, calls=calls) for name, t, calls in taken[:40]],
    )
    replace_text(path, json.dumps(found, indent=1) + "\n")
    return row
