"""The final weights for others: a model in Hugging Face's or Mistral's format, adapters in peft's."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import adapters
from ..checkpoint import Stored, make_checkpoint, stored_name
from ..weights import load_model, save_checkpoint
from .parallel import whole

if TYPE_CHECKING:
    from .trainer import Trainer


def export(trainer: "Trainer") -> str | None:
    """Writes out/export, and out/adapter for LoRA; returns the last folder written, or None. A collective call."""
    settings, model = trainer.settings, trainer.trainee.model
    if settings.lora_rank:
        return _export_lora(trainer)
    if settings.export == "none":
        return None
    state = {name: whole(t.detach()) for name, t in model.state_dict().items()}
    folder = trainer.folder / "export"
    if trainer.world.first:
        write_model(state, trainer, folder)
    trainer.world.barrier()
    return str(folder)


def _export_lora(trainer: "Trainer") -> str:
    settings, world = trainer.settings, trainer.world
    format = "ours" if settings.export == "none" else settings.export
    how = (trainer.config, settings.lora_rank, settings.lora_alpha, format, settings.lora_dropout)
    model = trainer.trainee.model
    state = {name: whole(t) for name, t in adapters.adapter_state(model).items()}
    folder = trainer.folder / "adapter"
    if world.first:
        adapters.save_adapter(state, folder, *how)
        if settings.merge:
            folder = trainer.folder / "export"
            write_model(_merged(trainer), trainer, folder)
    world.barrier()
    return str(folder)


def _merged(trainer: "Trainer") -> dict[str, torch.Tensor]:
    """The merged weights, from the checkpoint on disk and the adapter just written: the model in use may be sharded."""
    settings = trainer.settings
    assert settings.model is not None
    model = load_model(settings.model, dtype=trainer.dtype, window=settings.window, progress=False)
    if settings.quantize == "nf4":
        adapters.quantize_nf4(model, settings.lora_targets, trainer.dtype)
    adapters.load_adapter(model, trainer.folder / "adapter")
    return {name: t.detach() for name, t in adapters.merge_adapters(model).state_dict().items()}


def _stored(name: str, tensor: torch.Tensor) -> Stored:
    return Stored(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_model(state: dict[str, torch.Tensor], trainer: "Trainer", folder: Path) -> None:
    """Saves a whole state dict in the format and precision of the settings, with the tokenizer."""
    settings = trainer.settings
    stored = [_stored(stored_name(name, "hf"), tensor) for name, tensor in state.items()]
    source = make_checkpoint(trainer.folder, "hf", trainer.config, stored)
    format = "hf" if settings.export == "none" else settings.export
    save_checkpoint(source, folder, format, dtype=trainer.dtype, progress=False)
    copy_tokenizer(settings.tokenizer or settings.model, folder)


def copy_tokenizer(source: str | None, folder: Path) -> None:
    """Puts the tokenizer of a folder or .gguf file beside the weights, where there is one."""
    from .. import convert
    from ..gguf_tokenizer import gguf_tokenizer

    if source is None:
        return
    path = Path(source)
    if path.is_dir():
        convert.copy_tokenizer(path, folder)
    elif path.suffix == ".gguf":
        gguf_tokenizer(path).save(folder)
    else:
        convert.copy_tokenizer(path.parent, folder)
