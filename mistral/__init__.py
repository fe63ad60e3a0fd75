"""A Mistral written from scratch on the ops of `mistral_kernels`: model, ring cache, generation."""

from .cache import RingCache
from .config import PRESETS, ModelConfig
from .model import Transformer

__all__ = ["PRESETS", "ModelConfig", "RingCache", "Transformer"]
