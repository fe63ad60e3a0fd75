"""SmolLM2 under transformers: the patched model says what the model says, alone and in padded rows."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from bench import hf_study, report
from mistral.samples import smollm2_path
from mistral_kernels.patch import OPS, patch

pytest.importorskip("transformers", minversion="5.20")


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("gguf")
    return hf_study.load(smollm2_path(), torch.float32)


def test_same_tokens(loaded, one_thread):
    model, tokenizer = loaded
    found = hf_study.agreement(model, tokenizer, count=64, batch_count=8)
    assert found["greedy"] == dict(tokens=64, parts_at=None)
    assert found["padded_rows"]["patched"] == [dict(tokens=8, parts_at=None)] * 3
    assert found["unpatch_restores_bitwise"]
    replaced = found["report"][0]
    assert all(op in replaced for op in OPS) and "30 × swiglu" in replaced and "61 × rms_norm" in replaced
    assert "sea" in found["text"]


def test_a_dropped_mask_is_seen(loaded, one_thread):
    """Rows whose padding counts must part from the rows alone, else the comparison above says nothing."""
    model, tokenizer = loaded
    prompts = hf_study.chats(tokenizer, hf_study.QUESTIONS)
    ids, _ = hf_study.left_padded(prompts)
    patch(model, ops="attention")
    together = hf_study.continued(model, ids, 8)[0]
    alone = hf_study.continued(model, torch.tensor([prompts[0]]), 8)[0]
    hf_study.unpatch(model)
    assert "margin" in hf_study.compared(model, alone, together, prompts[0])


def test_left_padded():
    ids, mask = hf_study.left_padded([[5], [6, 7, 8]])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def result():
    figure = dict(median=2.0**21, low=2.0**20, high=2.0**22, count=3)
    agreed = dict(
        greedy=dict(tokens=9, parts_at=None),
        padded_rows=dict.fromkeys(("patched", "transformers"), [dict(tokens=9, parts_at=3, margin=0.125)] * 3),
        unpatch_restores_bitwise=False,
    )
    return dict(
        machine=dict(cpu="x", torch="2", transformers="5", commit="abc"),
        options=dict(prompt=1, tokens=2, dtype="bfloat16", rounds=1, repeats=1, threads=1, clock="cpu"),
        agreement=dict(float32=agreed),
        summary=dict(patched=dict.fromkeys(hf_study.FIELDS, figure) | dict(train_peak=None)),
        could_not_run=dict(transformers="no room"),
    )


def test_tables():
    text = hf_study.tables(result())
    assert "all 9 equal" in text and "part at token 4 of 9, margin of the logits 0.12" in text and "| NO |" in text
    assert "| 2 (1-4) |" in text and "unknown" in text and "Could not run, transformers: no room" in text


def test_page():
    page = "before\n<!-- smollm2 begins -->\nold\n<!-- smollm2 ends -->\nafter\n"
    assert report.placed(page, hf_study.MARK, "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="the page has no"):
        report.placed("no marks", hf_study.MARK, "new")


@pytest.mark.parametrize("name", ["smollm2", "transformers_tests"])
def test_the_page_in_the_repository_is_that_of_its_run(name):
    root = Path(__file__).parents[1]
    run, page = root / f"docs/huggingface/{name}.json", (root / "docs/huggingface.md").read_text(encoding="utf-8")
    if not run.exists():
        pytest.skip("no run is in the repository")
    tables = hf_study.tables
    if name == "transformers_tests":
        tables = runpy.run_path(str(root / "scripts/transformers_tests/run.py"))["table"]
    assert report.placed(page, name, tables(json.loads(run.read_text(encoding="utf-8")))) == page


def test_variants_run_in_processes(monkeypatch, capsys):
    """A process that fails is told, and does not run again."""
    calls = []

    class Done:
        stdout, stderr = "noise\n" + json.dumps(dict(prefill=[1.0])), "first\nno memory\n"

        def __init__(self, command, **_):
            calls.append(command[-1])
            self.returncode = int("compiled" in command[-1])

    monkeypatch.setattr(hf_study.subprocess, "run", Done)
    options = hf_study.parse(["--rounds", "2", "--threads", "1"])
    seen, failed = hf_study.timed(options)
    assert seen["patched"] == [dict(prefill=[1.0])] * 2 and failed["patched, compiled"] == "no memory"
    assert len(calls) == 6
    short = hf_study.parse(["--quick", "--rounds", "2", "--threads", "1"])
    assert (options.prompt, options.repeats) == (512, 3) and (short.prompt, short.rounds, short.repeats) == (256, 2, 2)
    for wrong in (["--tokens", "2"], ["--clock", "cpu", "--threads", "2"]):
        with pytest.raises(SystemExit):
            hf_study.parse(wrong)
