"""What a training run is told: one flat list of settings, from a YAML file, flags or Python, checked as a whole."""

import argparse
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import need

PRECISIONS = ("float32", "bfloat16", "float16")
LORA_TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def _of(default: Any, section: str, help: str, choices: Sequence[str] = ()) -> Any:
    metadata = dict(section=section, help=help, choices=tuple(choices))
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """One run. Each field is a key of the YAML file and, with dashes, a flag; `--help` lists them with their meaning.

    Raises:
        TypeError: a value of another type than its setting needs.
        ValueError: a value that cannot be, or two that contradict each other; says what to change.
    """

    out: str = _of("out/train", "run", "folder of checkpoints, log, plot and export")
    seed: int = _of(0, "run", "of initial weights, data order and dropout")
    device: str = _of("auto", "run", "cpu, cuda, or auto: cuda where there is one")
    threads: int = _of(0, "run", "CPU threads of each process; 0 leaves torch's choice")
    resume: str = _of("auto", "run", "auto: go on where `out` has a checkpoint", ("auto", "never", "must"))

    model: str | None = _of(None, "model", "checkpoint to go on from or to fine-tune: folder or .gguf file")
    preset: str | None = _of(None, "model", "shape of a new model by name, such as mistral-7b-v0.1")
    shape: dict[str, Any] = _of({}, "model", "shape of a new model, or changes of `preset`: fields of ModelConfig")
    tokenizer: str | None = _of(None, "model", "tokenizer file or folder; by default the one of `model`")
    window: int | str | None = _of("config", "model", "sliding window: a number, none, or config: the model's own")
    ops: str = _of("fused", "model", "kernels", ("fused", "reference", "triton", "cpu"))

    data: list[str] = _of([], "data", "files, folders (.txt .md .rst .jsonl .parquet) or hf:NAME[/CONFIG][@SPLIT]")
    text_key: str = _of("text", "data", "the column or key with the text, in JSONL, Parquet and datasets")
    shards: str | None = _of(None, "data", "folder of the tokenised text; default: `out`/shards")
    eval_fraction: float = _of(0.0, "data", "share of documents held out, picked by a hash of their text")
    max_documents: int = _of(0, "data", "stop reading after so many documents; 0 for all of them")
    synthetic: int = _of(0, "data", "instead of `data`: so many random tokens, to measure speed")

    seq_len: int = _of(1024, "batch", "S, tokens of a sequence; documents are packed into it")
    batch_tokens: int = _of(8192, "batch", "tokens of one optimizer step over all processes, a multiple of seq_len")
    micro_batch: int = _of(1, "batch", "sequences that a process runs at once; the rest of a step is accumulated")
    steps: int = _of(0, "batch", "optimizer steps; 0: as many as `epochs` takes")
    epochs: float = _of(1.0, "batch", "passes over the data, where steps is 0")

    lr: float = _of(3e-4, "optimizer", "peak learning rate")
    min_lr: float = _of(0.1, "optimizer", "the cosine ends at this share of lr")
    warmup: int = _of(100, "optimizer", "steps of linear warm-up")
    beta1: float = _of(0.9, "optimizer", "AdamW's first beta")
    beta2: float = _of(0.95, "optimizer", "AdamW's second beta")
    eps: float = _of(1e-8, "optimizer", "AdamW's epsilon")
    weight_decay: float = _of(0.1, "optimizer", "of weight matrices; norms and biases are never decayed")
    clip: float = _of(1.0, "optimizer", "largest norm of the gradient; 0 for no clipping")

    precision: str = _of("bfloat16", "compute", "of activations; master weights are float32", PRECISIONS)
    checkpoint_activations: bool = _of(False, "compute", "recompute each layer in the backward pass")
    loss: str = _of("fused", "compute", "never hold [T, V] logits, or hold them", ("fused", "eager"))
    loss_scale: float = _of(65536.0, "compute", "first loss scale of float16")

    save_every: int = _of(500, "saving", "steps between checkpoints; 0: only at the end")
    keep: int = _of(2, "saving", "newest checkpoints that are kept; 0 writes none")
    export: str = _of("none", "saving", "write the final weights for others", ("none", "hf", "mistral"))

    log_every: int = _of(1, "logging", "steps between lines of log.csv")
    eval_every: int = _of(0, "logging", "steps between passes over held-out text; 0: only at the end")
    eval_batches: int = _of(0, "logging", "sequences of such a pass; 0 for all")
    tensorboard: bool = _of(False, "logging", "also write event files for TensorBoard")
    profile: int = _of(0, "logging", "profile this step and write profile.json; 0 for none")
    mfu: bool = _of(True, "logging", "measure the machine's GEMM rate first and report the share of it in use")

    lora_rank: int = _of(0, "lora", "rank of LoRA adapters; 0 trains all weights")
    lora_alpha: float = _of(16.0, "lora", "their scale is alpha / rank")
    lora_dropout: float = _of(0.0, "lora", "dropout before them")
    lora_targets: list[str] = _of(list(LORA_TARGETS), "lora", f"projections that get one: {' '.join(LORA_TARGETS)}")
    quantize: str = _of("none", "lora", "store the frozen weights in 4 bits (QLoRA)", ("none", "nf4"))
    merge: bool = _of(False, "lora", "export with the adapters merged into the weights")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, _typed(field, getattr(self, field.name)))
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        least = dict.fromkeys(("seq_len", "batch_tokens", "micro_batch", "log_every"), 1)
        least |= dict.fromkeys(("steps", "warmup", "save_every", "eval_every", "eval_batches", "lora_rank"), 0)
        least |= dict.fromkeys(
            ("keep", "profile", "threads", "max_documents", "synthetic", "weight_decay", "clip", "seed"), 0
        )
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("lr", "eps", "epochs", "lora_alpha", "loss_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2", "eval_fraction", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if not 0 <= self.min_lr <= 1:
            raise ValueError(f"min_lr is {self.min_lr}; it is a share of lr, from 0 to 1")
        if isinstance(self.window, int) and self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1, none or config")
        if isinstance(self.window, str) and self.window != "config":
            raise ValueError(f"window is {self.window!r}; it must be a number, none or config")

    def _check_together(self) -> None:
        if (self.model is None) == (self.preset is None and not self.shape):
            raise ValueError("give either model, a checkpoint to start from, or preset and shape of a new model")
        if self.batch_tokens % self.seq_len:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}; it must be a multiple of seq_len, {self.seq_len}: for example"
                f" {max(1, round(self.batch_tokens / self.seq_len)) * self.seq_len}"
            )
        if bool(self.data) and bool(self.synthetic):
            raise ValueError("data and synthetic are both given; synthetic tokens take the place of data")
        if not self.data and not self.synthetic and self.shards is None:
            raise ValueError("data is empty; name files, folders or hf:NAME, or a folder of shards that are ready")
        if unknown := [name for name in self.lora_targets if name not in LORA_TARGETS]:
            raise ValueError(f"lora_targets has {', '.join(unknown)}; it may have {', '.join(LORA_TARGETS)}")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("lora_targets is empty; name at least one projection")
        if self.quantize != "none" and not self.lora_rank:
            raise ValueError(f"quantize is {self.quantize} without LoRA; 4-bit weights are frozen, set lora_rank")
        if self.merge and not self.lora_rank:
            raise ValueError("merge is given without LoRA; set lora_rank")
        if self.lora_rank and self.model is None:
            raise ValueError("lora_rank is given for a new model; LoRA adapts a checkpoint, set model")

    @property
    def sequences(self) -> int:
        """Of one optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def shard_folder(self) -> Path:
        return Path(self.shards) if self.shards is not None else Path(self.out) / "shards"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """The value in its field's type; YAML reads 3e-4 as text, and a whole number may stand for a float."""
    allowed = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if value is None or value == "none":
        if type(None) in kinds:
            return None
        value = "none" if str in kinds else value
    if float in kinds and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        with contextlib.suppress(ValueError):
            value = float(value)
    if list in kinds and isinstance(value, (str, tuple)):
        value = [value] if isinstance(value, str) else list(value)
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    if wrong or (list in kinds and not all(isinstance(v, str) for v in value)):
        names = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{field.name} is {value!r}; it must be {names}{' of strings' if list in kinds else ''}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{field.name} is {value!r}; it must be one of {', '.join(choices)}")
    return value


def from_mapping(values: Mapping[str, Any], where: str = "the settings") -> Settings:
    """Settings from a mapping.

    Raises:
        ValueError: a key that is none of them, with the one that was probably meant; and as `Settings`.
        TypeError: as `Settings`.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            meant = f"; did you mean {near[0]}?" if near else "; --help lists them"
            raise ValueError(f"{where} has {name!r}, which is no setting{meant}")
    return Settings(**values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: a missing file, broken YAML, or no mapping.
    """
    yaml = need("yaml", "train")
    if not path.is_file():
        raise ValueError(f"{path} is no file; CONFIG is a YAML file of settings, see --help")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold `setting: value` lines, not {type(found).__name__}")
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, grouped; flags that are not given leave no trace."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        section = field.metadata["section"]
        group = groups.setdefault(section, None) or parser.add_argument_group(section)
        groups[section] = group
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "" if default in (None, [], {}) else f" (default: {_show(default)})"
        options: dict[str, Any] = dict(default=argparse.SUPPRESS, help=(field.metadata["help"] + shown))
        kind = field.type
        if kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is list:
            options |= dict(nargs="+", metavar="X")
        elif typing.get_origin(kind) is dict:
            options |= dict(nargs="+", metavar="KEY=N", type=_pair)
        else:
            options |= dict(metavar="X", type=_reader(kind))
            if field.metadata["choices"]:
                options |= dict(choices=field.metadata["choices"], metavar=None)
        group.add_argument("--" + field.name.replace("_", "-"), dest=field.name, **options)


def _show(default: Any) -> str:
    return " ".join(default) if isinstance(default, list) else str(default)


def _reader(kind: Any) -> Any:
    if kind in (int, float):
        return kind
    return _number_or_text if isinstance(kind, types.UnionType) and int in typing.get_args(kind) else str


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be key=value, such as dim=256")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False, "none": None}.get(value, value)
