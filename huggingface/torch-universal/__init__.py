"""Layers for the package `kernels`: they run on the installed mistral_kernels, on CPUs and GPUs alike."""

import mistral_kernels

from . import layers as layers

__all__ = ["layers", "mistral_kernels"]
