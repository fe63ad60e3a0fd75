"""The script that asks a GPU about the Hopper kernels: what of it runs in the emulator, and that no hang stops it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptx_on_cpu import missing, option

from mistral_kernels.testing import attention_case, parity

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


@pytest.mark.skipif(missing() is not None, reason=f"CUDA kernels cannot be built here: {missing()}")
def test_the_emulator_can_round_as_a_gpu_does(script):
    """An H100 made every one of these sums as this model does (docs/cuda/H100_hopper.json)."""
    import hopper_calibration as calibration

    with option("capability", 90), option("cut_sums", 1):
        for found in calibration.rounding(calibration.Machine()):
            assert found["differ"]["cut to 25 bits below the largest"] == 0
            assert found["differ"]["float32 FMA in order of k"] > 0.4 * found["sums"]


@pytest.mark.usefixtures("cuda_ops", "one_thread")
@pytest.mark.parametrize("queries, keys, heads", [(64, 64, 1), (300, 90, 2)])
def test_lse_is_as_far_off_as_on_a_gpu(queries, keys, heads):
    """Where all products have one sign, what is cut off adds up: lse breaks the parity rule on an H100, and here."""
    docs = SCRIPT.parents[1] / "docs/cuda/H100_hopper.json"
    (rows,) = (r["found"] for r in json.loads(docs.read_text()) if r["piece"] == "forward 128 float16")
    case = attention_case(1, queries, keys, heads, 1, 128)
    (there,) = (f["errors"] for f in rows if f.get("case") == case.label and f["kind"] == "ramp")
    with option("capability", 90):
        exact = parity(case, torch.float16, "cuda", kind="ramp")
        with option("cut_sums", 1):
            here = parity(case, torch.float16, "cuda", kind="ramp")
    for e in here:
        assert e.max_error == pytest.approx(there[e.output][0], rel=1e-6), e
    assert exact[1].max_error < 0.5 * here[1].max_error


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
