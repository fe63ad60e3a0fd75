"""Generation: decoding equals teacher forcing, batches equal their sequences alone, sampling, streams, command line."""

import math

import pytest
import tiny
import torch

import mistral_kernels
from mistral import generate as generation
from mistral.generate import TextStream, generate, stream_text
from mistral.sampling import Sampler, invert, nucleus, token_logprobs
from mistral_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = pytest.mark.parametrize("ops", [mistral_kernels, reference], ids=["fused", "reference"])
PROMPTS = [tiny.tokens(n, seed=n).tolist() for n in (3, 14, 1, 8)]


def teacher_forced(net, prompt, tokens):
    with torch.inference_mode():
        logits = net(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        return token_logprobs(logits, torch.tensor(tokens)).tolist(), logits.argmax(-1).tolist()


@OPS
@pytest.mark.parametrize("window", [3, 8, None])
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_decoding_equals_teacher_forcing(ops, window, chunk_size):
    """A ragged batch that crosses the window: log-probabilities and choices as in one pass over everything."""
    net = tiny.model(ops, sliding_window=window)
    made = generate(net, PROMPTS, 20, chunk_size=chunk_size, logprobs=True)
    for prompt, tokens, logprobs in zip(PROMPTS, made.tokens, made.logprobs, strict=True):
        forced, greedy = teacher_forced(net, prompt, tokens)
        assert tokens == greedy
        assert max(abs(a - b) for a, b in zip(logprobs, forced, strict=True)) <= 1e-4
    assert (made.prefill_tokens, made.decode_tokens) == (26, 76)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_every_implementation_decodes_the_same(impl):
    if (reason := mistral_kernels.backends()[impl]) is not None:
        pytest.skip(reason)
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    nets = [tiny.model(mistral_kernels.using(impl=i), n_layers=1, sliding_window=8) for i in (impl, "reference")]
    runs = [generate(net.to(device), PROMPTS[:2], 6, chunk_size=5, logprobs=True) for net in nets]
    assert runs[0].tokens == runs[1].tokens
    for fast, eager in zip(runs[0].logprobs, runs[1].logprobs, strict=True):
        assert fast == pytest.approx(eager, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("window", [8, None])
def test_a_gpu_generates_what_a_cpu_does(window, how):
    net = tiny.model(sliding_window=window)
    cpu = generate(net, PROMPTS, 12, chunk_size=5, logprobs=True, **how)
    gpu = generate(net.to("cuda"), PROMPTS, 12, chunk_size=5, logprobs=True, **how)
    assert gpu.tokens == cpu.tokens
    for fast, eager in zip(gpu.logprobs, cpu.logprobs, strict=True):
        assert fast == pytest.approx(eager, abs=1e-3)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.3, "top_p": 0.8, "seed": 5}])
def test_a_batch_equals_its_sequences_alone(how):
    # In float64, so that no draw can fall between two roundings of the same probability.
    net = tiny.model(dtype=torch.float64, sliding_window=8)
    together = generate(net, PROMPTS, 12, logprobs=True, **how)
    for i, prompt in enumerate(PROMPTS):
        seed = {"seed": how["seed"] + i} if how else {}
        alone = generate(net, [prompt], 12, logprobs=True, **how | seed)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[i], abs=1e-4)


def test_stop_tokens_end_a_sequence_and_the_others_go_on():
    net = tiny.model(sliding_window=8)
    free = generate(net, PROMPTS, 15).tokens
    stop = free[1][4]
    made = generate(net, PROMPTS, 15, stop_ids=[stop])
    for tokens, unstopped in zip(made.tokens, free, strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else 15
        assert tokens == unstopped[:end]
    assert len({len(t) for t in made.tokens}) > 1, "no sequence left before another"


def test_tokens_are_reported_as_they_come():
    seen = []
    made = generate(tiny.model(), PROMPTS, 4, on_token=lambda row, token: seen.append((row, token)))
    for row, tokens in enumerate(made.tokens):
        assert [t for r, t in seen if r == row] == tokens
    assert [r for r, _ in seen] == [*range(4)] * 4


def test_a_finished_sequence_costs_nothing(monkeypatch):
    net = tiny.model()
    stop = generate(net, PROMPTS[:1], 1).tokens[0][0]
    fed = []
    whole = type(net).hidden

    def counted(self, tokens, **how):
        fed.append(tokens.shape[0])
        return whole(self, tokens, **how)

    monkeypatch.setattr(type(net), "forward", lambda self, tokens, **how: self.logits(counted(self, tokens, **how)))
    made = generate(net, PROMPTS[:2], 9, stop_ids=[stop])
    assert len(made.tokens[0]) == 1 and sum(fed) == len(made.tokens[1]) - 1


def test_one_token_needs_no_decoding():
    made = generate(tiny.model(), PROMPTS, 1)
    assert [len(t) for t in made.tokens] == [1] * 4 and made.decode_tokens == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    made = generate(tiny.model(dtype=dtype, sliding_window=4), PROMPTS, 6, logprobs=True)
    assert all(math.isfinite(p) for row in made.logprobs for p in row)


def test_past_the_context_with_a_window():
    net = tiny.model(sliding_window=4, max_positions=16)
    long = tiny.model(sliding_window=4, max_positions=64)
    assert generate(net, PROMPTS, 30).tokens == generate(long, PROMPTS, 30).tokens


def test_requests_that_cannot_be_raise():
    net = tiny.model(max_positions=16)
    for bad, message in (
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[]), "0 prompts"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(chunk_size=0), "chunk_size 0"),
        (dict(prompts=[[97]]), "the vocabulary is 97"),
        (dict(prompts=[[-1]]), "the vocabulary is 97"),
        (dict(prompts=[[1] * 17]), "context of 16"),
        (dict(prompts=[[1] * 12], max_tokens=6), "together 17 positions"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(seed=[1, 2]), "2 entries for 1 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(net, **(dict(prompts=[[1, 2]], max_tokens=2) | bad))
    assert len(generate(net, [[1] * 12], 5).tokens[0]) == 5


# ---- sampling ----


def test_seeds_reproduce_and_differ():
    net = tiny.model()
    runs = [generate(net, PROMPTS, 12, temperature=1.0, seed=s).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    same = generate(net, [PROMPTS[0]] * 2, 12, temperature=1.0, seed=1).tokens
    assert same[0] != same[1], "equal prompts drew equal numbers"
    assert generate(net, [PROMPTS[0]] * 2, 12, temperature=1.0, seed=[4, 4]).tokens == [
        *generate(net, [PROMPTS[0]], 12, temperature=1.0, seed=4).tokens * 2
    ]


def test_temperature_zero_is_argmax():
    logits = torch.randn(5, 33)
    assert torch.equal(Sampler(5)(logits, range(5)), logits.argmax(-1))
    assert Sampler(1)(torch.tensor([[1.0, 3.0, 3.0]]), [0]).tolist() == [1]


def test_tiny_top_p_is_argmax():
    logits = torch.randn(5, 33)
    assert torch.equal(Sampler(5, 1.0, 1e-9, seed=0)(logits, range(5)), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.75, 0.9, 0.999])
def test_nucleus_is_the_smallest_prefix(top_p):
    probabilities = torch.softmax(2 * torch.randn(6, 200, generator=torch.Generator().manual_seed(3)), -1)
    kept = nucleus(probabilities, top_p)
    for row in range(6):
        ordered, order = probabilities[row].double().sort(descending=True)
        size = int((ordered.cumsum(0) < top_p).sum()) + 1
        expected = torch.zeros(200).index_copy_(0, order[:size], probabilities[row, order[:size]])
        assert torch.equal(kept[row], expected)


def test_nucleus_of_equals():
    """A uniform distribution of four: a half takes exactly two, a little more takes three."""
    uniform = torch.full((1, 4), 0.25)
    assert [int((nucleus(uniform, p) > 0).sum()) for p in (0.25, 0.5, 0.51, 0.75, 0.76)] == [1, 2, 3, 3, 4]


def test_inversion_at_its_ends():
    weights = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]])
    almost = 1 - 2.0**-53
    draws = {0.0: 1, 0.2499: 1, 0.25: 2, 0.7499: 2, 0.75: 4, almost: 4, 1.0: 4}
    for uniform, index in draws.items():
        assert invert(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [index]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_frequencies_are_the_probabilities(top_p):
    logits, n = torch.tensor([[0.1, 1.5, -1.0, 0.9, -3.0]]), 4000
    sampler = Sampler(1, temperature=0.7, top_p=top_p, seed=0)
    counts = torch.zeros(5)
    for _ in range(n):
        counts[sampler(logits, [0])] += 1
    p = torch.softmax(logits[0] / 0.7, -1)
    if top_p < 1:
        p = torch.where(p >= p.sort(descending=True).values[1], p, 0)
    p = p / p.sum()
    assert torch.equal(counts > 0, p > 0) or top_p == 1
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


# ---- text ----


class Bytes:
    """A tokenizer of single bytes whose decode, as sentencepiece's, drops a leading space."""

    stop_ids = (0,)
    bos_id = 1

    def encode(self, text, bos=True):
        return [self.bos_id] * bos + list(text.encode())

    def encode_chat(self, messages):
        return self.encode("".join(f"[{m['role']}]{m['content']}" for m in messages))

    def decode(self, ids):
        text = bytes(i for i in ids if i > 1).decode("utf-8", errors="replace")
        return text.removeprefix(" ")


def test_streamed_text_is_whole():
    text = "Größe: 10 €, 日本語 — 👩‍🚀 and a long tail of plain words."
    ids = list(text.encode())
    pieces = list(stream_text(Bytes(), ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "👩" in pieces and "ö" in pieces
    assert len(pieces) == len(text)


def test_streamed_text_keeps_the_space_behind_its_context():
    stream = TextStream(Bytes(), context=[1, *b"Hello"])
    assert [stream.put(i) for i in b" you"] == [" ", "y", "o", "u"]
    assert next(stream_text(Bytes(), b" you"), "") == "y"


def test_streamed_text_shows_what_never_became_whole():
    stream = TextStream(Bytes())
    assert [stream.put(i) for i in b"a\xe2\x82"] == ["a", "", ""]
    assert stream.end() == "\ufffd"
    assert stream.end() == ""


# ---- command line ----


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """A stand-in for weights and tokenizer; returns the path and how load_model was called."""
    import sys
    import types

    called = {}

    def load_model(path, **how):
        called.update(how, path=path)
        return tiny.model(how["ops"], how["dtype"], vocab_size=256, sliding_window=8).to(how["device"])

    weights = types.SimpleNamespace(load_model=load_model)
    tokenizer = types.SimpleNamespace(load_tokenizer=lambda path: Bytes())
    monkeypatch.setitem(sys.modules, "mistral.weights", weights)
    monkeypatch.setitem(sys.modules, "mistral.tokenizer", tokenizer)
    return tmp_path, called


def test_command_line(checkpoint, capsys):
    path, called = checkpoint
    common = ["--model", str(path), "--prompt", "Hi", "--dtype", "float32", "--device", "cpu", "--max-tokens", "6"]
    assert generation.main([*common, "--window", "4", "--ops", "reference"]) == 0
    out, err = capsys.readouterr()
    made = generate(tiny.model(vocab_size=256, sliding_window=8), [Bytes().encode("Hi")], 6, stop_ids=[0]).tokens[0]
    shown = [t for t in made if t != 0]
    assert out == "".join(stream_text(Bytes(), shown, Bytes().encode("Hi"))) + "\n"
    assert "prefill: 3 tokens" in err and f"decode:  {len(made) - 1} tokens" in err and "tokens/s" in err
    assert called["window"] == 4 and called["ops"] is reference and called["dtype"] == torch.float32
    assert generation.main([*common, "--chat", "--window", "none", "--temperature", "1", "--seed", "3"]) == 0
    assert called["window"] is None and called["ops"] is mistral_kernels


def test_command_line_reads_a_file(checkpoint, capsys, tmp_path):
    path, _ = checkpoint
    file = tmp_path / "prompt.txt"
    file.write_text("Größe", encoding="utf-8")
    arguments = ["--model", str(path), "--prompt-file", str(file), "--max-tokens", "2", "--device", "cpu"]
    assert generation.main(arguments) == 0
    assert f"prefill: {1 + len('Größe'.encode())} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere", "--prompt", "x"], "no such file or folder"),
        (["--model", ".", "--prompt", "  "], "the prompt is empty"),
        (["--model", ".", "--prompt-file", "/nowhere/x"], "/nowhere/x"),
        (["--model", ".", "--prompt", "x", "--top-p", "2"], "top_p is 2.0"),
    ],
)
def test_command_line_errors(checkpoint, capsys, arguments, message):
    assert generation.main([*arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and out == ""


@pytest.mark.parametrize("window", ["0", "-3", "wide"])
def test_command_line_window(checkpoint, capsys, window):
    with pytest.raises(SystemExit):
        generation.main(["--model", ".", "--prompt", "x", f"--window={window}"])
    assert "it must be 'config', 'none' or a number" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        generation.main(["--help"])
    assert "python -m mistral.generate --model" in capsys.readouterr().out
