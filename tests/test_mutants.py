"""The bugs of `make mutants` can still be planted, and the tests that must fail on them still exist."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import mutants  # noqa: E402

sys.path.remove(str(ROOT / "scripts"))


def source(mutant: mutants.Mutant) -> Path:
    return ROOT / ("csrc" if mutant.kind == mutants.CPP else mutants.PACKAGE) / mutant.file


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.kind}-{m.bug}-{m.file}")
def test_can_be_planted(mutant):
    assert source(mutant).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old


@pytest.mark.parametrize("test", sorted({m.test for m in mutants.MUTANTS}))
def test_named_tests_exist(test):
    path, name = test.split("::")
    defined = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name.partition("[")[0] in defined
