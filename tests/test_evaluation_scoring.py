"""Log-likelihoods with shared prefixes against each sequence alone; the tree; generation up to stop strings."""

import random

import eval_models
import pytest
import tiny
import torch

from mistral.evaluation.prefixes import SHARED, Node, packs, tree
from mistral.evaluation.scoring import Scorer
from mistral.evaluation.until import Request, generate_until
from mistral.generate import generate

pytestmark = pytest.mark.usefixtures("one_thread")


def pairs(seed=0):
    """Questions with choices behind a common beginning, some that share nothing, some that begin with others."""
    rng = random.Random(seed)

    def some(least, most):
        return [rng.randrange(97) for _ in range(rng.randint(least, most))]

    common, found = some(30, 30), []
    for _ in range(5):
        context = common + some(1, 25)
        found += [(context, some(0, 12)) for _ in range(4)]
        found += [(context, some(1, 1)) for _ in range(3)]
    found += [(some(1, 60), some(1, 3)) for _ in range(8)]
    found += [(common[:n], common[n:]) for n in (1, SHARED, 29)]
    rng.shuffle(found)
    return found


@torch.inference_mode()
def alone(net, context, target, kv_dtype=None):
    ids = torch.tensor(context + target)
    if kv_dtype is None:
        logits = net(ids[None])[0]
    else:
        logits = net(ids, cache=net.cache(1, len(ids), kv_dtype=kv_dtype), lengths=[len(ids)])
    logits = logits[len(context) - 1 : -1]
    scores = logits.double().log_softmax(-1).gather(1, ids[len(context) :, None])[:, 0]
    return scores, logits.argmax(-1).tolist() == target


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_equals_every_sequence_alone(window, rows):
    net = tiny.model(sliding_window=window)
    asked = pairs()
    scorer = Scorer(net, rows=rows)
    done = []
    scores = scorer(asked, done.append)
    assert sum(done) == sum(bool(target) for _, target in asked)
    for (context, target), got in zip(asked, scores, strict=True):
        wanted, greedy = alone(net, context, target)
        assert len(got.logprobs) == len(target)
        torch.testing.assert_close(torch.tensor(got.logprobs, dtype=torch.float64), wanted, atol=3e-5, rtol=0)
        assert got.greedy == greedy


@pytest.mark.parametrize("window", [None, 5])
def test_keys_and_values_in_codes(window):
    net = tiny.model(sliding_window=window)
    asked = pairs()
    differs = 0.0
    for (context, target), got in zip(asked, Scorer(net, torch.int8)(asked), strict=True):
        if target:
            mine = torch.tensor(got.logprobs, dtype=torch.float64)
            # A code may fall to the other side of a half where sums are taken in another order.
            torch.testing.assert_close(mine, alone(net, context, target, torch.int8)[0], atol=2e-2, rtol=0)
            differs = max(differs, (mine - alone(net, context, target)[0]).abs().max().item())
    assert differs > 5e-3


def test_greedy_continuations_are_told():
    net = tiny.model()
    prompts = [tiny.tokens(n, seed=n).tolist() for n in (3, 20)]
    made = generate(net, prompts, max_tokens=6).tokens
    assert [s.greedy for s in Scorer(net)(list(zip(prompts, made, strict=True)))] == [True, True]
    wrong = [[*m[:-1], (m[-1] + 1) % 97] for m in made]
    assert [s.greedy for s in Scorer(net)(list(zip(prompts, wrong, strict=True)))] == [False, False]


def test_what_repeats_runs_once():
    net = tiny.model()
    context = tiny.tokens(50).tolist()
    scorer = Scorer(net)
    scorer([(context, [i]) for i in range(9)] + [(context, [i, i, i]) for i in range(4)])
    assert scorer.tokens_run == 50 + 4 * 2
    again = Scorer(net)
    again([([*context, i], [1, 2]) for i in range(5)])
    assert again.tokens_run == 50 + 5 * 2
    # A long beginning runs once, however few rows of its length fit into a pass.
    for settings in (dict(cells=60), dict(rows=1)):
        small = Scorer(net, **settings)
        small([([*context, i], [1, 2]) for i in range(5)])
        assert small.tokens_run == 50 + 5 * 2


def test_the_tree_covers_everything():
    rng = random.Random(1)
    sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 30))] for _ in range(200)]
    sequences += [sequences[0] + [1] * n for n in range(0, 60, 7)]
    nodes = tree(sequences, sorted(range(len(sequences)), key=sequences.__getitem__))
    assert sorted(m for node in nodes for m in node.members) == list(range(len(sequences)))
    for node in nodes:
        check(node, sequences, 0)
    assert sum(bool(node.children) for node in nodes) >= 3


def test_packs_keep_their_limits():
    rng = random.Random(2)
    longest = [rng.randint(1, 50) for _ in range(100)]
    nodes = [Node(0, n, [i]) for i, n in enumerate(longest)]
    for rows, cells in ((1, 10), (7, 100), (64, 2000)):
        groups = packs(nodes, longest, rows, cells)
        assert sorted(i for group in groups for i in group) == list(range(100))
        for group in groups:
            assert len(group) <= rows
            assert len(group) == 1 or len(group) * max(longest[i] for i in group) <= cells


def check(node, sequences, start):
    """Every member has the node's tokens, children follow, and whoever goes on is in exactly one child."""
    assert node.start == start < node.end
    run = sequences[node.members[0]][: node.end]
    assert all(sequences[m][: node.end] == run for m in node.members)
    longer = [m for m in node.members if len(sequences[m]) > node.end]
    assert sorted(m for child in node.children for m in child.members) == sorted(longer)
    for child in node.children:
        check(child, sequences, node.end)


def test_a_fork_goes_on_like_its_row():
    net = tiny.model(sliding_window=9)
    ids = [tiny.tokens(n, seed=n) for n in (12, 5)]
    with torch.inference_mode():
        cache = net.cache(2, 40)
        net(torch.cat(ids), cache=cache, lengths=[12, 5])
        forked = cache.fork([1, 0, 1])
        new = tiny.tokens(3, seed=9)
        got = net(new, cache=forked)
        for row, of in enumerate([1, 0, 1]):
            wanted = net(torch.cat([ids[of], new[row : row + 1]])[None])[0, -1]
            torch.testing.assert_close(got[row], wanted, atol=2e-5, rtol=0)
    assert cache.held == [12, 5] and forked.held == [6, 13, 6]
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match="rows"):
            cache.fork(rows)


def test_says_what_is_wrong():
    net = tiny.model()
    with pytest.raises(ValueError, match="context of pair 1 is empty"):
        Scorer(net)([([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match="from 1 to 97; the vocabulary is 97"):
        Scorer(net)([([1], [97])])
    with pytest.raises(ValueError, match="257 positions"):
        Scorer(net)([([1] * 257, [2])])
    with pytest.raises(ValueError, match="rows is 0"):
        Scorer(net, rows=0)
    assert Scorer(net)([]) == []


# ---- stop strings ----


@pytest.fixture(scope="module")
def talker():
    tok = eval_models.tokenizer()
    return tiny.model(vocab_size=tok.vocab_size), tok


def test_texts_end_before_a_stop_string_wherever_tokens_meet(talker):
    net, tok = talker
    prompts = [tok.encode(text) for text in ("The value of", "import this\n", "x")]
    whole = [tok.decode(t) for t in generate(net, prompts, max_tokens=24).tokens]
    assert generate_until(net, tok, [Request(p, 24) for p in prompts], rows=2) == whole
    across = 0
    for prompt, text in zip(prompts, whole, strict=True):
        pieces = [tok.decode([t]) for t in tok.encode(text)]
        for at in range(1, min(len(text) - 3, 20)):
            stop = text[at : at + 3]
            if "\ufffd" in stop:
                continue
            across += stop not in pieces and not any(stop in piece for piece in pieces)
            got = generate_until(net, tok, [Request(prompt, 24, (stop, "never said"))])
            assert got == [text[: text.index(stop)]]
    assert across > 5


def test_sequences_take_the_rows_of_those_that_ended(talker):
    net, tok = talker
    requests = [Request(tok.encode("word " * n), 3 + n, ("e",)) for n in range(1, 8)]
    alone = [generate_until(net, tok, [r])[0] for r in requests]
    seen = {}
    assert generate_until(net, tok, requests, rows=2, on_done=seen.__setitem__) == alone
    assert [seen[i] for i in range(7)] == alone
    assert generate_until(net, tok, []) == []


def test_a_special_token_as_stop_string(talker):
    _, tok = talker
    ids = tok.encode("<|user|>")
    assert len(ids) == 1 and tok.decode(ids) == ""
    with torch.no_grad():
        loud = tiny.model(vocab_size=tok.vocab_size)
        prompt = tok.encode("say")
        third = generate(loud, [prompt], max_tokens=3).tokens[0]
        # The third token's row of the output becomes the special token's.
        loud.output.weight[ids[0]] = 1.01 * loud.output.weight[third[2]]
    got = generate(loud, [prompt], max_tokens=8).tokens[0]
    if ids[0] not in got:
        pytest.fail("the model was to say the special token")
    text = tok.decode(got[: got.index(ids[0])])
    assert generate_until(loud, tok, [Request(prompt, 8, ("<|user|>",))]) == [text]
    assert len(generate_until(loud, tok, [Request(prompt, 8)])[0]) >= len(text)
