"""Runs CUDA kernels on a CPU, from the PTX that nvcc makes of them, and checks every access; see README.md."""

from .build import BuildError, missing
from .program import Finding, Launch, Program, empty, guarded, launches, option, planted, traffic
from .ptx import UnknownPtx

__all__ = [
    "BuildError",
    "Finding",
    "Launch",
    "Program",
    "UnknownPtx",
    "empty",
    "guarded",
    "launches",
    "missing",
    "option",
    "planted",
    "traffic",
]
