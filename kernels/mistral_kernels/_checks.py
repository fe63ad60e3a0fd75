"""Checks of arguments, made before any work. Each error names the argument, what came and what is needed."""

import math
import operator
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(t: torch.Tensor) -> str:
    return f"[{', '.join(str(n) for n in t.shape)}]"


def given(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Of arguments that may be left out those that are there."""
    return {name: t for name, t in tensors.items() if t is not None}


def floating(**tensors: torch.Tensor) -> None:
    """Each is a tensor of float32, bfloat16, float16 or float64, all on one device."""
    first = None
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} is {t.dtype}; it must be float32, bfloat16, float16 or float64")
        if t.layout is not torch.strided:
            raise TypeError(f"{name} has layout {t.layout}; it must be a dense tensor, torch.strided")
        if first is None:
            first = (name, t.device)
        elif t.device != first[1]:
            raise ValueError(f"{name} is on {t.device} but {first[0]} is on {first[1]}; they must be on one device")


def integral(device: torch.device, dtypes: tuple[torch.dtype, ...], **tensors: torch.Tensor) -> None:
    """Each is a tensor of one of `dtypes` on `device`."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} must be a tensor of {names}, not {getattr(t, 'dtype', type(t).__name__)}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}; it must be on {device} with the others")


def may_look(t: torch.Tensor) -> bool:
    """Whether the values of `t` can be looked up here without waiting for a device: not where calls are traced, and
    not where there are none, as in a FakeTensor or under vmap."""
    return (
        t.device.type == "cpu"
        and type(t) in PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def number(name: str, value: Any, finite: bool = False) -> float:
    """`value` as a float; a string is no number."""
    try:
        if isinstance(value, str):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r}; it must be a number") from None
    if finite and not -math.inf < result < math.inf:  # unlike math.isfinite, for a float that torch.compile traces too
        raise ValueError(f"{name} is {value!r}; it must be finite")
    return result


def integer(value: Any) -> int | None:
    """`value` as an int, NumPy's integers too, or None for anything else; True and False are no numbers."""
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        return None if isinstance(value, bool | torch.Tensor) else operator.index(value)
    except TypeError:
        return None


def flag(name: str, value: Any) -> bool:
    """`value` as a bool; what is not True, False, 1 or 0 is an error, and None too."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) or value not in (0, 1):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def same_shape(**tensors: torch.Tensor) -> None:
    (first, a), *others = tensors.items()
    for name, t in others:
        if t.shape != a.shape:
            raise ValueError(f"{name} is {shape(t)} but {first} is {shape(a)}; the shapes must be equal")


def promote(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that eager arithmetic between them would give."""
    dtype = tensors[0].dtype
    if all(t.dtype == dtype for t in tensors):
        return tensors
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for a type of device; torch raises for those that have none, such as meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast hands them to a matrix product: in its dtype where it is on, float64 as it is."""
    device = tensors[0].device.type
    if not autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def as_dtype(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`t.to(dtype)`, which takes 0.8 µs where there is nothing to convert (Zen 5)."""
    return t if t.dtype == dtype else t.to(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """`t` itself where its last dimension has stride 1, else a contiguous copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def no_gradient(op: str, **tensors: torch.Tensor | None) -> None:
    """None of them is being differentiated: the caches are written in place and carry no gradient."""
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise NotImplementedError(f"{op} has no derivative, but {name} requires one; use torch.no_grad()")
