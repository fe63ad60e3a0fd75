"""llama.cpp by its Python bindings: files in its types, and a model timed call by call in turn with ours."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """llama.cpp writes to the process's own streams."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def files_by_llama_cpp(source: Path, folder: Path, types: Sequence[str]) -> tuple[dict[str, Path], str | None]:
    """GGUF files in types that llama.cpp quantises to, the embedding of 4 and 8 bits in Q8_0; or why there are none."""
    if source.suffix != ".gguf":
        return {}, f"needs a .gguf file, not {source.name}"
    try:
        import llama_cpp
    except ImportError as error:
        return {}, f"{error}; pip install llama-cpp-python"
    made = {}
    for name in types:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), True
        if name != "BF16":
            options.output_tensor_type = options.token_embedding_type = 8  # Q8_0 in ggml's numbering
        options.pure = True
        target = folder / f"{name}.gguf"
        with _silent():
            failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
        if failed:
            return {}, f"llama.cpp could not write {name} (error {failed})"
        made[name] = target
    return made, None


class LlamaCpp:
    """A GGUF file under llama.cpp, timed as our models are."""

    def __init__(self, file: Path, context: int):
        import llama_cpp

        threads = torch.get_num_threads()
        with _silent():
            self.model = llama_cpp.Llama(
                str(file), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
            )

    def __call__(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Seconds of the prompt, and of all but the first of `count` tokens."""
        start = time.perf_counter()
        self.prefill(prompt)
        middle = time.perf_counter()
        for token in prompt[: count - 1]:
            self.model.eval([token])
        return middle - start, time.perf_counter() - middle

    def prefill(self, prompt: list[int]) -> None:
        self.model.reset()
        self.model.eval(prompt)

    def decode(self, prompt: list[int]) -> Callable[[], Any]:
        """Each call is one token more after the prompt."""
        self.prefill(prompt)
        return lambda: self.model.eval(prompt[-1:])
