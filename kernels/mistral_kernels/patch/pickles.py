"""Patched models through `pickle`, `torch.save` and processes that are spawned: they arrive patched.

A bound method is pickled as the name of its function on its object. For a forward that lies in the instance that name
means the class's own, so the replaced ones are made again where they are loaded.
"""

import copyreg
import types
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import nn

from . import parts


class Previous:
    """The attention that a model had before, and the implementation of the one that it has."""

    def __init__(self, name: str | None, impl: str | None):
        self.name, self.impl = name, impl

    def __reduce__(self) -> Any:
        return _previous, (self.name, self.impl)


def _previous(name: str | None, impl: str | None) -> Previous:
    from .attention import register

    register(impl)
    return Previous(name, impl)


def _forward(module: nn.Module, impl: str | None) -> Any:
    """The forward that stands in for that of `module`, of which no more than the class is known yet."""
    from .._using import using
    from .patching import OPS, replacement

    cls = type(module)
    made = replacement(cls, using(impl), frozenset(OPS), instance=True)
    if made is None or (made[1] is None and not parts.is_marked(cls.forward)):
        raise RuntimeError(f"{cls.__name__} was patched where it was pickled, and cannot be here")
    return types.MethodType(made[1] or cls.forward, module)


def _reduce(method: types.MethodType) -> Any:
    if parts.is_marked(method.__func__) and isinstance(method.__self__, nn.Module):
        return _forward, (method.__self__, parts.part_of(method.__func__)[1])
    return method.__reduce__()


def register() -> None:
    """Makes every pickler of this process know replaced forwards; other methods are pickled as ever."""
    copyreg.pickle(types.MethodType, _reduce)  # type: ignore[arg-type]
    ForkingPickler.register(types.MethodType, _reduce)
