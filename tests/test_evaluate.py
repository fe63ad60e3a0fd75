"""Tasks made from text on this machine, perplexity, and `python -m mistral.evaluate`."""

import json
import math

import eval_models
import pytest
import tiny
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'mistral-kernels[eval]'")

from mistral import evaluate
from mistral.evaluation import local, perplexity, published, report, running
from mistral.evaluation.harness import MistralLM
from mistral.evaluation.loading import Variant
from mistral.evaluation.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    return path, local.make_tasks(path, samples=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return eval_models.folder(tmp_path_factory.mktemp("tiny"))


def docs(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


# ---- local tasks ----


def test_tasks_depend_on_text_and_seed_alone(tasks, tmp_path):
    path, counts = tasks
    assert counts.keys() == local.TASKS.keys() and all(counts[n] == 24 for n in counts if n != "local_text")
    local.make_tasks(tmp_path, samples=24)
    for name in local.TASKS:
        assert docs(path, name) == docs(tmp_path, name)
    local.make_tasks(tmp_path, samples=24, seed=1)
    assert docs(path, "local_words") != docs(tmp_path, "local_words")


def test_questions_have_one_right_answer(tasks):
    path, _ = tasks
    text = " ".join(" ".join(" ".join(p) for p in local.paragraphs(local.read_text([]))).split())
    for name in ("local_endings", "local_words", "local_order", "local_recall"):
        answers = [doc["answer"] for doc in docs(path, name)]
        assert len(set(answers)) == len(docs(path, name)[0]["choices"])
        for doc in docs(path, name):
            assert len(set(doc["choices"])) == len(doc["choices"])
    for doc in docs(path, "local_words"):
        assert f"{doc['context'][-30:]} {doc['choices'][doc['answer']]}" in text
    for doc in docs(path, "local_recall"):
        assert all(choice in doc["context"] for choice in doc["choices"])
        begun = doc["context"].rpartition("\n\n")[2]
        assert f"{begun} {doc['choices'][doc['answer']]}" in doc["context"]
    for doc in docs(path, "local_cloze"):
        assert doc["answer"].strip() in doc["context"]


def test_other_text_and_too_little(tmp_path):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "iota", "kappa", "lambda"]
    told = "\n\n".join(
        f"The {words[i % 10]} of the {words[i % 7]} was {words[i % 3]} in every town of the land. It went on for years."
        for i in range(40)
    )
    (tmp_path / "plain.txt").write_text(told)
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict(text=told)) + "\n")
    for name in ("plain.txt", "rows.jsonl"):
        assert told in local.read_text([tmp_path / name])
    with pytest.raises(ValueError, match="samples is 0"):
        local.make_tasks(tmp_path, samples=0)


def test_smollm2_is_far_above_chance(tasks):
    path, _ = tasks
    try:
        lm = MistralLM("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    names = ("local_words", "local_order", "local_cloze")
    loaded, failed = running.load_tasks(names, include=path)
    assert not failed
    found = {name: running.run_task(lm, name, loaded[name]) for name in names}
    for name, row in found.items():
        assert row["samples"] == 24
        chance = row["chance"] or 0.05
        assert row["value"] > chance + 4 * math.sqrt(chance * (1 - chance) / row["samples"]), (name, row)


# ---- perplexity ----


def test_perplexity_is_that_of_the_definition():
    net, text = tiny.model(), tiny.tokens(50, seed=4).tolist()
    got = perplexity.perplexity(Scorer(net), text, 16, prefix=3)
    total = 0.0
    with torch.inference_mode():
        for at in range(0, 50, 16):
            piece = torch.tensor([3, *text[at : at + 16]])
            logp = net(piece[None, :-1])[0].double().log_softmax(-1)
            total -= logp.gather(1, piece[1:, None]).sum().item()
    assert got.value == pytest.approx(math.exp(total / 50), rel=1e-5)
    assert (got.tokens, got.length, got.window) == (50, 16, None)
    for tokens, length in (([], 4), ([1], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            perplexity.perplexity(Scorer(net), tokens, length, 0)


def test_windows_are_those_of_models_made_with_them():
    text = tiny.tokens(60, seed=5).tolist()
    rows = perplexity.by_length_and_window(tiny.model(), text, [8, 30], [5, 8, None], prefix=0)
    assert [(r.length, r.window) for r in rows] == [(8, 5), (8, None), (30, 5), (30, 8), (30, None)]
    for row in rows:
        alone = perplexity.perplexity(Scorer(tiny.model(sliding_window=row.window)), text, row.length, 0)
        assert row.value == pytest.approx(alone.value, rel=1e-6)
    assert len({round(r.value, 3) for r in rows}) == 5


# ---- how a model is run ----


def test_weights_are_quantised_when_they_are_loaded(folder):
    plain = MistralLM(Variant(str(folder)).load()[0], eval_models.tokenizer())
    pair = [(plain.tok_encode("The value of the"), plain.tok_encode(" name is"))]
    seen = {}
    for weights in ("model", "int8", "int4:0"):
        model, _ = Variant(str(folder), dtype="float32", weights=weights).load()
        seen[weights] = Scorer(model)(pair)[0].total
    assert 1e-5 < abs(seen["int8"] - seen["model"]) < 0.3
    assert abs(seen["int4:0"] - seen["model"]) > abs(seen["int8"] - seen["model"])
    for wrong in ("int5", "int4:x", "codes:64", "int4:63"):
        with pytest.raises(ValueError, match=r"weights is|group_size is"):
            Variant(str(folder), weights=wrong)


def test_an_adapter_reaches_the_model(folder, tmp_path):
    pytest.importorskip("peft")
    from mistral.adapters import adapter_state, add_adapters, save_adapter

    model, tok = Variant(str(folder), dtype="float32").load()
    pair = [(tok.encode("The value of the"), tok.encode(" name is"))]
    plain = Scorer(model)(pair)[0].total
    tuned = add_adapters(model, rank=4, alpha=8, targets=["wq", "w2"])
    state = adapter_state(tuned)
    for name, tensor in state.items():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    save_adapter(state, tmp_path, model.config, 4, 8)
    wanted = Scorer(tuned)(pair)[0].total
    assert abs(wanted - plain) > 1e-2
    for merge in (False, True):
        lm = MistralLM(str(folder), dtype="float32", merge=merge, **{"adapter" if merge else "peft": str(tmp_path)})
        assert lm.scorer(pair)[0].total == pytest.approx(wanted, abs=1e-4)


# ---- the command ----


@pytest.mark.filterwarnings("ignore:.* contexts lose")
def test_the_command_writes_a_report(folder, tmp_path, capsys):
    command = ["--model", str(folder), "--out", str(tmp_path), "--samples", "4", "--window", "16", "--max-length", "96"]
    command += ["--tasks", "local_words,local_repeat,arc_nowhere", "--perplexity", "16,64", "--windows", "8,none"]
    assert evaluate.main([*command, "--tokens", "200", "--limit", "3", "--dtype", "float32"]) == 1
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["tasks"]["local_words"]["samples"] == 3
    assert "arc_nowhere" in result["failed"]
    assert [(r["length"], r["window"]) for r in result["perplexity"]] == [(16, 8), (16, None), (64, 8), (64, None)]
    text = (tmp_path / "evaluation.md").read_text()
    assert "Not run, arc_nowhere" in text and "| 64 |" in text and text in capsys.readouterr().out
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def arc(path):
    """The data set of arc_challenge, as it lies in a folder that was downloaded from the hub."""
    home = path / "allenai" / "ai2_arc"
    home.mkdir(parents=True)
    lines = ["---", "configs:", "- config_name: ARC-Challenge", "  data_files:"]
    for split in ("train", "validation", "test"):
        rows = [
            dict(
                id=f"{split}{i}",
                question=f"What is {i} of them?",
                choices=dict(text=["a name", "a value", "nothing", "all"], label=["A", "B", "C", "D"]),
                answerKey="ABCD"[i % 4],
            )
            for i in range(6)
        ]
        (home / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (home / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_data_sets_of_the_hub_in_a_folder(folder, tmp_path):
    arc(tmp_path / "data")
    out = tmp_path / "out"
    command = ["--model", str(folder), "--out", str(out), "--tasks", "arc_challenge", "--shots", "2"]
    command += ["--data", str(tmp_path / "data")]
    assert evaluate.main(command) == 0
    row = json.loads((out / "evaluation.json").read_text())["tasks"]["arc_challenge"]
    assert row["shots"] == 2
    assert row["samples"] == 6 and row["metric"] == "acc_norm" and 0 <= row["value"] <= 1
    line = next(x for x in (out / "evaluation.md").read_text().splitlines() if x.startswith("| arc_challenge"))
    assert line.endswith("| 55.5 | 77.7 | 73.9 |")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "local_words", "--samples", "0"], "--samples is 0"),
        ([], "nothing to do"),
        (["--perplexity", "0"], "at least 1"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "smollm2", *flags])
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys):
    assert evaluate.main(["--model", "nowhere", "--tasks", "local"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_published_figures_are_told_apart():
    assert published.PAPER["mmlu"] == 60.1 and published.COPIED["mmlu"] == 69.3
    row = dict(metric="acc", value=0.5, stderr=0.01, chance=0.25, shots=5, samples=9)
    text = report.task_table({"mmlu": row})
    assert "| mmlu | acc | 5 | 9 | 50.0 ± 1.0 | 25 | 60.1 | 69.3 | 68.9 |" in text
    assert "not** the paper's" in published.NOTE
