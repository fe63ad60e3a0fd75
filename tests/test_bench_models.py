"""The model-level benchmarks in small, the page that is generated from their JSON, and the order to run them all."""

import argparse
import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import mistral_kernels
from bench import cli, docs, everything, report, whole, window
from bench.families.attention import visible_pairs
from mistral.samples import smollm2_path


@pytest.fixture(autouse=True)
def threads(one_thread):
    pass


@pytest.fixture(scope="module")
def sample():
    try:
        return smollm2_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_ideal_is_the_paper_s_formula():
    """x² / (2x − 1) for S = x W; the diagonal's half blocks vanish beside long windows."""
    for x in (2, 4, 32):
        assert window.ideal(4096 * x, 4096) == pytest.approx(x**2 / (2 * x - 1), rel=1e-3)
    assert window.ideal(100, 100) == window.ideal(50, 100) == 1
    assert 2 / window.ideal(16384, 4096) == pytest.approx(0.875, abs=2e-3)


def test_long_points_are_modelled_and_marked(monkeypatch, capsys):
    def measured(length, w, options, limits):
        return dict(seconds=visible_pairs(length, w) * 1e-6, modelled=False)

    monkeypatch.setattr(window, "seconds_of", measured)
    options = cli.parse(["window", "--point", "1.5"])
    points = window.times(options, 256, [512, 1024, 2048, 4096], None)
    assert [p["causal"]["modelled"] for p in points] == [False, False, True, True]
    assert [p["windowed"]["modelled"] for p in points] == [False, False, False, False]
    assert points[-1]["causal"]["seconds"] == pytest.approx(visible_pairs(4096, None) * 1e-6)
    assert all(p["speedup"] == pytest.approx(p["ideal"]) for p in points)
    assert capsys.readouterr().out.count("*") == 2


def test_peak_memory_is_seen():
    """In a process of its own: here the call could take what another test has freed."""
    program = "import torch; from bench import window; print(window.peak_of(lambda: torch.ones(1 << 24).sum(), 'cpu'))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    if found == "None":
        pytest.skip("the system does not say")
    assert 60 << 20 < int(found) < 100 << 20


def test_peaks_of_attention():
    """Ours holds its output at least, SDPA the mask as well."""
    found = window.memory(argparse.Namespace(device="cpu"), 128, 2048)
    output = 2048 * window.HEADS * window.DIM * 2
    assert found["ours"] >= 0.9 * output and found["sdpa_with_mask"] >= found["ours"]


def test_parity_of_wholes():
    truth = [torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    eager = [(truth[0] + 1e-3).float()]
    assert whole.share_of_twice_eager(eager, eager, truth) == pytest.approx(0.5)
    assert whole.share_of_twice_eager([(truth[0] + 3e-3).float()], eager, truth) > 1
    assert whole.share_of_twice_eager([eager[0] * float("nan")], eager, truth) == float("inf")


def test_a_training_step_with_wrong_kernels_is_refused(monkeypatch, tmp_path):
    right = mistral_kernels.linear_cross_entropy
    monkeypatch.setattr(mistral_kernels, "linear_cross_entropy", lambda *a, **k: right(*a, **k) * 1.1)
    out = tmp_path / "step.json"
    assert cli.main(["train-step", "--quick", "--json", str(out)]) == 1
    (row,) = report.read_json(out)["rows"]
    assert "parity fails" in row["refused"] and not row["seconds"]


def test_a_training_step(tmp_path):
    out = tmp_path / "step.json"
    assert cli.main(["train-step", "--quick", "--seconds", "0.01", "--json", str(out)]) == 0
    (row,) = report.rows_of(report.read_json(out))
    assert row.parity["ours"] <= 1 and {"ours", "eager", "limit"} <= row.seconds.keys()


def test_the_model_s_rows(sample, tmp_path):
    out = tmp_path / "model.json"
    assert cli.main(["model", "--quick", "--seconds", "0.01", "--llama-bench", "no-such", "--json", str(out)]) == 0
    rows = report.rows_of(report.read_json(out))
    assert [r.family for r in rows] == ["prefill", "decode"]
    for row in rows:
        assert row.parity["ours"] <= 1 and row.ratios["eager"]["median"] > 0
        assert row.left_out["llama.cpp llama-bench"] == "not found"


def test_only_and_peers_choose_among_the_model_s_rows(sample, tmp_path):
    out = tmp_path / "model.json"
    few = ["--quick", "--seconds", "0.01", "--llama-bench", "no-such", "--peers", "eager"]
    assert cli.main(["model", "--only", "decode", *few, "--json", str(out)]) == 0
    (row,) = report.rows_of(report.read_json(out))
    assert row.family == "decode" and row.seconds.keys() == {"ours", "eager", "limit"}
    with pytest.raises(SystemExit, match=r"'no such row'.*prefill 64 tokens"):
        cli.main(["model", "--only", "no such row", *few])


def test_llama_bench_is_read(tmp_path):
    from bench import model

    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho '" + json.dumps([dict(samples_ts=[100.0, 200.0, 50.0])]) + "'\n")
    program.chmod(0o755)
    row = whole.whole_row(cli.parse(["model"]), "decode", "c", "bfloat16", (1.0, ""), (1.0, ""), "read")
    row.seconds["ours"] = dict(median=0.005, low=0.005, high=0.005, count=3)
    model.llama_bench(str(program), tmp_path / "m.gguf", row, 0, 64)
    found = row.seconds["llama.cpp llama-bench"]
    assert (found["median"], found["low"], found["high"]) == (0.01, 0.005, 0.02)
    assert row.ratios["llama.cpp llama-bench"]["median"] == pytest.approx(2)


# ---- the page ----


def study():
    times = dict(causal=dict(seconds=2.0, modelled=True), windowed=dict(seconds=1.0, modelled=False))
    point = dict(S=512, W=256, speedup=2.0, ideal=2.5, cache_bytes=dict(causal=2**21, windowed=2**20)) | times
    return dict(
        heads="8/2",
        times=[point],
        memory=[dict(S=512, W=256, ours=2**20, sdpa_with_mask=None)],
        **dict(model="m.gguf", edges=[0, 10, 20], length=100),
        perplexity=[dict(W=None, values=[8.0, 7.5])],
        retrieval=[dict(W=64, distance=32, found=0.75, logprob=-0.5)],
    )


def run_of(**more):
    machine = dict(cpu="a processor", threads=2, modified=False)
    argv = ["python", "-m", "bench", "ops", "--json", "docs/bench/ops.json", "--allocator", "keep"]
    return dict(argv=argv, machine=machine, rows=[]) | more


def test_the_page_is_made_of_the_runs(tmp_path):
    row = whole.whole_row(cli.parse(["ops"]), "norm", "case", "float32", (1e6, "2 T N 4"), (1.0, "T N"), "copy")
    spread = dict(median=1e-3, low=9e-4, high=2e-3, count=5)
    row = dataclasses.replace(row, seconds=dict(ours=spread), share=spread | dict(median=0.5), parity=dict(ours=0.4))
    refused = dataclasses.replace(row, seconds={}, share=None, refused="parity fails: output 0")
    source = tmp_path / "bench"
    report.write_json(source / "ops.json", run_of(rows=[vars(row), vars(refused)], missing=dict(Liger="no GPU")))
    report.write_json(source / "window.json", run_of(study=study()))
    (source / "ops.svg").write_text("<svg/>")
    out = tmp_path / "performance.md"
    assert cli.main(["docs", "--source", str(source), "--out", str(out)]) == 0
    text = out.read_text()
    for wanted in (
        *("1 ms (0.9-2)", "1 GB/s", "50 % of copy", "REFUSED: parity fails: output 0", "bytes 2 T N 4"),
        *(
            "`python -m bench ops --allocator keep` on cpu a processor",
            "![ops](bench/ops.svg)",
            "Without Liger: no GPU",
        ),
        *("| 2 s\\* | 1 s |", "| 80 % |", "2.0 MiB", "| None | 8.00 | 7.50 |", "| 64 | 32 | 75% | -0.50 |", "unknown"),
    ):
        assert wanted in text, wanted
    assert cli.main(["docs", "--source", str(source), "--out", str(out)]) == 0 and out.read_text() == text


def test_the_page_in_the_repository_is_that_of_its_runs():
    if not list((docs.ROOT / "docs/bench").glob("*.json")):
        pytest.skip("no run is committed")
    assert (docs.ROOT / "docs/performance.md").read_text() == docs.page(docs.ROOT / "docs/bench", "bench")


def test_no_page_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="make performance-docs"):
        docs.page(tmp_path, "bench")


def test_all_commands_run_and_one_that_fails_is_told(monkeypatch, tmp_path, capsys):
    ran = []

    def fake(command):
        ran.append(command)
        return SimpleNamespace(returncode=int("decode" in command))

    monkeypatch.setattr(everything, "subprocess", SimpleNamespace(run=fake))
    assert cli.main(["all", "--out", str(tmp_path)]) == 1
    assert {c[3] for c in ran} == cli.COMMANDS.keys() - {"all", "docs"}
    assert "failed: ['decode']" in capsys.readouterr().out
    for command in ran:
        cli.parse(command[3:])
