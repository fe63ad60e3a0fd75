"""The script that asks a GPU about the Hopper kernels: what of it runs in the emulator, and that no hang stops it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptx_on_cpu import missing

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_hopper.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself runs here")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_hopper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels cannot be built here: {missing()}")
def test_dry_run_in_the_emulator(tmp_path):
    """Its arithmetic is the model that the script calls so, its pipelines are right, and contested rules are off."""
    out = tmp_path / "hopper.json"
    done = subprocess.run([sys.executable, SCRIPT, "--dry-run", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["piece"]: row["found"] for row in json.loads(out.read_text())}
    assert [found["differ"]["float32 FMA in order of k"] for found in rows["calibrate rounding"]] == [0, 0]
    assert all(min(n for m, n in f["differ"].items() if "FMA" not in m) > 0 for f in rows["calibrate rounding"])
    assert not any(found["wrong runs"] for p in ("tiles", "stress") for found in rows[f"calibrate {p}"])


def test_a_piece_that_hangs_is_ended_and_keeps_what_it_found(script, monkeypatch, tmp_path):
    hanging = tmp_path / "hanging.py"
    hanging.write_text(f"import time\nprint({script.MARK!r} + '{{\"passed\": true}}', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(script, "__file__", str(hanging))
    row = script.run("forward", ["forward"], 3, False)
    assert row["found"] == [{"passed": True}] and not row["ok"] and "not done after 3 s" in row["said"]
    assert script.run("hang", ["forward"], 3, True)["ok"]


def test_a_parity_that_fails_fails_its_piece(script, monkeypatch, tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text(f"print({script.MARK!r} + '{{\"passed\": false}}')\n")
    monkeypatch.setattr(script, "__file__", str(failing))
    assert not script.run("forward", ["forward"], 20, False)["ok"]


def test_page_is_what_the_file_says():
    page = SCRIPT.with_name("gpu_hopper_page.py")
    docs = SCRIPT.parents[1] / "docs/cuda"
    done = subprocess.run([sys.executable, page, docs / "H100_hopper.json"], capture_output=True, text=True, check=True)
    assert done.stdout == (docs / "H100_hopper.md").read_text()
