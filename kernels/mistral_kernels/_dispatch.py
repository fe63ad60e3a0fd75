"""From a public function to the kernel that runs: the registered torch op, or the implementation asked for.

`impl=None` takes the production choice for the device of the inputs and, where that cannot do the case, the next
that can, always with the same meaning. A named implementation never falls back: what cannot run raises.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad, profiler

from . import _checks, _direct, _library

IMPLS = ("reference", "cpu", "cuda", "triton", "flash_attn")
SHORT_ELEMENTS = 2**23


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors here (TRITON_INTERPRET=1, which Triton reads at its own import)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


@functools.cache
def _triton_unusable() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install mistral-kernels[triton]"
    if not torch.cuda.is_available() and not triton_interpreted():
        return "no GPU is here, and Triton's interpreter is off (start Python with TRITON_INTERPRET=1 to try it)"
    return None


@functools.cache
def _gpu_too_old() -> str | None:
    if torch.cuda.get_device_capability() >= (8, 0):
        return None
    return "the GPU is older than compute capability 8.0"


def _cuda_unusable(op: str = "rms_norm") -> str | None:
    if _library.unusable is not None:
        return _library.unusable
    if _library.has_kernel(f"{op}_cuda", "CPU"):  # a library loaded beside ours runs the kernels without a GPU
        return None
    if not _library.has_kernel(f"{op}_cuda", "CUDA"):
        return "the library was built without CUDA C++ (install nvcc, then build again: docs/cuda.md)"
    return _gpu_too_old() if torch.cuda.is_available() else "no GPU is here"


def backends() -> dict[str, str | None]:
    """Each implementation, with None where it is usable on this machine and the reason where it is not.

    Returns:
        A dict from the names that `impl=` takes to None or a sentence.
    """
    return {
        "reference": None,
        "cpu": _library.unusable,
        "cuda": _cuda_unusable(),
        "triton": _triton_unusable(),
        "flash_attn": _flash().unusable(),
    }


def _flash() -> Any:
    return importlib.import_module(".attention.flash", __package__)


def _tensors(args: tuple) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor)]


def _contiguous(eager: Callable) -> Callable:
    """Eager arithmetic keeps the strides of its inputs; the ops promise contiguous outputs.

    Autocast is off within: which inputs it casts is settled before, for every implementation alike, and the float32
    arithmetic inside is meant.
    """

    @functools.wraps(eager)
    def run(*args: Any) -> Any:
        device = _tensors(args)[0].device.type
        if _checks.autocast_is_on(device):
            with torch.autocast(device, enabled=False):
                result = eager(*args)
        else:
            result = eager(*args)
        if isinstance(result, tuple):
            return tuple(t.contiguous() for t in result)
        return result if result is None else result.contiguous()

    return run


def _supports_any(*args: Any) -> str | None:
    return None


def _never(*args: Any) -> bool:
    return False


def always(*args: Any) -> bool:
    return True


def short(x: torch.Tensor, *args: Any) -> bool:
    """Whether an elementwise kernel on x is over before Triton's launch from Python is."""
    return x.numel() <= SHORT_ELEMENTS


class Op:
    """One registered torch op with the implementations behind it.

    Args:
        schema: the op's schema without namespace, as `torch.library` takes it.
        eager: the eager version on the op's own arguments; it defines what the op means.
        fake: shapes, dtypes and strides of the outputs.
        composite: a version in torch ops that beats the eager one; it stands in for C++ and for Triton.
        triton: "module:function" of the Triton launcher below this package, imported when first called.
        triton_supports: returns why Triton cannot do these arguments, or None.
        cuda: whether the op is written in CUDA C++.
        cuda_first: whether for these arguments the automatic choice on a GPU is CUDA C++ before Triton, where both
            can: a launch by Triton, from Python, takes longer than a short kernel (docs/gpu.md has both).
        cuda_supports: returns why that cannot do these arguments, or None.
        flash, flash_supports: functions of `attention.flash`: the op by flash-attn, called as it is, so that autograd
            sees flash-attn's own operators; and why that cannot do these arguments, or None.
        hidden: so many of the last outputs are for the backward alone.
        casts: whether the public function casts its arguments under autocast.
        setup_context, backward: as `torch.library.register_autograd` takes them; ctx.impl is "triton" or "cuda" where
            that was asked for, else None. An op without a backward raises when it is differentiated.

    Attributes:
        at_once: what the C++ kernel makes of arguments that nobody has checked, without the outputs for the backward.
            None where it refuses them, to be checked with better words, and where somebody would see or differentiate
            the call. Not for code that is being compiled.
        first_at_once: the same, the first output alone.
    """

    def __init__(
        self,
        schema: str,
        *,
        eager: Callable,
        fake: Callable,
        composite: Callable | None = None,
        triton: str | None = None,
        triton_supports: Callable[..., str | None] = _supports_any,
        cuda: bool = False,
        cuda_first: Callable[..., bool] = _never,
        cuda_supports: Callable[..., str | None] = _supports_any,
        flash: str | None = None,
        flash_supports: str = "supports",
        hidden: int = 0,
        casts: bool = False,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
    ):
        self.name, _, self._signature = schema.partition("(")
        self._mutable = "!" in schema
        self.eager = _contiguous(eager)
        self._composite = composite is not None
        self._torch = self.eager if composite is None else _contiguous(composite)
        self._fake, self._setup_context, self._backward = fake, setup_context, backward
        self._triton_path, self._triton_supports = triton, triton_supports
        self._cuda_first, self._cuda_supports = cuda_first, cuda_supports
        self._flash, self._flash_supports = flash, flash_supports
        self._functions: dict[Any, Any] = {}
        self._transformed: dict[Any, Any] = {}
        self._auto = self._register(self.name, None)
        self.compiled = _library.has_kernel(self.name, "CPU")
        outputs = len(self._auto._schema.returns)
        self.at_once, self._run_directly = _direct.calls(self._auto, outputs - hidden, casts)
        self.first_at_once, _ = _direct.calls(self._auto, min(outputs, 1), casts)
        if not self.compiled:
            _library.library.impl(self.name, self._torch, "CPU")
        if not _library.has_kernel(self.name, "CUDA"):
            _library.library.impl(self.name, self._run_on_gpu, "CUDA")
        self._triton = None
        if triton is not None:
            self._triton = self._register(self.name + "_triton", "triton")
            _library.library.impl(self.name + "_triton", self._run_triton, "CompositeExplicitAutograd")
        self._cuda = self._register(self.name + "_cuda", "cuda") if cuda else None

    def _register(self, name: str, impl: str | None) -> Any:
        _library.library.define(f"{name}({self._signature}")
        qualified = f"{_library.NAMESPACE}::{name}"
        torch.library.register_fake(qualified, self._fake, lib=_library.library)
        op = getattr(getattr(torch.ops, _library.NAMESPACE), name).default
        if not self._mutable:
            backward = self._backward or functools.partial(_not_differentiable, self.name)
            setup = self._setup_context and functools.partial(_set_up, self._setup_context, impl)
            torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library.library)
            self._transformed[op] = _transformed(op, setup, backward)
            if setup is not None:
                run = functools.partial(self._below_autograd, op)
                self._functions[op] = _function(op._opname, run, setup, backward)
        return op

    @functools.cached_property
    def _launcher(self) -> Callable:
        module, _, function = str(self._triton_path).partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), function)

    def _run_triton(self, *args: Any) -> Any:
        return self._launcher(*args)

    def _triton_reason(self, args: tuple) -> str | None:
        """Why Triton cannot run these arguments here, or None."""
        if self._triton is None:
            return "not written in Triton"
        if (reason := _triton_unusable()) is not None:
            return reason
        tensors = _tensors(args)
        if tensors[0].device.type != "cuda" and not triton_interpreted():
            return f"the inputs are on {tensors[0].device.type}"
        if any(t.dtype == torch.float64 for t in tensors):
            return "it has no float64"
        return self._triton_supports(*args)

    @functools.cached_property
    def _cuda_on_gpu(self) -> str | None:
        """Why CUDA C++ cannot run on the GPU here, or None; asked once, since the answer takes longer than a launch."""
        return _cuda_unusable(self.name)

    def _cuda_reason(self, args: tuple) -> str | None:
        """Why CUDA C++ cannot run these arguments here, or None."""
        if self._cuda is None:
            return "not written in CUDA C++"
        tensors = _tensors(args)
        device = tensors[0].device.type
        reason = self._cuda_on_gpu if device == "cuda" else _cuda_unusable(self.name)
        if reason is not None:
            return reason
        if device not in ("meta", "cuda") and not _library.has_kernel(f"{self.name}_cuda", device.upper()):
            return f"the inputs are on {device}"
        if any(t.dtype == torch.float64 for t in tensors):
            return "it has no float64"
        return self._cuda_supports(*args)

    def _flash_reason(self, args: tuple) -> str | None:
        """Why flash-attn cannot run these arguments here, or None."""
        if self._flash is None:
            return "not in flash-attn"
        reason: str | None = _flash().unusable() or getattr(_flash(), self._flash_supports)(*args)
        return reason

    def _run_on_gpu(self, *args: Any) -> Any:
        choices = [(self._triton_reason, self._run_triton), (self._cuda_reason, self._cuda)]
        for reason, run in reversed(choices) if self._cuda_first(*args) else choices:
            if reason(args) is None:
                return run(*args)  # type: ignore[misc]
        return self._torch(*args)

    def like_forward(self, impl: str | None, *args: Any) -> Any:
        """This op, a backward, in the implementation that its forward ran in; where that cannot, the automatic one."""
        return self(impl if impl is not None and self._reason(impl, args) is None else None, *args)

    def _cpu_reason(self, args: tuple) -> str | None:
        if not self._composite:
            if _library.unusable is not None:
                return _library.unusable
            if not self.compiled:
                return "not written in C++"
        if (device := _tensors(args)[0].device.type) not in ("cpu", "meta"):
            return f"the inputs are on {device}"
        return None

    def _reason(self, impl: str, args: tuple) -> str | None:
        """Why this implementation cannot run these arguments, or None."""
        if impl == "reference":
            return None
        reason: str | None = getattr(self, f"_{impl.removesuffix('_attn')}_reason")(args)
        return reason

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """Each implementation of this op, with None or why it cannot run these arguments."""
        return {impl: self._reason(impl, args) for impl in IMPLS}

    def __call__(self, impl: str | None, *args: Any) -> Any:
        if impl is None:
            return self._call(self._auto, args)
        if impl == "reference":
            return self.eager(*args)
        if impl not in IMPLS or self._reason(impl, args) is not None:
            raise _unusable(self.name, impl, self.reasons(*args) if impl in IMPLS else {})
        if impl == "flash_attn":
            return getattr(_flash(), str(self._flash))(*args)
        return self._call({"triton": self._triton, "cuda": self._cuda}.get(impl, self._auto), args)

    def _call(self, op: Any, args: tuple) -> Any:
        """Calls `op` past its registered autograd, which is Python: alone where nothing is differentiated, else as the
        function of the same formula. Tracing sees the registered one, torch.func's transforms one of their form."""
        if torch.compiler.is_compiling():
            return op(*args)
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(t).tangent is not None for t in _tensors(args)
        ):
            raise NotImplementedError(f"{op}: forward-mode differentiation (jvp) is not there; impl='reference' has it")
        if self._mutable:
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return self._transformed[op].apply(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            function = self._functions.get(op)
            return op(*args) if function is None else function.apply(*args)
        return self._below_autograd(op, args)

    def _below_autograd(self, op: Any, args: tuple) -> Any:
        """Runs `op`. On a GPU the dispatcher would come back to `_run_on_gpu`, through a slow door, and to a kernel in
        C++ it is the longer way: where nothing else listens, they are called at once."""
        if op is self._auto:
            if args[0].is_cuda:
                if not _something_listens() and _as_they_are(_tensors(args)):
                    with torch._C._AutoDispatchBelowAutograd():
                        return self._run_on_gpu(*args)
            elif (done := self._run_directly(*args)) is not None:
                return done
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)


def _as_they_are(args: Iterable[Any]) -> bool:
    """Whether a kernel may take these past the dispatcher: no tensor is of another class, and none holds its values
    negated, as a view by `imag` may."""
    for a in args:
        if type(a) in _checks.PLAIN:
            if a.is_neg():
                return False
        elif isinstance(a, torch.Tensor):
            return False
    return True


def _something_listens() -> bool:
    """Whether a mode, a transform of torch.func, a tracer or the profiler would see a call through the dispatcher."""
    return any(listener() for listener in _direct.LISTENERS) or profiler._is_profiler_enabled


def _set_up(save: Callable, impl: str | None, ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.impl = impl
    save(ctx, inputs, output)


def _function(name: str, run: Callable, setup: Callable, backward: Callable) -> Any:
    """The registered formula as an `autograd.Function` that runs the op below autograd: half the time of the registered
    one, which goes back through the dispatcher in Python."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = run(args)
        setup(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _transformed(op: Any, setup: Callable | None, backward: Callable) -> Any:
    """The registered formula in the form that torch.func's grad, vjp, jacrev and vmap take."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        if setup is not None:
            setup(ctx, inputs, output)

    members = {
        "forward": staticmethod(lambda *args: op(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    return type(op._opname, (torch.autograd.Function,), members)


def _unusable(op: str, impl: str, reasons: dict[str, str | None]) -> Exception:
    if impl not in IMPLS:
        return ValueError(f"impl is {impl!r}; it must be None or one of {', '.join(map(repr, IMPLS))}")
    able = ", ".join(name for name, reason in reasons.items() if reason is None)
    return NotImplementedError(f"{op}: impl={impl!r} cannot run here: {reasons[impl]}; able here: {able}")


def _not_differentiable(op: str, *_: Any) -> Any:
    raise NotImplementedError(f"mistral_kernels::{op} cannot be differentiated (no second derivatives, no caches)")


def check_impl(impl: str | None) -> None:
    """Raises unless `impl` is None or usable on this machine.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: a known one that cannot run here, with the reason and those that can.
    """
    if impl in (None, "reference"):
        return
    reasons = backends()
    if impl not in reasons or reasons[impl] is not None:
        raise _unusable("mistral_kernels", impl, reasons)
