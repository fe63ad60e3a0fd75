"""The demo's comparisons catch what they are there to catch, and its report says so."""

import json

import pytest
import tiny
import torch

import mistral_kernels
from mistral import compare, demo, demo_report
from mistral.model import Transformer
from mistral_kernels import testing


def run_judged(config, impl=None):
    verdicts = {}
    model = Transformer(config, ops=compare.judged(impl, verdicts))
    with torch.inference_mode():
        model(torch.randint(config.vocab_size, (1, 9)))
        cache = model.cache(1, 9)
        for n in (6, 1, 1):
            model(torch.randint(config.vocab_size, (n,)), cache=cache, lengths=[n])
    return verdicts


def test_every_op_of_a_pass_is_judged(one_thread):
    torch.manual_seed(0)
    verdicts = run_judged(tiny.config(sliding_window=4))
    others = {"swiglu_packed", "linear_cross_entropy", "linear_int8", "linear_int4", "linear_nf4", "linear_quantized"}
    assert verdicts.keys() == {op.__name__ for op in compare.OPS} - others
    assert all(v.passed and v.calls > 0 for v in verdicts.values())


def test_a_wrong_op_is_caught(one_thread, monkeypatch):
    """A window one key too long, in every implementation but the reference."""
    right = mistral_kernels.attention

    def wrong(q, k, v, window=None, *args, impl=None, **kwargs):
        return right(q, k, v, window if impl == "reference" else window + 1, *args, impl=impl, **kwargs)

    monkeypatch.setattr(mistral_kernels, "attention", wrong)
    torch.manual_seed(0)
    verdicts = run_judged(tiny.config(sliding_window=4))
    assert [name for name, v in verdicts.items() if not v.passed] == ["attention"]


def test_where_continuations_part():
    assert compare.parting([1, 2, 3], [1, 2, 3]) is None
    assert compare.parting([1, 2, 3], [1, 5, 3]) == 1
    assert compare.parting([1, 2], [1, 2, 3]) == 2
    assert compare.margin(torch.tensor([0.5, 2.0]), 1, 0) == pytest.approx(1.5)


def result(ratio=0.5, parts_at=None):
    errors = testing.Errors("out0", ratio, 0.5, 0.0, 0.5, 1.0, 1.0, rows=20, scale=1.0)
    verdict = compare.Verdict("rms_norm")
    verdict.add([errors])
    speed = dict(median=2.0, low=1.0, high=3.0)
    found = dict(reference=[1, 2], fused=[1, 3], parts_at=parts_at, text=["a b", "a c"])
    if parts_at is not None:
        found["margin"] = 0.0123
    return dict(
        machine=dict(cpu="x"),
        backends=dict(cpu=None, triton="no GPU is here"),
        model=dict(path="model.gguf", parameters=10**6, window=4),
        text_tokens=9,
        question="Why?",
        ops=dict(float32=demo_report.verdict_rows({"rms_norm": verdict})),
        logits=dict(float32=demo_report.logit_row(errors)),
        continuations=dict(prompt=found),
        speed={name: dict(prefill=speed, decode=speed) for name in demo_report.COLOURS},
    )


def test_report_of_agreement():
    text = demo_report.markdown(result())
    assert "Greedy tokens agree, all 2" in text and "FAILED" not in text and "> a c" in text
    assert "not usable, no GPU is here" in text
    assert demo_report.passed(result())


def test_report_of_failure_and_parting():
    bad = result(ratio=1.5, parts_at=1)
    text = demo_report.markdown(bad)
    assert "part at token 2" in text and "0.0123" in text and "> a b" in text
    assert text.count("**FAILED**") == 2 and not demo_report.passed(bad)


def test_plots_are_pictures(tmp_path):
    demo_report.plots(result(), tmp_path)
    for name in ("speed.png", "parity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_demo_on_the_sample_model(tmp_path, capsys):
    """The whole demo, on so few tokens that its figures mean nothing."""
    out = tmp_path / "demo"
    status = demo.main(["--tokens", "40", "--max-tokens", "4", "--rounds", "1", "--window", "16", "--out", str(out)])
    found = json.loads((out / "report.json").read_text())
    assert status == 0, capsys.readouterr().out
    assert found["model"]["window"] == 16 and set(found["speed"]) == set(demo_report.COLOURS)
    assert (out / "report.md").read_text() in capsys.readouterr().out
