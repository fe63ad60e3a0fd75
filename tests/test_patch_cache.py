"""The ring cache under transformers' generate, and decoding under torch.compile."""

import pytest
import torch
from test_patch import make, padding, tokens

from mistral_kernels.patch import RingCache, patch
from mistral_kernels.patch.ring import RingLayer

transformers = pytest.importorskip("transformers", minversion="5.20")
pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, disable_compile=True)


@pytest.mark.parametrize("window", [1, 2, 8, 20, 21, 22, 44, 100])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_generate(window, kind):
    """Against no cache at all: transformers' own of a window of 1 keeps every key."""
    model, ids = make(sliding_window=window), tokens()
    more = dict(OPTIONS, attention_mask=padding(kind), output_logits=True, return_dict_in_generate=True)
    expected = model.generate(ids, use_cache=False, **more)
    patch(model)
    found = model.generate(ids, past_key_values=RingCache(model.config, 46), **more)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=5e-6, rtol=5e-5)


@pytest.mark.parametrize("family", ["ministral", "qwen2", "llama"])
def test_layers_of_two_kinds(family):
    model, ids = make(family), tokens()
    expected = model.generate(ids, **OPTIONS)
    patch(model)
    cache = RingCache(model.config, 46)
    assert torch.equal(model.generate(ids, past_key_values=cache, **OPTIONS), expected)
    rings = [isinstance(layer, RingLayer) for layer in cache.layers]
    assert rings == [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or [""] * 2]


@pytest.mark.parametrize("chunk", [1, 3, 8, 9])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_chunks(chunk, kind):
    """A prompt in pieces, shorter and longer than the window, leaves what the whole prompt leaves."""
    model, ids, mask = make(), tokens(), padding(kind)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        patch(model)
        cache, pieces = RingCache(model.config, 40), []
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
        for start in range(0, 21, chunk):
            end = min(start + chunk, 21)
            given = dict(attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache)
            pieces.append(model(ids[:, start:end], **given).logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()], atol=5e-6, rtol=5e-5)


def test_beams_and_second_use():
    model, ids = make(), tokens()
    more = dict(OPTIONS, num_beams=3)
    expected = model.generate(ids, **more)
    patch(model)
    cache = RingCache(model.config, 46)
    assert torch.equal(model.generate(ids, past_key_values=cache, **more), expected)
    cache = RingCache(model.config, 46)
    first = model.generate(ids, past_key_values=cache, **OPTIONS)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **OPTIONS), first)


def test_nothing_moves():
    """A token changes its own slot and no other, in memory that stays where it is."""
    layer, generator = RingLayer(64, 4), torch.Generator().manual_seed(0)
    seen = []
    for position in range(11):
        k, v = (torch.randn(2, 3, 1, 8, generator=generator) for _ in range(2))
        before = layer.keys.clone() if position else torch.zeros(2, 3, 4, 8)
        keys, _ = layer.update(k, v)
        seen.append(keys.data_ptr())
        changed = (keys != before).any(-1).any(0).any(0)
        assert changed.nonzero().flatten().tolist() == [position % 4]
        assert torch.equal(keys[:, :, position % 4], k[:, :, 0])
    assert len(set(seen)) == 1


def test_errors():
    model = make()
    with pytest.raises(ValueError, match="RingCache needs 'mistral_kernels'"):
        RingCache(model.config, 10)
    patch(model)
    with pytest.raises(ValueError, match="max_cache_len is 0"):
        RingCache(model.config, 0)
    with pytest.raises(NotImplementedError, match="assisted"):
        RingCache(model.config, 10).crop(-1)


@pytest.mark.slow
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_compiled_decoding(ring, kind):
    """Static shapes and a compiled forward: what generate does by itself on a GPU."""
    model, ids = make(), tokens()
    more = dict(OPTIONS, attention_mask=padding(kind))
    expected = model.generate(ids, **more)
    patch(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    cache = RingCache(model.config, 46) if ring else transformers.StaticCache(model.config, 46)
    assert torch.equal(model.generate(ids, past_key_values=cache, **more), expected)
