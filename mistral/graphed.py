"""A decoding step as one CUDA graph: a single launch from the host, whatever the number of layers."""

import torch

from .cache import RingCache
from .model import Transformer


class GraphedStep:
    """Replays `model(tokens, cache=cache)` for one token of every sequence of a cache.

        step = GraphedStep(model, cache)      # after the prompts were fed
        logits = step(tokens)                 # [B, V]; overwritten by the next call

    Between steps the cache may be fed in other ways (a new prompt, a reset): the graph reads its counts when replayed.
    Capturing runs the step a few times; what that writes lies in slots that the next step writes again.

    Args:
        model: on a CUDA device, its weights staying where they are.
        cache: made by `model.cache`; every one of its sequences takes part in each step.

    Raises:
        ValueError: a model that is not on a CUDA device.
    """

    def __init__(self, model: Transformer, cache: RingCache):
        if model.device.type != "cuda":
            raise ValueError(f"the model is on {model.device}; a CUDA graph needs it on a CUDA device")
        self.model, self.cache = model, cache
        self._tokens = torch.zeros(cache.batch, dtype=torch.int64, device=model.device)
        self._lens = cache.seq_lens.clone()
        before, held = cache.seq_lens.clone(), list(cache.held)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                self._restore(before, held)
                self._run()
            self._restore(before, held)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._logits = self._run()
        self._restore(before, held)

    def _restore(self, lens: torch.Tensor, held: list[int]) -> None:
        self._lens.copy_(lens)
        self.cache.seq_lens, self.cache.held = self._lens, list(held)

    def _run(self) -> torch.Tensor:
        logits = self.model(self._tokens, cache=self.cache)
        self._lens.copy_(self.cache.seq_lens)
        self.cache.seq_lens = self._lens
        return logits

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[B, V]` after `tokens` `[B]`.

        Raises:
            ValueError: as the model and the cache raise it.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"tokens is {list(tokens.shape)}; it must be [{self.cache.batch}], one a sequence")
        self.cache.check([1] * self.cache.batch, self.model.rope.cos.shape[0])
        if self.cache.seq_lens is not self._lens:
            self._restore(self.cache.seq_lens, self.cache.held)
        self._tokens.copy_(tokens)
        self._graph.replay()
        self.cache.held = [n + 1 for n in self.cache.held]
        return self._logits
