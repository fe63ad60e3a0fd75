"""The loop: builds what the settings say, goes on where a checkpoint is, and runs the steps."""

import math
import time
from pathlib import Path
from typing import Any

import torch

import mistral_kernels

from .. import adapters
from ..config import PRESETS, ModelConfig
from ..model import Transformer
from ..tokenizer import Tokenizer, load_tokenizer
from ..weights import load_state, read_config
from . import checkpoints
from .batches import IGNORED, Order, RandomTokens, Sequences, count_labels, evaluation, make_batch, share
from .loss import Trainee, recompute_layers
from .optimizer import LossScale, gradient_norm, learning_rate, make_optimizer, scale_gradients
from .parallel import World, assign, initialise, set_last, shard
from .profile import profiled
from .settings import Settings
from .shards import Tokens
from .sources import prepare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a run may not change when it goes on: each would give other losses, or other tensors.
_FIXED = ("seed", "seq_len", "batch_tokens", "lora_rank", "quantize", "synthetic")


def model_config(settings: Settings) -> ModelConfig:
    """The shape of the model that is trained.

    Raises:
        ValueError: an unknown preset, or a shape that lacks fields or has unknown ones.
    """
    if settings.model is not None:
        return read_config(settings.model).with_window(settings.window)
    base: dict[str, Any] = {}
    if settings.preset is not None:
        if settings.preset not in PRESETS:
            raise ValueError(f"preset is {settings.preset!r}; it must be one of {', '.join(PRESETS)}")
        base = dict(vars(PRESETS[settings.preset]))
    try:
        config = ModelConfig(**base | settings.shape)
    except TypeError as error:
        text = str(error).replace("ModelConfig.__init__() ", "")
        raise ValueError(f"shape: {text}; it takes the fields of mistral.ModelConfig") from None
    return config.with_window(settings.window)


def choose_ops(name: str) -> Any:
    if name == "fused":
        return mistral_kernels
    return mistral_kernels.reference if name == "reference" else mistral_kernels.using(impl=name)


def find_tokenizer(settings: Settings) -> Tokenizer | None:
    """Raises ValueError where text is to be tokenised and there is no tokenizer."""
    path = settings.tokenizer or settings.model
    if path is None:
        if settings.data:
            raise ValueError("tokenizer is not set; a new model needs a tokenizer file or folder for its text")
        return None
    return load_tokenizer(path)


def open_data(settings: Settings, config: ModelConfig, world: World) -> tuple[Sequences, Sequences | None]:
    """Training and held-out sequences; text is tokenised by the first process, if that was not done.

    Raises:
        ValueError: shards that are torn, or whose vocabulary is not the model's; says what to do.
    """
    if settings.synthetic:
        return Sequences(RandomTokens(settings.synthetic, config.vocab_size, settings.seed), settings.seq_len), None
    with world.first_goes_first():
        if settings.data and world.first:
            tokenizer = find_tokenizer(settings)
            assert tokenizer is not None
            check_vocabulary("the tokenizer", tokenizer.vocab_size - 1, config)
            prepare(settings, tokenizer)
        train = Tokens(settings.shard_folder / "train", verify=world.first)
        held = Tokens(settings.shard_folder / "eval") if settings.eval_fraction else None
    for tokens in (train, held):
        if tokens is not None:
            check_vocabulary(str(tokens.folder), tokens.index.largest, config)
    return Sequences(train, settings.seq_len), None if held is None else Sequences(held, settings.seq_len)


def check_vocabulary(what: str, largest: int, config: ModelConfig) -> None:
    """Raises ValueError where token ids go beyond the model's embedding."""
    if largest >= config.vocab_size:
        raise ValueError(
            f"{what} has token ids up to {largest}, but the model's vocabulary is {config.vocab_size}: they are of"
            " another tokenizer; set tokenizer to the model's own (and remove the shards), or shape.vocab_size"
        )


class Trainer:
    """A run.

    Args:
        settings: of the run.
        world: its processes, not yet started.

    Raises:
        ValueError: settings, data or a checkpoint that do not fit; says what to do.
    """

    def __init__(self, settings: Settings, world: World):
        self.settings, self.world = settings, world
        self.folder = Path(settings.out)
        self.config = model_config(settings)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.dtype = DTYPES[settings.precision]
        lora = bool(settings.lora_rank)
        # In 16 bits FSDP keeps the float32 master weights, so one process of it is started too; LoRA's base is frozen.
        sharded = world.size > 1 or (self.dtype != torch.float32 and not lora)
        world.start(alone=sharded)
        self.sequences, self.held_out = open_data(settings, self.config, world)
        self.order = Order(len(self.sequences), settings.sequences, settings.seed)
        self.steps = settings.steps or math.ceil(len(self.sequences) * settings.epochs / settings.sequences)
        self.trainee = self._build(sharded)
        self.optimizer = make_optimizer(self.trainee, settings)
        self.scale = LossScale(settings.loss_scale, settings.precision == "float16")
        self.parameters = [p for p in self.trainee.parameters() if p.requires_grad]
        self.step = 0
        self.tokens = 0
        self._resume()

    # ---- building ----

    def _build(self, sharded: bool) -> Trainee:
        settings, lora = self.settings, bool(self.settings.lora_rank)
        if settings.seq_len > self.config.max_positions and self.config.sliding_window is None:
            raise ValueError(
                f"seq_len is {settings.seq_len}, but the model has a context of {self.config.max_positions} and no"
                " sliding window; set a smaller seq_len or a window"
            )
        with torch.device("meta"):
            model = Transformer(self.config, ops=choose_ops(settings.ops))
        model.reserve_positions(settings.seq_len)
        if lora:
            model.to(self.dtype)
        trainee = Trainee(model, settings.loss == "fused")
        if lora:
            return self._build_lora(trainee, sharded)
        if settings.checkpoint_activations:
            recompute_layers(model)
        if sharded:
            assert self.world.mesh is not None
            shard(trainee, self.world.mesh, None if self.dtype == torch.float32 else self.dtype)
        self._allocate(trainee)
        if settings.model is None:
            initialise(trainee, settings.seed)
        else:
            self._read_weights(model)
        return trainee

    def _allocate(self, trainee: Trainee) -> None:
        rope = trainee.model.rope
        trainee.to_empty(device=self.world.device)
        rope.rebuild(rope.cos.shape[0], self.world.device, torch.float32)

    def _read_weights(self, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
        parameters = dict(model.named_parameters())
        assert self.settings.model is not None
        for name, values in load_state(self.settings.model, dtype, progress=self.world.first):
            assign(parameters[name], values)

    def _build_lora(self, trainee: Trainee, sharded: bool) -> Trainee:
        settings, model = self.settings, trainee.model
        self._allocate(trainee)
        self._read_weights(model, self.dtype)
        if settings.quantize == "nf4":
            adapters.quantize_nf4(model, settings.lora_targets, self.dtype)
        adapters.add_adapters(
            model, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.lora_dropout, settings.seed
        )
        if settings.checkpoint_activations:
            recompute_layers(model)
        if sharded:
            assert self.world.mesh is not None
            # Packed 4-bit weights cannot be cut by rows: every process keeps them, and shards the adapters only.
            frozen = {p for p in trainee.parameters() if not p.requires_grad} if settings.quantize != "none" else None
            shard(trainee, self.world.mesh, None, ignored=frozen)
        return trainee

    # ---- going on ----

    def _resume(self) -> None:
        folder = self.folder / "checkpoints"
        found = None if self.settings.resume == "never" else checkpoints.newest(folder)
        if found is None and self.settings.resume == "must":
            raise ValueError(f"resume is must, but {folder} has no checkpoint")
        if found is None:
            return
        state = checkpoints.read_state(found)
        for name in _FIXED:
            if state["settings"][name] != getattr(self.settings, name):
                raise ValueError(
                    f"{name} is {getattr(self.settings, name)!r}, but {found} was made with"
                    f" {state['settings'][name]!r}; set it back, or choose another out, or resume: never"
                )
        if state["sequences"] != len(self.sequences):
            raise ValueError(
                f"the data has {len(self.sequences)} sequences, but {found} was made with {state['sequences']}; the"
                " text has changed: put it back, or choose another out, or resume: never"
            )
        checkpoints.load(found, self.trainee, self.optimizer, self.world)
        self.step, self.tokens = state["step"], state["tokens"]
        self.scale.load(state["loss_scale"])

    def save(self) -> None:
        """Writes a checkpoint of the steps so far."""
        state = dict(
            step=self.step,
            tokens=self.tokens,
            loss_scale=self.scale.state(),
            sequences=len(self.sequences),
            processes=self.world.size,
            settings=self.settings.as_dict(),
        )
        folder = self.folder / "checkpoints"
        checkpoints.save(folder, self.step, self.trainee, self.optimizer, state, self.world)
        if self.world.first:
            checkpoints.tidy(folder, self.settings.keep)

    # ---- steps ----

    def _seed(self) -> None:
        """Dropout depends on seed, step and process alone, so that a run that goes on draws the same."""
        torch.manual_seed((self.settings.seed * 1_000_003 + self.step) * 4099 + self.world.rank)

    def _backward(self) -> torch.Tensor:
        """Adds up the gradient of one step; returns its loss."""
        numbers = self.order.of_step(self.step)
        items = max(1, count_labels(self.sequences, numbers))
        parts = share(numbers, self.world.rank, self.world.size, self.settings.micro_batch)
        total = torch.zeros((), device=self.world.device)
        for at, part in enumerate(parts):
            set_last(self.trainee, at == len(parts) - 1)
            loss = self.trainee(make_batch(self.sequences, part).to(self.world.device), float(items))
            (loss * self.scale.value).backward()
            total += loss.detach()
        return self.world.total(total)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns loss, learning rate and gradient norm."""
        self._seed()
        rate = learning_rate(self.step, self.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = float(self._backward())
        scale = self.scale.value
        norm = gradient_norm(self.parameters) / scale
        finite = math.isfinite(norm)
        if not finite and not self.scale.enabled:
            raise FloatingPointError(
                f"the gradient is {norm} at step {self.step + 1} (loss {loss}); lower lr, or raise warmup"
            )
        if finite:
            clip = min(1.0, self.settings.clip / (norm + 1e-6)) if self.settings.clip else 1.0
            scale_gradients(self.parameters, clip / scale)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scale.update(finite)
        self.step += 1
        self.tokens += self.settings.batch_tokens
        return dict(step=self.step, tokens=self.tokens, loss=loss, lr=rate, grad_norm=norm, loss_scale=scale)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """The mean cross entropy over held-out sequences, or None where there are none."""
        if self.held_out is None:
            return None
        self.trainee.eval()
        world, limit = self.world, self.settings.eval_batches
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in evaluation(self.held_out, limit, world.rank, world.size, self.settings.micro_batch):
            sums[0] += self.trainee(batch.to(world.device), 1.0).double()
            sums[1] += (batch.labels != IGNORED).sum().item()
        self.trainee.train()
        world.total(sums)
        return (sums[0] / sums[1]).item()

    def run(self) -> dict[str, Any]:
        """All steps that are left, with checkpoints, log, plot and export; returns a summary."""
        from .report import Report

        settings, report = self.settings, Report(self)
        self.trainee.train()
        if self.step == 0 and settings.eval_every:
            report.evaluated(self.evaluate())
        while self.step < self.steps:
            start = time.perf_counter()
            row = self.profiled_step() if self.step + 1 == settings.profile else self.train_step()
            row["seconds"] = time.perf_counter() - start
            due = settings.eval_every and self.step % settings.eval_every == 0
            if due or self.step == self.steps:
                row["eval_loss"] = self.evaluate()
            report.stepped(row)
            if settings.keep and (self.step == self.steps or due_to_save(self.step, settings)):
                self.save()
        return report.finish()

    def profiled_step(self) -> dict[str, Any]:
        """A step under the profiler; the first process writes profile.json."""
        path = self.folder / "profile.json" if self.world.first else None
        self.folder.mkdir(parents=True, exist_ok=True)
        return profiled(self.train_step, path, self.world.device)


def due_to_save(step: int, settings: Settings) -> bool:
    return settings.save_every > 0 and step % settings.save_every == 0
