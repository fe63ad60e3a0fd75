"""The folder kernels/ must never become the package `kernels`, a name that Hugging Face owns; imports stay late."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path = ROOT, **env: str) -> str:
    """Runs `code` in a fresh Python with this one's path; returns what it printed."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_a_source_root():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("first", ["import mistral_kernels, mistral", ""])
def test_transformers_imports_from_the_repository_root(first):
    run(f"{first}\nfrom transformers import MistralForCausalLM\nimport mistral_kernels, mistral")


@pytest.mark.parametrize("blocked", ["triton", "transformers", "numpy"])
def test_import_needs_torch_only(blocked):
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
import torch, mistral_kernels
print(mistral_kernels.rms_norm(torch.ones(2, 4), torch.ones(4)).sum().item())
"""
    assert float(run(code)) == pytest.approx(8, abs=1e-3)


def test_import_loads_nothing_optional():
    code = "import sys, mistral_kernels; print([m for m in ('triton', 'transformers', 'gguf') if m in sys.modules])"
    assert run(code) == "[]"


def test_the_library_beside_the_package_is_the_one_loaded():
    """An editable install of another checkout must not lend its binary."""
    code = "import mistral_kernels._library as l; print(l.path.parent)"
    assert Path(run(code)) == ROOT / "kernels" / "mistral_kernels"


def test_without_a_library_everything_but_the_cpu_kernels_works(tmp_path):
    """What a machine without a compiler gets."""
    shutil.copytree(
        ROOT / "kernels" / "mistral_kernels", tmp_path / "mistral_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch, mistral_kernels as mk
assert mk.__file__.startswith({str(tmp_path)!r}), mk.__file__
assert "not built" in mk.backends()["cpu"]
q = torch.randn(1, 5, 2, 8, requires_grad=True)
mk.attention(q, q, q, window=2).sum().backward()
try:
    mk.rms_norm(q.detach(), torch.ones(8), impl="cpu")
except NotImplementedError as error:
    print(error)
"""
    assert "not built" in run(code, cwd=tmp_path)


def test_a_library_that_does_not_load_is_told(tmp_path):
    """As one that was built for another torch."""
    shutil.copytree(
        ROOT / "kernels/mistral_kernels", tmp_path / "mistral_kernels", ignore=shutil.ignore_patterns("*.so")
    )
    (tmp_path / "mistral_kernels/libmistral_kernels.so").write_bytes(b"no library")
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
with warnings.catch_warnings(record=True) as told:
    import torch, mistral_kernels as mk
assert mk.rms_norm(torch.ones(2, 4), torch.ones(4)).shape == (2, 4)
print(len(told), told[0].message)
print(mk.backends()["cpu"])
"""
    told, reason = run(code).splitlines()
    assert told.startswith("1 mistral_kernels is without its C++ kernels") and "does not load under torch" in told
    assert reason.startswith("libmistral_kernels.so does not load under torch")
