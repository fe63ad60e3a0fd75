"""bench/instructions.py on dumps that are written here; valgrind itself is run by `make check-instruction-counts`."""

import json
from pathlib import Path

import pytest

from bench import instructions

KERNEL, OTHER = f"mk::{instructions.TIER}::run<float>(int)", "at::empty(int)"
DUMP = f"""# callgrind format
version: 1
desc: Trigger: Client Request: swiglu forward
positions: line
events: Ir
ob=(1) /somewhere/libmistral_kernels.so
fl=(1) ???
fn=(1) {KERNEL}
0 70
+3 5
cfn=(2) mk::{instructions.TIER}::tail(int)
calls=2 0
* 1000
fn=(2)
0 20
fn=(3) {OTHER}
0 900
cfn=(1)
calls=1 0
0 95
fn=(1)
-3 5
summary: 2000
totals: 2000
"""


def test_a_dump_counts_the_kernels_themselves(tmp_path):
    (tmp_path / "out.1").write_text(DUMP)
    assert instructions.read_dump(tmp_path / "out.1") == ("swiglu forward", 70 + 5 + 20 + 5)


@pytest.mark.parametrize(
    ("counts", "status", "said"),
    [
        ({"a": 1000, "b": 505}, 0, "2 cases"),
        ({"a": 1011, "b": 500}, 1, "a: 1011 instructions, 1000 in the file (+1.1%)"),
        ({"a": 989, "b": 500}, 1, "a: 989 instructions, 1000 in the file (-1.1%)"),
        ({"a": 1000}, 1, "b: in the file, but not run"),
        ({"a": 1000, "b": 500, "c": 7}, 1, "c: not in the file; 7 instructions"),
    ],
)
def test_check(tmp_path, capsys, counts, status, said):
    facts = dict(compiler="GCC", tier=instructions.TIER, instructions={"a": 1000, "b": 500})
    (tmp_path / "file.json").write_text(json.dumps(facts))
    assert instructions.check(tmp_path / "file.json", "GCC", counts, "") == status
    assert said in capsys.readouterr().out
    assert instructions.check(tmp_path / "file.json", "another compiler", counts, "") == 1


def test_the_file_has_every_case():
    from bench import instruction_cases

    written = json.loads(Path(instructions.FILE).read_text())
    assert set(written["instructions"]) == {name for name, _, _ in instruction_cases.runs("")}
