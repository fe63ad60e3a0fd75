"""Two and three processes with gloo against one: equal losses, checkpoints that any number of processes resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_runs as runs

from mistral.training import checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def launch(folder: Path, processes: int, changes: list[dict]) -> None:
    """Runs these settings one after another under torchrun."""
    runs.settings(folder)  # the shards
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / p) for p in ("kernels", "", "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "tests" / "training_runs.py"), str(folder), json.dumps(changes)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[:6000]


def values(out: Path) -> list[float]:
    return [float(x) for x in runs.losses(out)]


TIED = dict(shape=runs.SHAPE | dict(tie_embeddings=True), micro_batch=4)  # 6 sequences: 3 processes pad
BF16 = dict(precision="bfloat16", checkpoint_activations=True)
FP16 = dict(precision="float16", loss_scale=256.0)


@pytest.mark.parametrize(
    "processes, kinds", [(2, dict(plain={}, bf16=BF16, fp16=FP16)), (3, dict(plain={}, tied=TIED))]
)
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, processes, kinds):
    hows = {name: dict(how, eval_fraction=0.1 if name == "plain" else 0.0) for name, how in kinds.items()}
    launch(tmp_path, processes, [dict(how, out=f"{tmp_path}/{n}-many", save_every=3) for n, how in hows.items()])
    for name, how in hows.items():
        runs.run(tmp_path, out=f"{tmp_path}/{name}-one", **how)
        one, many = values(tmp_path / f"{name}-one"), values(tmp_path / f"{name}-many")
        exact = how.get("precision") is None
        assert many == pytest.approx(one, rel=2e-6 if exact else 2e-4), name
        norms = [
            [float(r["grad_norm"]) for r in runs.read_csv(tmp_path / f"{name}-{n}" / "log.csv")]
            for n in ("one", "many")
        ]
        assert norms[1] == pytest.approx(norms[0], rel=2e-5 if exact else 2e-2), name
    go_on(tmp_path, tmp_path / "plain-many", values(tmp_path / "plain-one"))


def go_on(folder: Path, out: Path, expected: list[float]) -> None:
    """One process goes on from the checkpoint that several made at step 3."""
    set_aside(out)
    assert runs.run(folder, out=str(out), save_every=3)["first_step"] == 3
    assert values(out) == pytest.approx(expected, rel=2e-6)


def test_a_checkpoint_of_one_process_is_resumed_by_two(tmp_path):
    """And a run of two that was cut off goes on by two bitwise as it was."""
    runs.run(tmp_path, out=f"{tmp_path}/whole")
    runs.run(tmp_path, out=f"{tmp_path}/part", save_every=3)
    set_aside(tmp_path / "part")
    launch(tmp_path, 2, [dict(out=f"{tmp_path}/part"), dict(out=f"{tmp_path}/again", save_every=3, export="hf")])
    assert values(tmp_path / "part") == pytest.approx(values(tmp_path / "whole"), rel=2e-6)
    set_aside(tmp_path / "again")
    twice = runs.losses(tmp_path / "again")
    launch(tmp_path, 2, [dict(out=f"{tmp_path}/again")])
    assert runs.losses(tmp_path / "again") == twice
    from mistral.weights import load_model

    assert load_model(tmp_path / "again" / "export", dtype=torch.float32, progress=False).config.dim == 16


def set_aside(out: Path) -> None:
    """Leaves the checkpoint of step 3 as the newest."""
    (out / "checkpoints" / "step-00000006").rename(out / "set-aside")
    assert checkpoints.newest(out / "checkpoints").name == "step-00000003"
