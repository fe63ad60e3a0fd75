"""The model class of lm-evaluation-harness: `lm_eval --model mistral --model_args pretrained=PATH,window=1024`.

Log-likelihoods and generated texts are those of the harness's Hugging Face class on the same weights; contexts that
repeat run once, and nothing is padded.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..extras import need
from ..model import Transformer
from ..tokenizer import MistralTokenizer, Tokenizer
from . import loading, scoring, until
from .chat import mistral_chat_text, mistral_encode
from .scoring import Scorer

need("lm_eval", "eval")

from lm_eval import utils as harness_utils  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

MAX_GEN_TOKS = 256  # where a task names none, as in the harness's Hugging Face class
# What changes nothing in greedy decoding is let through there.
_SAMPLING = {"temperature", "top_p", "seed", "do_sample"}
_KNOWN = _SAMPLING | {"until", "max_gen_toks"}


@register_model("mistral")
class MistralLM(TemplateLM):
    """A model of this package under lm-evaluation-harness.

    Args:
        pretrained: a checkpoint's folder or file, "smollm2", or a `Transformer` that is loaded already.
        tokenizer: a file or folder, or a `Tokenizer`; needed with a loaded model, else the checkpoint's own.
        ops, window, dtype, kv, weights, adapter, merge: as in `Variant`. `peft` is another name of adapter.
        device: where the model runs; None for CUDA where there is one, else the CPU. `lm_eval` says "cuda:0" where its
            user says nothing, so that too means the CPU where there is no CUDA, with a warning.
        batch_size: different contexts in one pass, each with all its continuations, and sequences that decode at a
            time; "auto" fills passes up to `max_batch_tokens`.
        max_batch_size: the most that "auto" takes.
        max_batch_tokens: cache positions of a pass.
        max_length: tokens that the model sees at most; longer contexts lose their beginning. None for its context.
        max_gen_toks: new tokens where a task names no number.
        add_bos_token: whether texts begin with it; None as the model was trained.
        prefix_token_id: what stands before a continuation without context; None for bos, or eos where there is none.

    Raises:
        ValueError, FileNotFoundError: arguments outside their range; as `Variant.load`.
    """

    def __init__(
        self,
        pretrained: str | Transformer,
        tokenizer: str | Tokenizer | None = None,
        ops: str = "fused",
        window: str | int | None = "config",
        dtype: str | torch.dtype = "bfloat16",
        kv: str = "model",
        weights: str = "model",
        adapter: str | None = None,
        merge: bool = False,
        device: str | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        max_batch_tokens: int = scoring.CELLS,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        peft: str | None = None,
    ):
        super().__init__()
        self.kv_dtype = loading.kv_dtype(kv)
        if isinstance(pretrained, Transformer):
            if not isinstance(tokenizer, Tokenizer):
                raise TypeError(f"tokenizer is {tokenizer!r}; a loaded model needs its Tokenizer")
            self.model, self.tok, self.name = pretrained, tokenizer, "Transformer"
        else:
            device = _device(device)
            dtype, adapter = str(dtype).removeprefix("torch."), adapter or peft
            own = None if tokenizer is None else str(tokenizer)
            variant = loading.Variant(str(pretrained), own, ops, window, dtype, kv, weights, adapter, merge, device)
            self.model, self.tok = variant.load()
            self.name = str(variant.path())
        self._device = self.model.device
        self.max_gen_toks = max_gen_toks
        self._bos = (self.tok.bos_id is not None) if add_bos_token is None else add_bos_token
        self._max_length = self._checked_length(max_length)
        self._prefix = self._checked_prefix(prefix_token_id)
        self._rows = self._checked_rows(batch_size, max_batch_size)
        self.batch_size = batch_size
        self.scorer = Scorer(self.model, self.kv_dtype, cells=max_batch_tokens)
        self._chat = False

    # ---- arguments ----

    def _checked_length(self, given: int | None) -> int:
        config = self.model.config
        length = config.max_positions if given is None else int(given)
        if length < 1 or (length > config.max_positions and config.sliding_window is None):
            raise ValueError(
                f"max_length is {length}; it must be from 1 to the model's context of {config.max_positions}"
                " (a model with a sliding window takes more)"
            )
        return length

    def _checked_prefix(self, given: int | None) -> int:
        if given is not None:
            if not 0 <= given < self.model.config.vocab_size:
                raise ValueError(f"prefix_token_id is {given}; the vocabulary is {self.model.config.vocab_size}")
            return given
        bos = self.tok.special("bos_token")
        return self.eot_token_id if bos is None else bos[0]

    @staticmethod
    def _checked_rows(given: int | str | None, most: int | None) -> int | None:
        """Different contexts in a pass; None for as many as the cache has positions for."""
        text = "auto" if given is None else str(given)
        if text.split(":")[0] == "auto":
            return most
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"batch_size is {given!r}; it must be 'auto' or a number of at least 1")
        return int(text)

    # ---- what the harness asks a model ----

    @property
    def eot_token_id(self) -> int:
        eos = self.tok.special("eos_token")
        if eos is not None:
            return eos[0]
        if not self.tok.stop_ids:
            raise ValueError("the tokenizer names no eos token; give prefix_token_id")
        return self.tok.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        config = self.model.config
        return dict(
            model_num_parameters=config.parameter_count(),
            model_dtype=str(self.model.dtype),
            model_window=config.sliding_window,
            model_kv=str(self.kv_dtype or self.model.dtype),
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; bos first as `add_bos_token` says, unless the text begins with it or the caller says no."""
        if self._chat and isinstance(self.tok, MistralTokenizer):
            return mistral_encode(self.tok, string, self._bos if add_special_tokens is None else add_special_tokens)
        bos = self.tok.special("bos_token")
        wanted = self._bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and bos is not None and string.startswith(bos[1]):
            wanted = False
        ids = self.tok.encode(string, bos=False)
        return [bos[0], *ids] if wanted and bos is not None else ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.tok.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the harness's records; "" where the tokenizer renders conversations itself."""
        if chat_template is False or chat_template is None:
            return None
        self._chat = True
        return self.tok.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a prompt; without a generation prompt the last message is left open."""
        self._chat = True
        if isinstance(self.tok, MistralTokenizer):
            return mistral_chat_text(self.tok, chat_history, add_generation_prompt)
        return self.tok.chat_text(chat_history, add_generation_prompt)

    # ---- log-likelihoods ----

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after:
            raise ValueError(
                f"the continuation {continuation!r} behind {context[-40:]!r} adds no token of its own: the tokenizer"
                " joins it with the end of the context; end the context at a word's border"
            )
        return before, after

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """An empty continuation has log-likelihood 0. One behind an empty context is behind `prefix_token_id`."""
        pairs: list[tuple[Any, list[int], list[int]]] = []
        for context, continuation in (request.args for request in requests):
            if continuation == "":
                before, after = [self.prefix_token_id], []
            elif not context.strip():
                # Spaces belong to the continuation, as `_encode_pair` has it.
                after = self.tok_encode(context + continuation, add_special_tokens=False)
                before = [self.prefix_token_id]
                if after[0] == self.prefix_token_id:
                    before, after = after[:1], after[1:]
            else:
                before, after = self._encode_pair(context, continuation)
            pairs.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(before, after) for _, before, after in requests]
        if cut := sum(len(kept) < len(before) for (kept, _), (_, before, _) in zip(pairs, requests, strict=True)):
            warnings.warn(
                f"{cut} of {len(pairs)} contexts lose their beginning: with the continuation they are longer than"
                f" max_length, {self.max_length} tokens",
                stacklevel=2,
            )
        found = [(score.total, score.greedy) for score in self._scores(pairs, disable_tqdm)]
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _cut(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """Drops the beginning of a context that the model is too short for; of a prediction, the last is no input."""
        if len(after) > self.max_length:
            raise ValueError(
                f"a continuation has {len(after)} tokens, but the model sees {self.max_length} at most (max_length);"
                " loglikelihood_rolling takes texts of any length"
            )
        too_many = len(before) + len(after) - (self.max_length + 1)
        return before[max(too_many, 0) :], after

    def _scores(self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[scoring.Score]:
        """With a number as batch size, as many contexts at a time; else all go to the scorer, which fills passes."""
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
            if self._rows is None:
                return self.scorer(pairs, bar.update)
            order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
            found: list[scoring.Score] = [scoring.Score([], True)] * len(pairs)
            for group in _by_contexts(order, pairs, self._rows):
                for i, score in zip(group, self.scorer([pairs[i] for i in group], bar.update), strict=True):
                    found[i] = score
            return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: windows of max_length, each token predicted once."""
        pairs, counts = [], []
        for (text,) in (request.args for request in requests):
            windows = harness_utils.get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            made = [harness_utils.make_disjoint_window(window) for window in windows]
            pairs += made
            counts.append(len(made))
        scores = iter(self._scores(pairs, disable_tqdm))
        found = []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(scores).total for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    # ---- generation ----

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts without the stop strings that ended them; contexts that leave no room lose their beginning."""
        made = [self._request(context, kwargs) for context, kwargs in (request.args for request in requests)]
        rows = self._rows or until.ROWS
        with tqdm(total=len(made), desc="generation", disable=disable_tqdm or None) as bar:

            def done(i: int, text: str) -> None:
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update()

            return until.generate_until(self.model, self.tok, made, rows, self.kv_dtype, done)

    def _request(self, context: str, given: dict[str, Any]) -> until.Request:
        if not isinstance(given, dict):
            raise TypeError(f"the settings of a generation are {given!r}; they must be a dict")
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
        unknown = [name for name, value in kwargs.items() if name not in _KNOWN and value is not None]
        if unknown and temperature > 0:
            raise ValueError(
                f"generation with {', '.join(unknown)} is not supported; known are {', '.join(sorted(_KNOWN))}"
            )
        room = self.max_length - kwargs["max_gen_toks"]
        if room < 1 or kwargs["max_gen_toks"] < 1:
            raise ValueError(
                f"max_gen_toks is {kwargs['max_gen_toks']}; it must be at least 1 and leave a token of the model's"
                f" {self.max_length} (max_length) for the context"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return until.Request(
            ids[-room:],
            kwargs["max_gen_toks"],
            tuple(map(str, kwargs["until"])),
            temperature,
            float(kwargs.get("top_p") or 1.0),
            kwargs.get("seed"),
        )


def _device(given: str | None) -> str:
    if given is None or str(given).startswith("cuda"):
        if torch.cuda.is_available():
            return str(given or "cuda")
        if given is not None:
            warnings.warn(f"device is {given!r}, but torch sees no CUDA here; the CPU is taken", stacklevel=3)
        return "cpu"
    return str(given)


def _by_contexts(order: Sequence[int], pairs: Sequence[tuple[list[int], list[int]]], most: int) -> Iterable[list[int]]:
    """Cuts pairs, ordered by context, into groups of at most so many different contexts."""
    group: list[int] = []
    contexts = 0
    for i in order:
        new = not group or pairs[group[-1]][0] != pairs[i][0]
        if new and contexts == most:
            yield group
            group, contexts = [], 0
        group.append(i)
        contexts += new
    if group:
        yield group
