"""The decoding step as a CUDA graph."""

import sys

import pytest
import tiny
import torch

from mistral.graphed import GraphedStep


def test_a_model_on_a_cpu_is_refused():
    net = tiny.model(sliding_window=8)
    with pytest.raises(ValueError, match="a CUDA graph needs it on a CUDA device"):
        GraphedStep(net, net.cache(1, 20))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
def test_a_graph_decodes_what_the_model_does(kv_dtype, monkeypatch):
    """Across the window's end, with a prompt fed between two replays. Both take the linear layers that a graph takes:
    codes of keys and values turn a difference of rounding into one of a step."""
    linear = sys.modules["mistral_kernels.linear"]
    monkeypatch.setattr(linear, "_kernel_pays", lambda kind, x: x.numel() <= linear.FEW_ROWS[kind] * x.shape[-1])
    net = tiny.model(sliding_window=8).to("cuda")
    caches = [net.cache(2, 60, kv_dtype=kv_dtype) for _ in range(2)]
    prompt = tiny.tokens(9).to("cuda")
    with torch.inference_mode():
        for cache in caches:
            net(prompt, cache=cache, lengths=[5, 4])
        step = GraphedStep(net, caches[0])
        for turn in range(20):
            tokens = tiny.tokens(2, seed=turn).to("cuda")
            torch.testing.assert_close(step(tokens), net(tokens, cache=caches[1]), rtol=1e-4, atol=1e-4)
            assert caches[0].held == caches[1].held
            if turn == 9:
                for cache in caches:
                    net(prompt[:3], cache=cache, lengths=[0, 3])
