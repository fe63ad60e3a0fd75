"""Checks of arguments, made before any work. Each error names the argument, what came and what is needed."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = (torch.Tensor, torch.nn.Parameter)


def shape(t: torch.Tensor) -> str:
    return f"[{', '.join(str(n) for n in t.shape)}]"


def plain(*tensors: torch.Tensor) -> bool:
    """Whether these are strided tensors on the CPU of one of the four dtypes, and of no class of their own.

    Then `floating` and `promote` have nothing to do, and a C++ kernel may be called past the dispatcher
    (`Op.plain`). False while tracing.
    """
    if torch.compiler.is_compiling() or type(tensors[0]) not in PLAIN:
        return False
    dtype = tensors[0].dtype
    for t in tensors:
        if type(t) not in PLAIN or t.dtype != dtype or not t.is_cpu or t.layout != torch.strided or t.is_neg():
            return False
    return dtype in FLOATS


def floating(**tensors: torch.Tensor | None) -> None:
    """Each is a tensor of float32, bfloat16, float16 or float64, all on one device."""
    first = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} is {t.dtype}; it must be float32, bfloat16, float16 or float64")
        if first is None:
            first = (name, t.device)
        elif t.device != first[1]:
            raise ValueError(f"{name} is on {t.device} but {first[0]} is on {first[1]}; they must be on one device")


def integral(device: torch.device, dtypes: tuple[torch.dtype, ...], **tensors: torch.Tensor | None) -> None:
    """Each is a tensor of one of `dtypes` on `device`."""
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor) or t.dtype not in dtypes:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} must be a tensor of {names}, not {getattr(t, 'dtype', type(t).__name__)}")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}; it must be on {device} with the others")


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
