"""Calls of the C++ kernels past torch's dispatcher, by a small extension module (csrc/python) beside the library.

They take plain CPU tensors as they are. Whatever else comes, and whenever a mode, a transform, a tracer or the profiler
would see the call, they answer None, and the caller goes through the dispatcher.
"""

import ctypes
import functools
import importlib.util
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from . import _library

PATH = Path(__file__).with_name("_calls.abi3.so")
LETTERS = {"Tensor": "T", "Optional[Tensor]": "O", "float": "f", "int": "i", "bool": "b"}
DEFAULTED = {"scale": "d"}  # floats for which kernels take None, too
LISTENERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
)

Call = Callable[..., Any]


def never(*args: Any) -> None:
    """Stands in where there is no such way."""


@functools.cache
def _module() -> Any:
    """The extension module, or None where it was not built or cannot be used."""
    if _library.unusable is not None or not PATH.exists() or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    spec = importlib.util.spec_from_file_location(f"{__package__}._calls", PATH)
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        exchange = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
        from_pointers = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs  # type: ignore[attr-defined]
        kinds = (torch.Tensor, torch.nn.Parameter)
        _address()
        differentiated = (torch.is_grad_enabled, torch._C.TensorBase.requires_grad)
        flags = (vars(profiler), vars(forward_ad))
        module.ask(
            exchange, *kinds, from_pointers, *differentiated, torch._C._is_any_autocast_enabled, LISTENERS, *flags
        )
    except (ImportError, AttributeError) as error:
        warnings.warn(f"short calls of mistral_kernels are slower: {error}", RuntimeWarning, stacklevel=2)
        return None
    return module


@functools.cache
def _address() -> Any:
    find = ctypes.CDLL(str(_library.path)).mistral_kernels_direct
    find.argtypes, find.restype = [ctypes.c_char_p], ctypes.c_void_p
    return find


def calls(op: Any, shown: int, casts: bool) -> tuple[Call, Call]:
    """Two functions of the arguments of a registered op, which return None where it has to go through the dispatcher.

    Args:
        op: the overload, as in `torch.ops.mistral_kernels.rms_norm.default`.
        shown: so many of its first outputs are wanted above autograd.
        casts: whether autocast would see to its arguments.

    Returns:
        `at_once`, for calls that autocast and autograd would look at: also None where autocast is on, where a tensor
        requires a gradient and where the kernel refuses its arguments; with the outputs shown. And
        `below_autograd`, for calls that they have looked at: all outputs, and RuntimeError where the kernel refuses.
    """
    letters = [DEFAULTED.get(a.name) or LETTERS.get(str(a.type), "") for a in op._schema.arguments]
    if _module() is None or not all(letters):
        return never, never
    address = _address()(op._schema.name.partition("::")[2].encode())
    if address is None:
        return never, never
    pair: tuple[Call, Call] = _module().kernel(address, "".join(letters), len(op._schema.returns), shown, casts)
    return pair
