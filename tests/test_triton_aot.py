"""The Triton kernels compiled for GPUs that need not be here: registers, spills, width of loads, float64, MMA.

Every module tests/aot_specs_*.py adds its SPECS. Nothing here says how fast a kernel is.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CACHE = TESTS.parent / "build" / "triton_aot"
MODULES = sorted(path.stem for path in TESTS.glob("aot_specs_*.py"))

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def reports(module: str, capability: int, *options: str) -> list[dict]:
    """What the harness prints, run without the interpreter that this process may have on.

    Triton keeps what it compiled, by a hash of all that it was made from; here under build, for the next run.
    """
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    path = [str(TESTS), str(TESTS.parent / "kernels"), *sys.path]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(CACHE)}
    done = subprocess.run(
        [sys.executable, str(TESTS / "triton_aot.py"), module, str(capability), *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: list[dict]) -> None:
    assert found
    wrong = [f"{r['spec']} ({r.get('kernel', 'not compiled')}): {p}" for r in found for p in r["problems"]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("module", MODULES)
def test_production_configurations(module, capability):
    check(reports(module, capability))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("module", MODULES)
def test_all_configurations(module, capability):
    check(reports(module, capability, "--slow"))


def test_harness_finds_what_is_wrong():
    sys.path.insert(0, str(TESTS))
    from aot_bad_kernels import EXPECTED

    found = {r["spec"]: " ".join(r["problems"]) for r in reports("aot_bad_kernels", 90)}
    assert found.keys() == EXPECTED.keys()
    for name, sentence in EXPECTED.items():
        assert (sentence in found[name]) if sentence else not found[name], (name, found[name])
