"""Sequences that enter and leave while others decode: each equals its solo run, and rows never leak."""

import random

import pytest
import tiny
import torch

import mistral_kernels
from mistral.generate import generate
from mistral.session import Session
from mistral_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("window,kv_dtype", [(8, None), (None, None), (8, torch.int8)], ids=str)
def test_two_thousand_steps_of_coming_and_going(window, kv_dtype):
    """Released rows are poisoned, so that reading another sequence's keys would give NaN. In float64: the last bit of
    a matrix product depends on the batch, and would tip one draw or one code in a million, and that a token."""
    net = tiny.model(n_layers=1, sliding_window=window, dtype=torch.float64)
    session = Session(net, 5, 60, chunk_size=7, kv_dtype=kv_dtype, poison=True)
    chance, running, finished = random.Random(0), {}, []
    for step in range(2000):
        while session.cache.free and chance.random() < 0.4:
            prompt = tiny.tokens(chance.randint(1, 30), seed=chance.randint(0, 10**6)).tolist()
            count, warm = chance.randint(1, 30), chance.random() < 0.5
            how = dict(temperature=0.9 if warm else 0.0, seed=step)
            running[session.add(prompt, count, **how)] = (prompt, count, how, [])
        for row, token in session.step().items():
            running[row][-1].append(token)
        for row in [r for r in running if r not in session.rows]:
            finished.append(running.pop(row))
        if running and chance.random() < 0.03:
            row = chance.choice(sorted(running))
            session.remove(row)
            prompt, _, how, tokens = running.pop(row)
            if tokens:
                finished.append((prompt, len(tokens), how, tokens))
    assert len(finished) > 400
    for prompt, count, how, tokens in finished:
        alone = generate(net, [prompt], count, chunk_size=7, kv_dtype=kv_dtype, **how).tokens[0]
        assert tokens == alone, (prompt, how)


def test_rows_run_out():
    session = Session(tiny.model(sliding_window=8), 2, 20)
    rows = [session.add([1, 2], 3) for _ in range(2)]
    with pytest.raises(RuntimeError, match="all 2 rows of the cache are taken"):
        session.add([1], 1)
    session.remove(rows[0])
    assert session.add([5], 1) == rows[0]
    with pytest.raises(ValueError, match="no sequence runs in row 7"):
        session.remove(7)


def test_a_refused_prompt_takes_no_row():
    session = Session(tiny.model(), 1, 8)
    for prompt, count in (([], 1), ([97], 1), ([1] * 8, 2), ([1], 0)):
        with pytest.raises(ValueError):
            session.add(prompt, count)
    with pytest.raises(ValueError, match="temperature"):
        session.add([1], 1, temperature=-1)
    assert session.cache.free == 1 and session.step() == {}


def test_a_row_that_is_not_taken_takes_no_tokens():
    net = tiny.model(sliding_window=4)
    cache = net.cache(2, 20)
    row = cache.acquire()
    with torch.inference_mode(), pytest.raises(ValueError, match="row 1 gets 1 tokens but is not taken"):
        net(torch.tensor([1, 2]), cache=cache)
    with torch.inference_mode():
        net(torch.tensor([1]), cache=cache, lengths=[1, 0])
    cache.release(row)
    with pytest.raises(ValueError, match="row 0 is not taken"):
        cache.release(row)


@pytest.mark.parametrize("ops", [mistral_kernels, reference], ids=["fused", "reference"])
def test_a_leak_would_show(ops):
    """The poison is there: a row whose count is forged reads NaN."""
    net = tiny.model(ops, n_layers=1, sliding_window=8)
    session = Session(net, 2, 30, poison=True)
    kept, gone = session.add([1, 2, 3], 20), session.add([4, 5, 6], 20)
    session.step()
    session.remove(gone)
    assert session.step()[kept] >= 0
    cache = session.cache
    assert cache.k[0][gone].isnan().all() and not cache.k[0][kept].isnan().any()
    cache.held[kept], cache.held[gone] = 3, 3
    cache.seq_lens = torch.tensor([3, 3], dtype=torch.int32)
    cache._taken = [True, True]
    with torch.inference_mode():
        logits = net(torch.tensor([1, 1]), cache=cache)
    assert logits[gone].isnan().all() and logits[kept].isfinite().all()
