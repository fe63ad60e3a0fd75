"""The cos/sin tables of rotary embeddings, and the rescalings of their frequencies for longer contexts."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .. import _checks


def _linear(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Position interpolation (Chen et al. 2023): every position divided by the factor."""
    return frequencies / scaling["factor"]


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long waves divided by the factor, short ones kept, a linear blend between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling["factor"])


def _yarn(
    frequencies: torch.Tensor, scaling: Mapping[str, Any], theta: float, head_dim: int
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4): interpolation by parts, and the attention temperature."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float64)
    interpolated = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies = frequencies * (1 - interpolated) + frequencies / factor * interpolated
    return frequencies, _yarn_temperature(factor, scaling)


def _yarn_temperature(factor: float, scaling: Mapping[str, Any]) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)


_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _kind(scaling: Mapping[str, Any], theta: float) -> str:
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling is {scaling!r}; it must be None or a mapping with 'rope_type'")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" and kind not in _NEEDED:
        raise ValueError(f"scaling has rope_type {kind!r}; it must be 'default', 'linear', 'llama3' or 'yarn'")
    for name in _NEEDED.get(kind, ()):
        if scaling.get(name) is None:
            raise ValueError(f"scaling of rope_type {kind!r} lacks {name!r}; it has {sorted(scaling)}")
        if not _checks.number(f"scaling[{name!r}]", scaling[name], finite=True) > 0:
            raise ValueError(f"scaling[{name!r}] is {scaling[name]!r}; it must be positive")
    if kind == "yarn" and theta == 1:
        raise ValueError("theta is 1 with scaling of rope_type 'yarn', which takes its logarithm; it must be another")
    return kind


def rope_table(
    head_dim: int,
    theta: float = 10_000.0,
    max_positions: int = 32_768,
    scaling: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cos and sin of every position's angles, computed in float64 and rounded once.

    The angle of pair i at position p is `p · theta^(−2i/head_dim)` (Su et al. 2021, section 3.2.2).

    Args:
        head_dim: D, even.
        theta: the base of the frequencies; 10,000 in Mistral 7B v0.1, 1,000,000 from v0.2 on.
        max_positions: P, the number of positions in the table.
        scaling: None, or what a Hugging Face config calls `rope_scaling`: a mapping with `rope_type` "default",
            "linear", "llama3" or "yarn" and that type's parameters.
        device: where the tables are put.
        dtype: float32 or, for float64 models, float64.

    Returns:
        `(cos, sin)`, each `[P, D/2]`.

    Raises:
        ValueError: an odd head_dim, a theta or max_positions that is not positive, an unknown or incomplete scaling.
        TypeError: a number, a mapping or a dtype that is none.
    """
    dim, rows, base = _checks.integer(head_dim), _checks.integer(max_positions), _checks.number("theta", theta)
    if dim is None or dim < 2 or dim % 2:
        raise ValueError(f"head_dim is {head_dim!r}; it must be an even int of at least 2")
    if not 0 < base < math.inf or rows is None or rows < 1:
        raise ValueError(
            f"theta is {theta!r} and max_positions {max_positions!r}; they must be positive, the latter int"
        )
    if dtype not in _checks.FLOATS:
        raise TypeError(f"dtype is {dtype}; it must be float32 or float64")
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    temperature = 1.0
    scaling = scaling or {}
    match _kind(scaling, base):
        case "linear":
            frequencies = _linear(frequencies, scaling)
        case "llama3":
            frequencies = _llama3(frequencies, scaling)
        case "yarn":
            frequencies, temperature = _yarn(frequencies, scaling, theta, head_dim)
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * frequencies
    cos, sin = (f(angles).mul_(temperature).to(device=device, dtype=dtype) for f in (torch.cos, torch.sin))
    return cos, sin
