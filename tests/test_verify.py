"""`python -m mistral_kernels.verify` says what failed, what was left out, and by its exit status whether to worry."""

import dataclasses
import json

import pytest
import torch

import mistral_kernels
from mistral_kernels import testing, verify


def test_a_sound_op_passes_and_is_written_down(tmp_path, capsys):
    file = tmp_path / "parity.json"
    assert verify.main(["--op", "swiglu", "--impl", "reference", "--device", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [r["dtype"] for r in found["rows"]] == list(verify.DTYPE_NAMES)
    assert all(r["failed"] == 0 < r["passed"] and 0 < r["worst"] <= 1 for r in found["rows"])
    assert found["backends"].keys() == mistral_kernels.backends().keys()
    assert not list(tmp_path.glob("*.tmp"))
    assert "swiglu" in capsys.readouterr().out


def test_a_wrong_op_fails(monkeypatch, capsys):
    """Two roundings off under every implementation but the reference, of which the automatic choice is judged here."""
    right, check_row = mistral_kernels.swiglu, verify.check_row

    def check_automatic(op, impl, *how):
        judge = check_row(op, None, *how)
        return lambda: dataclasses.replace(judge(), impl=impl)

    def wrong(gate, up, *, impl=None):
        return right(gate, up, impl=impl) * (1 if impl == "reference" else 1 + 2**-6)

    monkeypatch.setattr(mistral_kernels, "swiglu", wrong)
    monkeypatch.setattr(verify, "check_row", check_automatic)
    assert verify.main(["--op", "swiglu", "--impl", "reference", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_op_that_raises_is_counted_and_hides_no_other(monkeypatch, capsys):
    right = mistral_kernels.swiglu

    def breaks(gate, up, *, impl=None):
        if gate.shape[-1] == 7 and gate.dtype == torch.float16:
            raise RuntimeError("out of registers")
        return right(gate, up, impl=impl)

    monkeypatch.setattr(mistral_kernels, "swiglu", breaks)
    assert verify.main(["--op", "swiglu", "--impl", "reference", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError out of registers" in out and f"{len(testing.KINDS)} failed" in out


def test_processes_say_what_one_says(tmp_path):
    found = []
    for jobs in ("1", "2"):
        file = tmp_path / jobs
        how = ["--op", "swiglu", "--impl", "reference", "--dtype", "float32", "--device", "cpu", "--jobs", jobs]
        assert verify.main([*how, "--json", str(file)]) == 0
        found.append(json.loads(file.read_text())["rows"])
    assert found[0] == found[1]


def test_an_implementation_that_cannot_run_is_no_success(capsys):
    impl = next((name for name, reason in mistral_kernels.backends().items() if reason), None)
    if impl is None:
        pytest.skip("every implementation is usable here")
    assert verify.main(["--op", "swiglu", "--impl", impl, "--device", "cpu"]) == 1
    assert "not usable" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--op", "gelu"], ["--impl", "fast"]])
def test_unknown_names(wrong):
    with pytest.raises(SystemExit, match="is not known; there are"):
        verify.main(wrong)


def test_the_interpreters_bfloat16_is_skipped_and_counted(monkeypatch, capsys):
    if not mistral_kernels._dispatch.triton_interpreted():
        pytest.skip("Triton's interpreter is off: a GPU is here")
    assert verify.main(["--op", "write_kv", "--impl", "triton", "--dtype", "bfloat16", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "1 rows skipped" in out and verify.INTERPRETER_BF16 in out


def test_ratio_of_nan_ranks_as_the_worst():
    row = verify.Row("op", "cpu", "float32")
    for ratio in (0.5, torch.nan, 0.7):
        row.add("out0 of case", ratio)
    assert row.failed == 1 and row.passed == 2 and row.worst == torch.inf
