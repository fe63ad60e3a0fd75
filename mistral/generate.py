"""Text generation with a ring cache: prefill in chunks, then one token a step; and its command line.

python -m mistral.generate --model PATH --prompt "The capital of France is"
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mistral_kernels

from .model import Transformer
from .sampling import Sampler, token_logprobs

CHUNK = 512


@dataclasses.dataclass
class Generated:
    """What `generate` returns.

    Attributes:
        tokens: of each sequence, the new tokens; a stop token that ended it is the last of them.
        logprobs: of each of these tokens, its log-probability under the model (before temperature and top_p); empty
            lists unless asked for.
        prefill_tokens, prefill_seconds: prompt tokens, and the time until the first token of every sequence.
        decode_tokens, decode_seconds: all later tokens.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_tokens: int, chunk_size: int) -> int:
    """The number of positions that the longest sequence takes; the last token is never fed back."""
    vocab, context = model.config.vocab_size, model.config.max_positions
    if not prompts or max_tokens < 1 or chunk_size < 1:
        raise ValueError(
            f"there are {len(prompts)} prompts, max_tokens is {max_tokens}, chunk_size {chunk_size};"
            " each must be at least 1"
        )
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty; it needs at least one token (bos, for example)")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompt {i} has tokens from {min(prompt)} to {max(prompt)}; the vocabulary is {vocab}")
        needed = len(prompt) + max_tokens - 1
        if needed > context and model.config.sliding_window is None:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and max_tokens is {max_tokens}, together {needed} positions;"
                f" the model has a context of {context} and no sliding window"
            )
    return max(len(prompt) for prompt in prompts) + max_tokens - 1


class _Batch:
    """The sequences of one call of `generate` and what they have so far."""

    def __init__(self, sequences: int, sampler: Sampler, max_tokens: int, stop_ids: Iterable[int], on_token: Any):
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.logprobs: list[list[float]] = [[] for _ in range(sequences)]
        self.live: list[bool] = [True] * sequences
        self.sampler, self.max_tokens, self.stop_ids = sampler, max_tokens, frozenset(stop_ids)
        self.on_token = on_token

    def take(self, logits: torch.Tensor, rows: list[int], logprobs: bool) -> None:
        """Draws the next token of each sequence in `rows` and lets those that are done leave."""
        chosen = self.sampler(logits, rows)
        tokens = chosen.tolist()
        if logprobs:
            for row, value in zip(rows, token_logprobs(logits, chosen).tolist(), strict=True):
                self.logprobs[row].append(value)
        for row, token in zip(rows, tokens, strict=True):
            self.tokens[row].append(token)
            self.live[row] = token not in self.stop_ids and len(self.tokens[row]) < self.max_tokens
            if self.on_token is not None:
                self.on_token(row, token)

    def next(self) -> tuple[list[int], list[int]]:
        """The sequences that still run and the token that each was given last."""
        rows = [i for i, alive in enumerate(self.live) if alive]
        return rows, [self.tokens[i][-1] for i in rows]


def _prefill(
    model: Transformer,
    cache: Any,
    prompts: Sequence[Sequence[int]],
    batch: _Batch,
    chunk_size: int,
    logprobs: bool,
    progress: bool,
) -> None:
    """Feeds the prompts a chunk of each at a time; a sequence draws its first token where its prompt ends."""
    from tqdm import tqdm

    longest = max(len(prompt) for prompt in prompts)
    total = sum(len(prompt) for prompt in prompts)
    hidden = not progress or longest <= chunk_size
    with tqdm(total=total, desc="prefill", unit=" tokens", leave=False, disable=hidden or None) as bar:
        for start in range(0, longest, chunk_size):
            pieces = [list(prompt[start : start + chunk_size]) for prompt in prompts]
            tokens = torch.tensor([t for piece in pieces for t in piece], device=model.device)
            lengths = [len(piece) for piece in pieces]
            hidden_states = model.hidden(tokens, cache=cache, lengths=lengths, last_only=True)
            fed = [i for i, piece in enumerate(pieces) if piece]
            ended = [at for at, i in enumerate(fed) if len(prompts[i]) <= start + chunk_size]
            if ended:
                batch.take(model.logits(hidden_states[ended]), [fed[at] for at in ended], logprobs)
            bar.update(len(tokens))


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_ids: Iterable[int] = (),
    chunk_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    logprobs: bool = False,
    progress: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> Generated:
    """Continues a batch of prompts of any lengths.

    The prompts run through the model in chunks, all at once; then each step feeds one token of every sequence that
    is not done. Those that are done leave: they cost nothing more. Memory is that of a cache of
    `min(window, length)` slots a sequence, and one chunk.

    Args:
        model: in evaluation or training mode alike; there is no dropout.
        prompts: token ids of each sequence, at least one each.
        max_tokens: at most so many new ones for each.
        temperature, top_p, seed: as in `sampling.Sampler`. What a sequence draws does not depend on the others.
        stop_ids: tokens that end a sequence.
        chunk_size: prompt tokens of each sequence in one pass; None for 512.
        on_token: called with (sequence, token) as soon as each is known.
        logprobs: also return the log-probability of each new token.
        progress: show a bar on stderr, on a terminal, while a prompt of more than one chunk is read.
        kv_dtype: torch.int8 keeps keys and values as codes, in half the memory; None in the model's dtype.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a setting outside its range, or more positions
            than the context of a model without a window.
    """
    chunk_size = CHUNK if chunk_size is None else chunk_size
    needed = _check(model, prompts, max_tokens, chunk_size)
    model.reserve_positions(needed)
    batch = _Batch(len(prompts), Sampler(len(prompts), temperature, top_p, seed), max_tokens, stop_ids, on_token)
    cache = model.cache(len(prompts), needed, kv_dtype=kv_dtype)
    started = time.perf_counter()
    _prefill(model, cache, prompts, batch, chunk_size, logprobs, progress)
    prefilled = time.perf_counter()
    rows, tokens = batch.next()
    while rows:
        lengths = None if len(rows) == len(prompts) else [int(alive) for alive in batch.live]
        logits = model(torch.tensor(tokens, device=model.device), cache=cache, lengths=lengths)
        batch.take(logits, rows, logprobs)
        rows, tokens = batch.next()
    return Generated(
        batch.tokens,
        batch.logprobs,
        prefill_tokens=sum(len(prompt) for prompt in prompts),
        prefill_seconds=prefilled - started,
        decode_tokens=sum(len(tokens) - 1 for tokens in batch.tokens),
        decode_seconds=time.perf_counter() - prefilled,
    )


class TextStream:
    """Turns tokens into text as they come, holding back those that do not yet make whole characters.

    Args:
        tokenizer: anything with `decode(ids) -> str`.
        context: tokens before the first, so that a tokenizer which drops a leading space keeps this one.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()):
        self._decode = tokenizer.decode
        self._ids = list(context)[-8:]
        self._shown = self._text = ""
        self._restart()

    def _restart(self) -> None:
        """Keeps only the last few tokens to decode again, so that each new one costs the same."""
        self._ids = self._ids[-8:]
        self._shown = self._decode(self._ids) if self._ids else ""

    def put(self, token: int) -> str:
        """The text that this token completes; often one word, sometimes nothing."""
        self._ids.append(token)
        text = self._decode(self._ids)
        # A character that lies across tokens decodes to replacement characters until its last byte is there.
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        self._restart()
        return new

    def end(self) -> str:
        """What was still held back."""
        new = self._decode(self._ids)[len(self._shown) :] if self._ids else ""
        self._restart()
        return new


def stream_text(tokenizer: Any, tokens: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
    """The text of `tokens` piece by piece, each of whole characters; together what decoding them at once gives."""
    stream = TextStream(tokenizer, context)
    for token in tokens:
        if text := stream.put(token):
            yield text
    if text := stream.end():
        yield text


# ---- command line ----

_EXAMPLES = """examples:
  python -m mistral.generate --model models/smollm2 --chat --prompt "Why is the sky blue?"
  python -m mistral.generate --model models/mistral-7b-v0.1 --prompt-file long.txt --window 4096 --max-tokens 64
  python -m mistral.generate --model models/smollm2 --prompt "Once upon" --temperature 0.8 --top-p 0.95 --seed 1
  python -m mistral.generate --model models/smollm2 --prompt "Two plus two is" --ops reference   # eager PyTorch
"""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _window(text: str) -> int | str | None:
    if text in ("none", "config"):
        return None if text == "none" else text
    try:
        window = int(text)
    except ValueError:
        window = 0
    if window < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be 'config', 'none' or a number of at least 1")
    return window


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mistral.generate",
        description="Continue a prompt, or answer it with --chat.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="PATH", help="a checkpoint: its folder or file")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, '-' for stdin")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter, in peft's or Mistral's format")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights first")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--ops",
        choices=("fused", "reference", "triton", "cpu"),
        default="fused",
        help="fused: the fastest kernels for the device (default); reference: eager PyTorch; or one implementation",
    )
    parser.add_argument("--window", type=_window, default="config", metavar="N|none|config", help="keys a query sees")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--dequantize", action="store_true", help="turn a GGUF file's weights into --dtype first")
    parser.add_argument(
        "--kv", choices=("model", "int8"), default="model", help="dtype of the cache (default: model's)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk-size", type=int, default=None, metavar="N", help=f"of the prefill (default {CHUNK})")
    return parser


def _ops(name: str) -> Any:
    if name == "fused":
        return mistral_kernels
    return mistral_kernels.reference if name == "reference" else mistral_kernels.using(impl=name)


def _prompt(args: argparse.Namespace) -> str:
    text = args.prompt
    if args.prompt_file is not None:
        text = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _run(args: argparse.Namespace) -> Generated:
    from .tokenizer import load_tokenizer
    from .weights import load_model

    text, ops = _prompt(args), _ops(args.ops)
    if not Path(args.model).exists():
        raise FileNotFoundError(f"--model {args.model}: there is no such file or folder")
    tokenizer = load_tokenizer(args.model)
    dtype = _DTYPES[args.dtype]
    keep = args.adapter is None and not args.dequantize
    model = load_model(args.model, ops=ops, dtype=dtype, window=args.window, device=args.device, keep_codes=keep)
    if args.adapter is not None:
        from .adapters import load_adapter, merge_adapters

        model = load_adapter(model, args.adapter)
        model = merge_adapters(model) if args.merge else model
    ids = tokenizer.encode_chat([{"role": "user", "content": text}]) if args.chat else tokenizer.encode(text, bos=True)
    stream = TextStream(tokenizer, context=ids)

    def show(_: int, token: int) -> None:
        if token not in tokenizer.stop_ids:
            print(stream.put(token), end="", flush=True)

    result = generate(
        model,
        [ids],
        args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=tokenizer.stop_ids,
        chunk_size=args.chunk_size,
        kv_dtype=torch.int8 if args.kv == "int8" else None,
        on_token=show,
        progress=True,
    )
    print(stream.end(), flush=True)
    return result


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s" if tokens else "0 tokens"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        result = _run(args)
    except (OSError, ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    print(f"prefill: {_rate(result.prefill_tokens, result.prefill_seconds)}", file=sys.stderr)
    print(f"decode:  {_rate(result.decode_tokens, result.decode_seconds)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
