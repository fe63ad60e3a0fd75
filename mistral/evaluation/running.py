"""Runs tasks of the harness on one model: what each scored, or why it could not be run."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..extras import need
from .local import TASKS as LOCAL
from .published import CHANCE, METRIC, SHOTS

_PREFERRED = ("acc", "acc_norm", "exact_match", "word_perplexity", "perplexity")


@contextlib.contextmanager
def data_from(folder: Path | None) -> Iterator[None]:
    """Data sets that lie in a folder under their hub names (FOLDER/allenai/ai2_arc) are read from there.

    `datasets` takes a name that is a folder below the current one for that folder.
    """
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: there is no such folder")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def load_tasks(
    names: Sequence[str], data: Path | None = None, include: Path | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Loads each task with its data.

    Args:
        names: tasks, groups and tags of the harness, or of `include`.
        data: a folder with data sets under their hub names.
        include: a folder with further tasks.

    Returns:
        What the harness's manager loaded, by name; and for the others why not.
    """
    manager_type = need("lm_eval.tasks", "eval").TaskManager
    only_local = include is not None and all(name in LOCAL or name == "local" for name in names)
    manager = manager_type(include_path=include and str(include), include_defaults=not only_local)
    loaded, failed = {}, {}
    with data_from(data):
        for name in names:
            try:
                loaded[name] = manager.load([name])
            except Exception as error:  # a data set fails in as many ways as there are libraries below it
                reason = str(error).strip().partition("\n")[0] or "no reason given"
                failed[name] = f"{type(error).__name__}: {reason[:300]}"
    return loaded, failed


def run_task(
    lm: Any, name: str, loaded: Any, limit: int | None = None, shots: int | None = None, chat: bool = False
) -> dict[str, Any]:
    """One task or group on one model.

    Returns:
        metrics: all that the harness found, by name; metric, value: the one to report; stderr of it, or None; samples;
        shots; seconds; chance where it is known.
    """
    evaluator = need("lm_eval.evaluator", "eval")
    _set_shots(loaded, name, SHOTS.get(name) if shots is None else shots)
    started = time.perf_counter()
    found = evaluator.evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    seconds = time.perf_counter() - started
    results = found.get("groups", {}).get(name) or found["results"].get(name) or _only(found["results"], name)
    metrics = {key.partition(",")[0]: float(value) for key, value in results.items() if isinstance(value, (int, float))}
    errors = {k.removesuffix("_stderr"): v for k, v in metrics.items() if k.endswith("_stderr")}
    values = {k: v for k, v in metrics.items() if not k.endswith("_stderr") and k not in ("sample_len", "sample_count")}
    metric = METRIC.get(name) or (LOCAL[name][0] if name in LOCAL else None)
    metric = metric or next((m for m in _PREFERRED if m in values), next(iter(values)))
    counts = found.get("n-samples", {})
    return dict(
        metrics=values,
        metric=metric,
        value=float(values[metric]),
        stderr=None if errors.get(metric) is None else float(errors[metric]),
        samples=sum(c["effective"] for c in counts.values()),
        shots=max((t.get_config("num_fewshot") for t in loaded["tasks"].values()), default=0),
        seconds=seconds,
        chance=LOCAL[name][1] if name in LOCAL else CHANCE[name] / 100 if name in CHANCE else None,
    )


def _set_shots(loaded: Any, name: str, shots: int | None) -> None:
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        # A task that says 0 means it, unless it is one that is always given examples.
        if shots is not None and (own != 0 or name in SHOTS):
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)


def _only(results: dict[str, Any], name: str) -> dict[str, Any]:
    if len(results) != 1:
        raise ValueError(
            f"{name} has {len(results)} results and no figure of its own; name its tasks: {', '.join(results)}"
        )
    return next(iter(results.values()))
