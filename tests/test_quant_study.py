"""The study of quantised weights: its sums against plain formulas, and its tables and plots from a result."""

import json
import math

import pytest
import tiny
import torch

from bench import quant_accuracy, quant_large, quant_speed, quant_study, report
from mistral.quantized import LINEARS, quantize_model
from mistral_kernels import testing

pytestmark = pytest.mark.usefixtures("one_thread")


def test_text_figures_are_those_of_the_formulas():
    """Windows of unequal length; the last token alone predicts nothing."""
    ids, vocab = tiny.tokens(23).tolist(), 97
    tables = [testing.fill((vocab, vocab), seed=seed).float() for seed in (1, 2)]
    found = quant_accuracy.on_text(lambda i: tables[0][i], {"other": lambda i: tables[1][i]}, ids, 11)
    at = [
        (a, b) for start in (0, 11) for a, b in zip(ids[start : start + 10], ids[start + 1 : start + 11], strict=True)
    ]
    p, q = (torch.stack([t[a].double().log_softmax(-1) for a, _ in at]) for t in tables)
    targets = torch.tensor([b for _, b in at])
    losses = [-t[torch.arange(len(at)), targets] for t in (p, q)]
    other, change = found["other"], losses[1] - losses[0]
    assert other["perplexity"] == pytest.approx(losses[1].mean().exp().item(), rel=1e-5)
    assert found["float32"]["perplexity"] == pytest.approx(losses[0].mean().exp().item(), rel=1e-5)
    assert other["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert other["top1"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1
    assert other["change_percent"] == pytest.approx(100 * (change.mean().exp().item() - 1), rel=1e-4)
    assert other["change_error_percent"] == pytest.approx(100 * change.std().item() / math.sqrt(20), rel=1e-4)
    assert found["float32"]["kl"] == 0 and found["float32"]["top1"] == 1


def test_variants_and_layers():
    whole = tiny.model(tie_embeddings=True)
    before = {n: t.clone() for n, t in whole.state_dict().items()}
    models = quant_accuracy.variants(whole, {}, ("int8", "int4 g64"))
    assert list(models) == ["bf16", "int8, x in float32", "int8", "int4 g64"]
    assert all(torch.equal(before[n], t) for n, t in whole.state_dict().items())
    rows = quant_accuracy.of_layers(whole, models, tiny.tokens(30))
    assert list(rows) == ["int8, x in float32", "int8", "int4 g64"] and len(rows["int8"]) == 3 * len(LINEARS)
    for good, bad in zip(rows["int8"], rows["int4 g64"], strict=True):
        assert good["weight"] > bad["weight"] + 10 and good["output"] > bad["output"] + 10
    row = rows["int8"][7]
    assert (row["layer"], row["part"]) == (1, "attention.wq") and 35 < row["weight"] < 60
    bytes_of = {name: quant_accuracy.weight_bytes(m) for name, m in models.items()}
    assert bytes_of["bf16"] == 2 * whole.config.parameter_count() and bytes_of["int8"] < 0.6 * bytes_of["bf16"]
    assert quant_accuracy.decibel(torch.ones(3), torch.zeros(3)) == math.inf
    fed = quant_accuracy.variants(whole, {}, ("int8", "int4 g64"), tiny.tokens(3, 30))
    exact = [f"{name}, x in float32" for name in ("int8", "int8, calibrated")]
    assert list(fed) == ["bf16", *exact, "int8", "int8, calibrated", "int4 g64"]
    assert all(next(fed[name].parameters()).dtype == torch.float32 for name in exact)
    weights = [fed[name].layers[1].attention.wq.codes for name in ("int8", "int8, calibrated")]
    assert torch.equal(weights[0], models["int8"].layers[1].attention.wq.codes) and not torch.equal(*weights)


def test_int8_cache_is_close_to_none():
    model, ids = tiny.model(), tiny.tokens(40)
    with torch.inference_mode():
        plain, codes = quant_accuracy.direct(model)(ids), quant_accuracy.through_cache(model, torch.int8)(ids)
    assert plain.shape == codes.shape and 0 < (plain - codes).abs().max() < 0.1 * plain.abs().max()


def test_models_are_timed():
    model = quantize_model(tiny.model(), "int8")
    found = quant_speed.whole_models(dict(bf16=tiny.model(), int8=model), {}, [1, 2, 3], 4, 2)
    assert set(found) == {"bf16", "int8", quant_study.KV_NAME}
    assert all(row[kind]["count"] == 2 and row[kind]["low"] > 0 for row in found.values() for kind in row)


def test_a_large_model_is_written_and_run(tmp_path, monkeypatch):
    small = dict(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=99, max_positions=64)
    monkeypatch.setattr(quant_large, "SHAPE", small)
    monkeypatch.setattr(quant_large, "PATTERN", 1001)
    wrote = quant_large.write(tmp_path, 2, "int8")
    ran = quant_large.run(tmp_path, 3, True)
    assert wrote["file_bytes"] > wrote["parameters"] > ran["bytes_a_token"] * 0.9 and wrote["peak_bytes"] > 0
    assert ran["tokens_per_second"] > 0 and ran["share_of_read"] > 0 and ran["load_seconds"] > 0


def result():
    spread = dict(median=2.0, low=1.0, high=4.0, count=3)
    line = dict(perplexity=23.5, change_percent=0.25, change_error_percent=0.125, top1=0.75, kl=0.5)
    layers = [
        dict(layer=i, part=part, weight=40.0 + i, output=None if part == LINEARS[0] else 30.0)
        for i in range(3)
        for part in LINEARS
    ]
    return dict(
        machine=dict(cpu="a CPU", threads=2, torch="2", commit="abc", date="today", load_at_start=0.5),
        model="x.gguf",
        options=quant_study.QUICK | dict(quick=True),
        without_llama_cpp="it is missing",
        calibration=[3, 10, "y.jsonl"],
        accuracy=dict(
            tokens=100,
            window=10,
            text=dict(float32=line, int8=line),
            layers=dict(int8=layers),
            parameters=1000,
            bytes=dict(float32=4000, int8=1010),
        ),
        models=dict(
            bf16=dict(prefill=spread, decode=spread), int8=dict(prefill=spread, decode=spread | dict(median=3.0))
        ),
        layer=dict(
            single=dict(
                shape=[1, 8, 4],
                rows=dict(int8=dict(seconds=dict(ours=spread), share_of_read=spread, against=dict(torch=spread))),
            ),
            many=dict(shape=[5, 8, 4], seconds=dict(ours=spread), operations=6e9, against=dict(torch=spread)),
        ),
        large=dict(
            layers=32,
            write=dict(seconds=9.0, file_bytes=7e9, peak_bytes=2e9, parameters=7e9),
            run=dict(
                load_seconds=3.0,
                anonymous_bytes=7e9,
                peak_bytes=9e9,
                bytes_a_token=7e9,
                tokens_per_second=5.0,
                read_bytes_per_second=4e10,
                share_of_read=0.875,
            ),
        ),
    )


def test_a_page_that_cannot_take_the_tables_is_refused_at_once(tmp_path, capsys):
    unmarked = tmp_path / "unmarked.md"
    unmarked.write_text("no marks")
    for page, words in ((tmp_path / "none.md", "No such file"), (unmarked, "study begins")):
        with pytest.raises(SystemExit):
            quant_study.parse(["--page", str(page)])
        assert words in capsys.readouterr().err


def test_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study begins -->\nold\n<!-- study ends -->\nafter\n")
    monkeypatch.setattr(quant_study, "measure", lambda options, size: result())
    assert quant_study.main(["--quick", "--out", str(tmp_path / "out"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    for words in (
        "| int8 | 0 | 8.08 | 23.500 | +0.250 ± 0.125 % | 75.00% | 0.50000 |",
        "| int8 | 41.0 / exact | 41.0 / 30.0 |",
        "| int8 | 3 (1-4) | 1.50 x | 2 (1-4) |",
        "Without llama.cpp: it is missing.",
        "Calibrated weights were made on 3 windows of 10 tokens of y.jsonl, another text.",
        "W8A8 with 5 rows, 8 x 4: 2 s (1-4), 3 GOP/s; others take torch 2.00 x.",
        "Decoding: 5.00 tokens/s, 7.00 GB of weights a token, 88% of what the read probe",
        "its figures mean little",
    ):
        assert words in text, words
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"study.json", "tables.md", "sqnr.png", "perplexity.png", "decode.png"} <= made
    assert json.loads((tmp_path / "out" / "study.json").read_text())["accuracy"]["text"]["int8"]["kl"] == 0.5
    assert report.read_json(tmp_path / "out" / "study.json")["seconds"] >= 0
