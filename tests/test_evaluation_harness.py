"""The harness's model class against the harness's own for Hugging Face models, and `lm_eval --model mistral`."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import eval_models
import pytest
import tiny
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'mistral-kernels[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from mistral.evaluation.harness import MistralLM  # noqa: E402
from mistral.samples import long_text  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


def asked(kind, *args):
    return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return eval_models.folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def ours(folder):
    return MistralLM(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


SHOTS = "\n\n".join(long_text()[i : i + 90] for i in (0, 500))
PAIRS = [(SHOTS + f"\n\nWhat is {q}? Answer:", a) for q in ("a name", "2 + 2") for a in (" x", " value", " 4 or 5")]
PAIRS += [
    ("", "An empty context"),
    ("A context that ends in spaces  ", "and goes on"),
    ("<s>Begins with it", " and goes on"),
    ("Übung macht den", " Meister — 練習"),
    ("word " * 200, "is longer than the model"),
]


@pytest.mark.filterwarnings("ignore:.* contexts lose")
@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_every_log_likelihood_is_that_of_the_harness(folder, theirs, batch_size):
    mine = MistralLM(str(folder), dtype="float32", batch_size=batch_size)
    wanted = theirs.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    got = mine.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for pair, (a, same), (b, as_well) in zip(PAIRS, got, wanted, strict=True):
        assert a == pytest.approx(b, abs=1e-3), pair
        assert same == as_well


def test_rolling_likelihood_is_that_of_the_harness(ours, theirs):
    texts = [(long_text()[:1500],), ("short",), ("",), (long_text()[2000:2300],)]
    wanted = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    got = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, abs=1e-3)
    assert got[2] == 0


@pytest.mark.parametrize("until", [["\n"], ["e"], [], ["ab", " "]])
def test_generated_texts_are_those_of_the_harness(ours, theirs, until):
    settings = {"until": until, "max_gen_toks": 20, "do_sample": False}
    contexts = ("The value of", "import " * 60, "x")  # the second loses its beginning
    wanted = theirs.generate_until(asked("generate_until", *((c, dict(settings)) for c in contexts)), disable_tqdm=True)
    got = ours.generate_until(asked("generate_until", *((c, dict(settings)) for c in contexts)), disable_tqdm=True)
    assert got == wanted


def test_conversations_are_those_of_the_harness(ours, theirs):
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    assert ours.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    text = ours.apply_chat_template(chat[:1])
    assert ours.tok_encode(text) == theirs.tok_encode(text)


@pytest.mark.parametrize("name", ["tekken_240911.json", "mistral_instruct_tokenizer_241114.model.v7"])
def test_conversations_of_mistrals_own_tokenizers(name):
    common = pytest.importorskip("mistral_common")
    from mistral.tokenizer import load_tokenizer

    tok = load_tokenizer(Path(common.__file__).parent / "data" / name)
    lm = MistralLM(tiny.model(vocab_size=tok.vocab_size), tok)
    chat = [{"role": "user", "content": "Hello, world!\n 1 + 1?"}]
    plain = lm.tok_encode("[INST] is plain text")
    text = lm.apply_chat_template(chat)
    assert lm.tok_encode(text) == tok.encode_chat(chat)
    assert lm.tok_encode(text + " Yes")[: len(tok.encode_chat(chat))] == tok.encode_chat(chat)
    assert plain == tok.encode("[INST] is plain text")
    with pytest.raises(NotImplementedError, match="leave no message open"):
        lm.apply_chat_template([*chat, {"role": "assistant", "content": "The"}], False)


# ---- edges ----


def test_an_empty_continuation_is_certain(ours):
    found = ours.loglikelihood(asked("loglikelihood", ("a context", ""), ("", "")), disable_tqdm=True)
    assert found == [(0.0, True), (0.0, True)]


def test_a_context_of_spaces_stands_behind_the_prefix(ours):
    spaced, plain = ours.loglikelihood(asked("loglikelihood", ("  ", "word"), ("", "  word")), disable_tqdm=True)
    assert spaced == plain and plain[0] < 0


def test_a_context_longer_than_the_model_loses_its_beginning(folder, ours):
    long = "word " * 300
    with pytest.warns(UserWarning, match="1 of 1 contexts lose their beginning"):
        cut = ours.loglikelihood(asked("loglikelihood", (long + "one", " two")), disable_tqdm=True)
    ids = ours.tok_encode(long + "one two")
    after = len(ids) - len(ours.tok_encode(long + "one"))
    kept = ids[-97:]
    assert cut[0][0] == pytest.approx(ours.scorer([(kept[:-after], kept[-after:])])[0].total, abs=1e-4)
    short = MistralLM(str(folder), dtype="float32", max_length=8)
    with pytest.raises(ValueError, match="sees 8 at most"):
        short.loglikelihood(asked("loglikelihood", ("a", " word" * 20)))


def test_generation_needs_room(ours):
    with pytest.raises(ValueError, match="max_gen_toks is 96; it must"):
        ours.generate_until(asked("generate_until", ("x", {"until": [], "max_gen_toks": 96})))
    with pytest.raises(ValueError, match="top_k is not supported"):
        settings = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "top_k": 5}
        ours.generate_until(asked("generate_until", ("x", settings)))
    with pytest.raises(TypeError, match="must be a dict"):
        ours.generate_until(asked("generate_until", ("x", ["\n"])))


def test_a_continuation_that_joins_the_context_is_named(ours):
    whole = next(t for t in ("the", "re", "in", "on") if len(ours.tok_encode(t)) == 1)
    with pytest.raises(ValueError, match="adds no token of its own"):
        ours.loglikelihood(asked("loglikelihood", (whole[0], whole[1:])))


@pytest.mark.filterwarnings("ignore:.* contexts lose")
def test_window_codes_and_ops_reach_the_model(folder):
    seen = {}
    for settings in ({}, {"window": 8}, {"kv": "int8"}, {"ops": "reference"}, {"window": "8", "ops": "cpu"}):
        lm = MistralLM(str(folder), dtype="float32", **settings)
        seen[str(settings)] = lm.loglikelihood(asked("loglikelihood", *PAIRS[:1]), disable_tqdm=True)[0][0]
    plain, windowed, codes, reference, again = seen.values()
    assert reference == pytest.approx(plain, abs=1e-4)
    assert again == pytest.approx(windowed, abs=1e-4)
    assert abs(windowed - plain) > 1e-2 and abs(codes - plain) > 1e-4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ops": "quick"}, "ops is 'quick'"),
        ({"window": "0"}, "window is '0'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"kv": "int3"}, "kv is 'int3'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 97}, "max_length is 97"),
        ({"prefix_token_id": 10**6}, "prefix_token_id is 1000000"),
        ({"adapter": "nowhere"}, "holds no adapter"),
    ],
)
def test_arguments_are_checked(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        MistralLM(str(folder), **settings)


def test_a_model_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        MistralLM("models/none")
    with pytest.raises(TypeError, match="needs its Tokenizer"):
        MistralLM(tiny.model())


@pytest.mark.filterwarnings("ignore:.* contexts lose")
def test_half_precision_scores_in_float32(folder):
    lm = MistralLM(str(folder), dtype="bfloat16")
    assert lm.model.dtype == torch.bfloat16
    full = MistralLM(str(folder), dtype="float32")
    a, b = (m.loglikelihood(asked("loglikelihood", *PAIRS[:4]), disable_tqdm=True) for m in (lm, full))
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], rel=0.05)
    assert all(round(x * 256) != x * 256 for x, _ in a)


# ---- the command ----

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder for sys.path with this checkout's entry points, whatever was installed before."""
    path = tmp_path_factory.mktemp("installed")
    about = path / "mistral_kernels-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mistral-kernels\nVersion: 0\n")
    lines = (ROOT / "pyproject.toml").read_text().split('[project.entry-points."torch.backends"]\n')[1]
    name, value = lines.partition("\n")[0].split(" = ")
    (about / "entry_points.txt").write_text(f"[torch.backends]\n{name} = {json.loads(value)}\n")
    assert [e.name for e in importlib.metadata.distributions(path=[str(path)]).__next__().entry_points] == [name]
    return path


def environment(installed):
    return os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, (installed, ROOT / "kernels", ROOT))),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )


def test_lm_eval_finds_the_model(folder, installed, tmp_path):
    rows = [dict(question=f"Is it {i}?", choices=["yes", "no", "it is"], answer=i % 3) for i in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    command = ["-m", "lm_eval", "--model", "mistral", "--tasks", "tiny_choice", "--include_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={folder},dtype=float32,window=16", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(installed),
        cwd=tmp_path,  # metadata of an earlier build beside the sources would come first
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert 0 <= found["results"]["tiny_choice"]["acc,none"] <= 1
    assert found["config"]["model"] == "mistral" and found["config"]["model_window"] == 16


def test_importing_torch_imports_no_more_than_before(installed, tmp_path):
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment(installed), cwd=tmp_path)
    code = "import sys, torch; print([m for m in ('mistral', 'mistral_kernels', 'lm_eval') if m in sys.modules])"
    done = run([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr
    code = "import lm_eval, torch; from lm_eval.api.registry import get_model; print(get_model('mistral').__name__)"
    done = run([sys.executable, "-c", code])
    assert done.stdout.strip() == "MistralLM", done.stderr
