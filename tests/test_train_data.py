"""Shards, the order of sequences, packing, sources; and the errors of bad settings and torn data."""

import json

import pytest
import torch
import training_runs as runs

from mistral import train
from mistral.samples import smollm2_path
from mistral.training import sources
from mistral.training.batches import IGNORED, Order, Permutation, Sequences, count_labels, make_batch, share
from mistral.training.parallel import World
from mistral.training.shards import Tokens, read_index, write_shards
from mistral.training.trainer import Trainer


@pytest.mark.parametrize("vocab, itemsize", [(61, 2), (65_536, 2), (65_537, 4)])
def test_shards_give_back_what_was_written(tmp_path, vocab, itemsize):
    made = [*runs.documents(), [vocab - 1]]
    index = write_shards(tmp_path, made, vocab, "x", shard_tokens=250)
    assert index.itemsize == itemsize and len(index.shards) > 3 and index.documents == len(made)
    tokens, flat = Tokens(tmp_path, verify=True), [t for d in made for t in d]
    ends = torch.tensor([len(d) for d in made]).cumsum(0).tolist()
    for start, count in ((0, len(flat)), (0, 1), (240, 30), (249, 2), (100, 500), (len(flat) - 3, 100)):
        assert tokens.read(start, count).tolist() == flat[start : start + count]
        stop = min(start + count, len(flat))
        assert tokens.ends(start, stop - start).tolist() == [e - start for e in ends if start < e <= stop]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_every_epoch_visits_everything_once(n):
    orders = [[Permutation(n, 3, epoch)[i] for i in range(n)] for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n > 16:
        assert orders[0] != orders[1] != sorted(orders[0])


def test_steps_run_on_across_epochs():
    order = Order(10, 4, seed=1)
    seen = [number for step in range(5) for number in order.of_step(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert Order(10, 4, seed=1).of_step(3) == seen[12:16]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_processes_share_a_step(world, micro):
    parts = [share(list(range(10)), rank, world, micro) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1 and {len(m) for part in parts for m in part} == {micro}
    assert [n for part in parts for m in part for n in m if n is not None] == list(range(10))


def test_sequences_cover_the_stream(tmp_path):
    made = runs.documents()
    write_shards(tmp_path, made, runs.VOCAB, "x", shard_tokens=250)
    sequences = Sequences(Tokens(tmp_path), 24)
    flat, inside = [t for d in made for t in d], sum(len(d) - 1 for d in made)
    batch = make_batch(sequences, list(range(len(sequences))))
    assert batch.tokens[: len(flat) - 1].tolist() == flat[:-1]
    counted = batch.labels != IGNORED
    assert counted.sum() == inside == count_labels(sequences, list(range(len(sequences))))
    assert all(flat[i + 1] == batch.labels[i] for i in counted.nonzero()[:, 0].tolist())
    cuts = set(batch.cu_seqlens.tolist())
    assert {sum(len(d) for d in made[:i]) for i in range(len(made))} <= cuts
    assert make_batch(sequences, [None]).labels.eq(IGNORED).all()


# ---- sources ----


def test_sources_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("plain – text")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": "  "}\n')
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["three", None, "four"]}), tmp_path / "c.parquet")
    expected = ["plain – text", "one", "two", "three", "four"]
    assert list(sources.documents([str(tmp_path)])) == expected
    assert list(sources.documents([str(tmp_path)], limit=3)) == expected[:3]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": 3}', "a.jsonl, line 1 has no text under 'text'.*text_key"),
        ("a.jsonl", '{"text": "x"}\n{"te', "line 2 is no JSON"),
        ("a.txt", b"\xff\xfe", "no UTF-8"),
        ("a.parquet", "no parquet", "no whole Parquet"),
        ("a.pdf", "x", "ends in .pdf"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(sources.documents([str(tmp_path / name)]))


def test_missing_sources(tmp_path):
    for source, message in ((tmp_path / "none", "does not exist"), (tmp_path, "has no file that ends in")):
        with pytest.raises(ValueError, match=message):
            list(sources.documents([str(source)]))


def test_text_is_tokenised_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=f"text number {i}")) + "\n" for i in range(50)))
    from mistral.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2_path())
    shape = runs.SHAPE | dict(vocab_size=tokenizer.vocab_size)
    made = runs.settings(tmp_path, data=[str(tmp_path / "a.jsonl")], eval_fraction=0.2, shape=shape)
    made.shards = str(tmp_path / "new")
    index = sources.prepare(made, tokenizer, progress=False)
    held = read_index(tmp_path / "new" / "eval")
    assert index.documents + held.documents == 50 and 2 < held.documents < 25
    before = (tmp_path / "new" / "train" / "index.json").stat().st_mtime_ns
    sources.prepare(made, tokenizer, progress=False)
    assert (tmp_path / "new" / "train" / "index.json").stat().st_mtime_ns == before
    first = Tokens(tmp_path / "new" / "train")
    text = tokenizer.decode(first.read(0, int(first.ends(0, 20)[0])).tolist())
    assert text.startswith("text number")
    (tmp_path / "a.jsonl").write_text('{"text": "another text"}\n{"text": "and more"}\n{"text": "third"}\n')
    assert sources.prepare(made, tokenizer, progress=False).documents < index.documents


# ---- torn and unfitting shards ----


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "index.json").unlink(), "no index.json.*cut off"),
        (lambda f: (f / "index.json").write_text('{"version": 9}'), "version 9"),
        (lambda f: (f / "index.json").write_text("{"), "no JSON"),
        (lambda f: (f / "shard-00001.tokens").unlink(), "is missing: a torn shard; remove"),
        (lambda f: cut(f / "shard-00000.tokens"), "bytes, not.*torn shard; remove"),
        (lambda f: cut(f / "shard-00000.ends"), "bytes, not.*torn shard; remove"),
        (lambda f: flip(f / "shard-00000.tokens"), "not what was written"),
        (lambda f: write_shards(f, [], runs.VOCAB, "test"), "holds no tokens.*empty"),
    ],
)
def test_torn_shards(tmp_path, damage, message):
    made = runs.settings(tmp_path)
    damage(tmp_path / "shards" / "train")
    with pytest.raises(ValueError, match=message):
        Trainer(made, World("cpu"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))


def test_a_vocabulary_that_does_not_match(tmp_path):
    with pytest.raises(ValueError, match=r"token ids up to 60.*vocabulary is 50.*another tokenizer; set tokenizer"):
        Trainer(runs.settings(tmp_path, shape=runs.SHAPE | dict(vocab_size=50)), World("cpu"))


# ---- settings ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(learning_rate=1), "'learning_rate', which is no setting"),
        (dict(warm_up=1), "did you mean warmup"),
        (dict(lr="fast"), "lr is 'fast'; it must be float"),
        (dict(lr=-1), "lr is -1.0; it must be positive"),
        (dict(seq_len=0), "seq_len is 0; it must be at least 1"),
        (dict(steps=1.5), "steps is 1.5; it must be int"),
        (dict(batch_tokens=100), "multiple of seq_len, 24: for example 96"),
        (dict(precision="int8"), "one of float32, bfloat16, float16"),
        (dict(window=0), "window is 0"),
        (dict(window="wide"), "window is 'wide'"),
        (dict(beta2=1.0), "beta2 is 1.0"),
        (dict(model="m"), "either model"),
        (dict(shape={}), "either model"),
        (dict(shape=dict(dim=8)), "shape: missing 6 required"),
        (dict(shape=runs.SHAPE | dict(heads=3)), "shape: .*unexpected.*heads"),
        (dict(preset="mistral-9b"), "preset is 'mistral-9b'; it must be one of mistral-7b-v0.1"),
        (dict(quantize="nf4"), "set lora_rank"),
        (dict(lora_rank=4), "LoRA adapts a checkpoint"),
        (dict(lora_targets=["q"]), "lora_targets has q"),
        (dict(data=["x"], synthetic=5), "take the place of data"),
        (dict(shards=None), "data is empty"),
        (dict(data=["x"]), "tokenizer is not set"),
        (dict(seq_len=72, batch_tokens=72, window=None), "context of 64 and no"),
        (dict(device="tpu"), "device is 'tpu'"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        made = runs.settings(tmp_path, **changes)
        Trainer(made, World(made.device))


def test_yaml_and_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: corpus/\nlr: 3e-4\nwindow: null\nbatch_tokens: 2048\nsave_every: 7\n")
    made = train.read_settings([str(path), "--save-every", "9", "--window", "64", "--no-mfu", "--data", "a", "b"])
    assert (made.model, made.lr, made.batch_tokens, made.save_every, made.window) == ("m", 3e-4, 2048, 9, 64)
    assert made.data == ["a", "b"] and made.mfu is False
    made = train.read_settings(["--shape", "dim=8", "tie_embeddings=true", "--shards", "s", "--window", "none"])
    assert made.shape == dict(dim=8, tie_embeddings=True) and made.window is None


@pytest.mark.parametrize(
    "text, message", [("- a\n", "must hold"), ("a: [", "is no YAML"), ("lrr: 1", "did you mean lr"), (None, "no file")]
)
def test_bad_yaml(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    assert train.main([str(path)]) == 2
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert "examples:" in shown and "torchrun" in shown and "--batch-tokens" in shown
