"""The study of `make eval-study`: what it runs, and the page it writes. The study itself takes minutes."""

import argparse

import pytest

from bench import eval_report, eval_study
from mistral.evaluation.loading import Variant


def result():
    row = dict(value=0.5, stderr=0.1, metric="acc", metrics=dict(acc=0.5), samples=9, seconds=1.0)
    tasks = dict.fromkeys(eval_study.CHOICE_TASKS, row)
    both = {"Hugging Face's class": dict(acc=0.5), "ours": dict(acc=0.5)}
    compared = dict(
        requests=8,
        tokens=100,
        largest_difference=2e-4,
        greedy_agree=True,
        metrics=both,
        seconds={"Hugging Face's class": [4.0, 2.0, 3.0], "ours": [1.0, 0.5, 2.0]},
    )
    return dict(
        machine=dict(cpu="a CPU", threads=2, torch="2.13.0", commit="0"),
        options=dict(samples=9, rounds=3, tokens=64, table_tokens=64, steps=2),
        harness=dict(tasks={"local_words": compared}, failed={}),
        variants={
            "bfloat16": dict(tasks=tasks, perplexity={"Python reference": 20.0}),
            "LoRA, merged": dict(failed="no corpus"),
        },
        perplexity=[dict(length=n, window=w, value=9.0, tokens=64) for n, w in ((32, None), (64, 32), (64, None))],
        seconds=60.0,
    )


def test_the_page_has_every_figure_and_every_reason(tmp_path):
    text = eval_report.tables(result())
    assert "| local_words | 8 | 100 | 2.0e-04 | yes | acc 0.5 | 33 | 100 | 3.0x |" in text
    assert "1/3.0 of the time" in text
    assert "| bfloat16 | 50.0 ± 10.0 | 50.0 ± 10.0 | 50.0 ± 10.0 | 50.0 ± 10.0 | 50.0 ± 10.0 | 20.000 |" in text
    assert "Not run, LoRA, merged: no corpus" in text
    assert "| 64 | 9.00 | 9.00 |" in text and "| 32 |  | 9.00 |" in text
    page = tmp_path / "page.md"
    page.write_text("no place")
    with pytest.raises(ValueError, match="evaluation study begins"):
        eval_report.check_page(page)
    page.write_text("before\n<!-- evaluation study begins -->\nold\n<!-- evaluation study ends -->\nafter")
    eval_report.write_page(page, text)
    written = page.read_text()
    assert text in written and "old" not in written and written.startswith("before") and written.endswith("after")
    eval_report.plot(result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_variant_can_be_asked_for(tmp_path):
    found = eval_study.variants(tmp_path)
    assert {w for v in found.values() if (w := v.get("window"))} == {128, 256, 512, 1024, 2048}
    for settings in found.values():
        Variant("smollm2", **settings)
    assert len(found) == len(eval_study.variants(None)) + 1


def test_without_a_corpus_there_is_a_reason(tmp_path):
    options = argparse.Namespace(corpus=tmp_path / "none.jsonl", out=tmp_path)
    adapter, held, reason = eval_study.make_adapter(options)
    assert adapter is None and held == [] and "none.jsonl" in reason
