"""The ring cache: what is kept where, constant memory, ragged batches, errors."""

import pytest
import tiny
import torch

import mistral_kernels
from mistral.cache import RingCache
from mistral_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = pytest.mark.parametrize("ops", [mistral_kernels, reference], ids=["fused", "reference"])


def feed(net, cache, chunks, seed=0):
    tokens = tiny.tokens(sum(chunks), seed=seed)
    with torch.inference_mode():
        return net(tokens, cache=cache, lengths=chunks)


@OPS
def test_worked_example(ops):
    """Chunks of 5, 7 and 2 behind 0, 1 and 3 tokens, with a window of 3: the tokens kept, and their slots."""
    net = tiny.model(ops, n_layers=1, sliding_window=3)
    cache = RingCache(net.config, 3, 100, torch.float32)
    feed(net, cache, [0, 1, 3])
    third = cache.k[0][2, 2].clone()
    plan = cache.begin([5, 7, 2], net.rope.cos, net.rope.sin, net.ops)
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 3, 4]
    assert plan.cu_seqlens.tolist() == [0, 5, 12, 14]
    assert plan.seq_lens.tolist() == [0, 1, 3]
    marks = torch.arange(1.0, 15)[:, None, None].expand(14, 2, 16).contiguous()
    with torch.inference_mode():
        plan.attend((cache.k[0], cache.v[0]), torch.ones(14, 6, 16), torch.ones(14, 2, 16), marks)
    cache.advance(plan)
    # Token 1 is the first of the packed chunks; the last of each chunk stay, at position % 3.
    assert cache.v[0][:2, :, 0, 0].tolist() == [[4, 5, 3], [11, 12, 10]]
    assert cache.v[0][2, :2, 0, 0].tolist() == [13, 14]
    assert torch.equal(cache.k[0][2, 2], third)
    assert cache.seq_lens.tolist() == cache.held == [5, 8, 5]


@OPS
@pytest.mark.parametrize("window", [3, 8, None])
def test_ragged_chunks_equal_the_sequences_alone(ops, window):
    """First chunks and later ones, idle rows and chunks longer than the ring in one batch."""
    net = tiny.model(ops, sliding_window=window)
    schedule = [[4, 0, 1], [3, 9, 1], [0, 1, 12], [1, 1, 1], [1, 0, 1], [13, 2, 0], [1, 1, 1]]
    cache = net.cache(3, 40)
    sequences, got = [[], [], []], [[], [], []]
    for step, chunks in enumerate(schedule):
        parts = [tiny.tokens(n, seed=10 * step + b) for b, n in enumerate(chunks)]
        with torch.inference_mode():
            out = net(torch.cat(parts), cache=cache, lengths=chunks).split(chunks)
        for b in range(3):
            sequences[b].append(parts[b])
            got[b].append(out[b])
    with torch.inference_mode():
        for b in range(3):
            truth = net(torch.cat(sequences[b])[None])[0]
            assert (torch.cat(got[b]) - truth).abs().max() < 1e-5 * truth.abs().max()


@OPS
@pytest.mark.parametrize("ring_chunk", [2, 5])
def test_a_ring_with_room_for_a_chunk_is_written_first(ops, ring_chunk):
    net = tiny.model(ops, sliding_window=4)
    sequences = [tiny.tokens(29), tiny.tokens(11, seed=1)]
    cache = net.cache(2, 29, ring_chunk)
    assert cache.slots == 4 + ring_chunk - 1
    assert cache.begin([ring_chunk, 1], net.rope.cos, net.rope.sin, net.ops).write_first
    assert not cache.begin([ring_chunk + 1, 1], net.rope.cos, net.rope.sin, net.ops).write_first
    with torch.inference_mode():
        for sequence, got in zip(sequences, tiny.through_cache(net, sequences, ring_chunk, ring_chunk), strict=True):
            truth = net(sequence[None])[0]
            assert (got - truth).abs().max() < 1e-5 * truth.abs().max()


def test_bytes_are_constant():
    net = tiny.model(sliding_window=8)
    cache = net.cache(2, 200)
    expected = 2 * 3 * (2 * 8 * 2 * 16) * 4  # k and v, layers, [B, slots, Hkv, D], float32
    storage = [t.data_ptr() for t in (*cache.k, *cache.v)]
    for _ in range(12):
        feed(net, cache, [5, 1])
        assert cache.nbytes == expected
    assert [t.data_ptr() for t in (*cache.k, *cache.v)] == storage
    assert cache.held == [60, 12]


def test_published_memory_of_mistral_7b():
    """32,768 tokens of Mistral 7B in bfloat16: 0.5 GiB with the window of 4096, 4 GiB without, eight times less."""
    from mistral.config import PRESETS

    config = PRESETS["mistral-7b-v0.1"]
    ring = RingCache(config, 1, 32_768, torch.bfloat16, "meta")
    full = RingCache(config.with_window(None), 1, 32_768, torch.bfloat16, "meta")
    assert (ring.nbytes, full.nbytes) == (2**29, 2**32)


def test_slots():
    windowed = tiny.model(sliding_window=8)
    caches = {longest: windowed.cache(1, longest) for longest in (100, 9, 8, 5)}
    assert {longest: (c.slots, c.window) for longest, c in caches.items()} == {
        100: (8, 8),
        9: (8, 8),
        8: (8, None),
        5: (5, None),
    }
    assert tiny.model().cache(1, 100).slots == 100


@OPS
def test_a_window_that_never_binds_is_the_causal_result(ops):
    windowed, causal = tiny.model(ops, sliding_window=30), tiny.model(ops)
    sequence = tiny.tokens(20)
    a, b = (tiny.through_cache(net, [sequence], 6)[0] for net in (windowed, causal))
    assert torch.equal(a, b)


def test_reset_rows_start_again():
    net = tiny.model(sliding_window=4)
    cache = net.cache(3, 30)
    feed(net, cache, [9, 5, 7])
    cache.reset([1])
    assert cache.seq_lens.tolist() == cache.held == [9, 0, 7]
    with torch.inference_mode():
        tokens = tiny.tokens(6, seed=5)
        got = net(tokens, cache=cache, lengths=[0, 6, 0])
        truth = net(tokens[None])[0]
    assert (got - truth).abs().max() < 1e-5 * truth.abs().max()
    cache.reset()
    assert cache.seq_lens.tolist() == cache.held == [0, 0, 0]


def test_a_sequence_that_outgrows_the_cache_raises_and_changes_nothing():
    net = tiny.model()
    cache = net.cache(2, 8)
    feed(net, cache, [8, 3])
    held = cache.k[0].clone()
    with pytest.raises(ValueError, match="sequence 0 would have 9 tokens, but the cache was made for 8"):
        feed(net, cache, [1, 1])
    assert cache.held == [8, 3] and torch.equal(cache.k[0], held)
    feed(net, cache, [0, 5])


def test_chunks_that_do_not_fit_raise():
    net = tiny.model(sliding_window=4, max_positions=16)
    cache = net.cache(2, 64)
    for chunks in ([1], [1, -1], [0, 0], [1, 1, 1]):
        with pytest.raises(ValueError, match="they must be 2, one a sequence"):
            cache.begin(chunks, net.rope.cos, net.rope.sin, net.ops)
    with pytest.raises(ValueError, match="tables hold 16"):
        cache.begin([17, 1], net.rope.cos, net.rope.sin, net.ops)
    for bad in (dict(batch=0), dict(max_seq_len=0), dict(chunk=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            RingCache(net.config, **(dict(batch=1, max_seq_len=4) | bad))
