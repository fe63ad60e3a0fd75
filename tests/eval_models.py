"""A tiny random model with a real tokenizer in a folder, as both Hugging Face and this package read it."""

from pathlib import Path

import tiny
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from mistral.samples import long_text
from mistral.tokenizer import JsonTokenizer
from mistral.weights import save_hf

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_LENGTH = 96


def tokenizer(bos: bool = False) -> JsonTokenizer:
    """Byte pairs learnt from the Python reference; 400 of them."""
    library = Tokenizer(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([long_text()[:40_000]], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return JsonTokenizer(library, "<s>" if bos else None, [1], special, TEMPLATE)


def folder(path: Path, **changes) -> Path:
    """Writes the model and the tokenizer."""
    tok = tokenizer()
    save_hf(tiny.model(vocab_size=tok.vocab_size, max_positions=MAX_LENGTH, **changes), path, progress=False)
    tok.save(path)
    return path
