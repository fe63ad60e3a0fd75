"""Which methods of a model are replaced, and how they are put back."""

import dataclasses
import importlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .._using import using
from . import parts, pickles, sources

OPS = ("rms_norm", "add_rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy")
OLDEST = (5, 20)
# What replaces a forward of which form: (op, forms, maker).
_FORWARDS: tuple[tuple[str, tuple[str, ...], Callable], ...] = (
    ("rms_norm", (sources.RMS_NORM,), parts.rms_norm_forward),
    ("swiglu", (sources.MLP, sources.MLP_RETURNED), parts.mlp_forward),
    ("swiglu", (sources.MLP_PACKED,), parts.packed_mlp_forward),
    ("add_rms_norm", (sources.LAYER,), parts.layer_forward),
    ("linear_cross_entropy", (sources.CAUSAL_LM, sources.CAUSAL_LM_SLICED), parts.causal_lm_forward),
)
# Where a model would have a part of that op: the ends of class names.
_ENDS = {
    "rms_norm": ("RMSNorm", "LayerNorm"),
    "swiglu": ("MLP",),
    "add_rms_norm": ("DecoderLayer",),
    "linear_cross_entropy": ("ForCausalLM",),
    "rope": ("Attention",),
}
_OTHER_NORM = "the norm behind its addition is none that the op is known to compute"
_PREVIOUS = "_mistral_kernels_previous_attention"
_classes: dict[type, dict[str, Any]] = {}  # patched classes: the attributes that their own __dict__ had, or _ABSENT
_ABSENT = object()


@dataclasses.dataclass
class Report:
    """What `patch` did.

    `replaced` names the op that each module (or class) now runs on, `left` why a part of that kind was not replaced.
    """

    replaced: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(op for ops in self.replaced.values() for op in ops.split(", "))
        lines = ["replaced: " + (", ".join(f"{n} × {op}" for op, n in sorted(counts.items())) or "nothing")]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def need_transformers() -> Any:
    """transformers, of a version that this works with."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers cannot be imported ({error}); pip install mistral-kernels[hf]") from error
    version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"transformers is {transformers.__version__}; it must be {needed} or later")
    return transformers


def _wanted(ops: Iterable[str] | str | None) -> frozenset[str]:
    chosen = OPS if ops is None else (ops,) if isinstance(ops, str) else tuple(ops)
    for op in chosen:
        if op not in OPS:
            raise ValueError(f"ops holds {op!r}; it must be of {', '.join(map(repr, OPS))}")
    return frozenset(chosen)


def _function(made: Any) -> Any:
    """The function that the package `kernels`, where installed, wraps into a module to make it replaceable."""
    if not isinstance(made, nn.Module):
        return made
    forward: Any = type(made).forward
    captured = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return captured["func"].cell_contents if "func" in captured else made


def _known_rope(module: Any) -> str | None:
    """Why `apply_rotary_pos_emb` of a modeling file cannot be replaced, or None."""
    apply = _function(getattr(module, "apply_rotary_pos_emb", None))
    if apply is None:
        return "its module has no apply_rotary_pos_emb"
    if not sources.same(apply, sources.ROPE) or not sources.same(
        getattr(module, "rotate_half", None), sources.ROTATE_HALF
    ):
        return "its apply_rotary_pos_emb is not the one that rope computes"
    tables: list[Any] = [c for n, c in vars(module).items() if n.endswith("RotaryEmbedding") and isinstance(c, type)]
    if not tables or not all(sources.same(c.forward, sources.ROPE_TABLE) for c in tables):
        return "its cos and sin tables are not known to repeat their first half"
    return None


def _rope_forward(cls: type, ops: Any) -> tuple[Callable | None, str | None]:
    function: Any = cls.forward  # type: ignore[attr-defined]
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return None, "its forward is wrapped"
    if "apply_rotary_pos_emb" not in function.__code__.co_names:
        return None, "its forward calls no apply_rotary_pos_emb"
    reason = _known_rope(sys.modules.get(cls.__module__))
    if reason is not None:
        return None, reason
    return parts.rebound(function, apply_rotary_pos_emb=parts.apply_rotary(ops)), None


def _base(cls: type) -> type:
    """The class whose own `__dict__` has the forward (FSDP and others derive one that has none)."""
    return next((c for c in cls.__mro__ if "forward" in c.__dict__), cls)


def _is_rms_norm(cls: type) -> bool:
    cls = _base(cls)
    if sources.same(cls.__dict__.get("forward"), sources.RMS_NORM):
        parts.NORM_TYPES.add(cls)
    return cls in parts.NORM_TYPES


def _marked(forward: Callable, cls: type, op: str, impl: str | None, instance: bool) -> Callable:
    wrap = parts.checkpointed if instance else parts.checkpointed_class
    return parts.marked(wrap(forward, cls), op, impl)


def replacement(
    cls: type, ops: Any, wanted: frozenset[str], instance: bool
) -> tuple[str, Callable | None, str | None] | None:
    """(op, new forward, None) or (op, None, why not) of a class; None where no op is concerned.

    instance: the forward is for an instance, not for the class.
    """
    cls = _base(cls)
    forward = cls.__dict__.get("forward")
    if parts.is_marked(forward):
        return parts.part_of(forward)[0], None, "it is patched already"
    for op, forms, make in _FORWARDS:
        if sources.same(forward, *forms):
            _is_rms_norm(cls)
            return (op, _marked(make(ops, forward), cls, op, ops.impl, instance), None) if op in wanted else None
    for op, ends in _ENDS.items():
        if op not in wanted or not cls.__name__.endswith(ends):
            continue
        if op == "rope":
            new, reason = _rope_forward(cls, ops)
            return op, new and _marked(new, cls, op, ops.impl, instance), reason
        return op, None, "its forward is none that the op is known to compute"
    return None


def _slot(module: nn.Module) -> tuple[str | None, str | None]:
    """Where an instance's forward is replaced, and why it cannot be."""
    if "_hf_hook" in module.__dict__:  # accelerate keeps the forward that its hook calls there
        current = module.__dict__.get("_old_forward")
        return ("_old_forward", None) if not parts.is_marked(current) else (None, "it is patched already")
    current = module.__dict__.get("forward")
    if current is None:
        return "forward", None
    return None, "it is patched already" if parts.is_marked(current) else "its forward was replaced by something else"


def _patch_modules(root: nn.Module, ops: Any, wanted: frozenset[str], report: Report) -> None:
    made: dict[type, Any] = {}
    for name, module in root.named_modules():
        cls = type(module)
        if cls not in made:
            made[cls] = replacement(cls, ops, wanted, instance=True)
        if made[cls] is None:
            continue
        op, new, reason = made[cls]
        slot, taken = _slot(module) if new is not None else (None, reason)
        if op == "add_rms_norm" and slot and not _is_rms_norm(type(getattr(module, "post_attention_layernorm", None))):
            slot, taken = None, _OTHER_NORM
        if op == "swiglu" and slot and not parts.has_silu(module):
            slot, taken = None, "its activation is not SiLU"
        label = name or cls.__name__
        if slot is None:
            report.left[label] = f"{op}: {taken}"
            continue
        module.__dict__[slot] = types.MethodType(new, module)
        report.replaced[label] = op


def _pretrained(root: nn.Module) -> list[Any]:
    """The outermost transformers models in `root` (PEFT and others wrap them)."""
    base = need_transformers().PreTrainedModel
    found: list[Any] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, base):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(root)
    return found


def _uses_interface(model_class: type) -> bool:
    return bool(getattr(model_class, "_supports_attention_backend", False))


def _patch_attention(root: nn.Module, impl: str | None, report: Report) -> None:
    from .attention import register

    name = register(impl)
    for model in _pretrained(root):
        label = f"{type(model).__name__}.config"
        if not _uses_interface(type(model)):
            report.left[label] = "attention: the model does not call it through AttentionInterface"
        elif _PREVIOUS in model.__dict__ or model.config._attn_implementation == name:
            report.left[label] = "attention: it is patched already"
        else:
            previous = pickles.Previous(model.config._attn_implementation, impl)
            model.set_attn_implementation(name)
            model.__dict__[_PREVIOUS] = previous
            report.replaced[label] = "attention"


def _replace_on_class(cls: type, name: str, value: Any) -> None:
    _classes.setdefault(cls, {}).setdefault(name, cls.__dict__.get(name, _ABSENT))
    setattr(cls, name, value)


def _default_attention(cls: Any, impl: str | None) -> None:
    """Makes the attention the default of a model class, as "sdpa" is transformers'; what a user names stays."""
    from .attention import register

    name, original = register(impl), cls.get_correct_attn_implementation

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        asked = name if requested_attention is None else requested_attention
        return original(self, asked, is_init_check)

    _replace_on_class(
        cls, "get_correct_attn_implementation", parts.marked(get_correct_attn_implementation, "attention")
    )


def _family(name: str) -> Any:
    cls = getattr(need_transformers(), name, None)
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return _home(cls)
    folder = name.replace("-", "_")
    try:
        return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("transformers.models."):
            raise
        raise ValueError(
            f"model is {name!r}; a name must be that of a model class of transformers, or of a folder of"
            " transformers.models, such as 'mistral'"
        ) from error


def _home(cls: type) -> Any:
    """The modeling file of a class; of a class that adds no forward of its own, that of the one it is derived from."""
    inside = (c for c in cls.__mro__ if "forward" in c.__dict__ or c.__module__.startswith("transformers.models."))
    return sys.modules[next(inside, cls).__module__]


def _patch_classes(module: Any, ops: Any, wanted: frozenset[str], impl: str | None, report: Report) -> None:
    base = need_transformers().PreTrainedModel
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    for cls in (c for c in own if issubclass(c, nn.Module)):
        made = replacement(cls, ops, wanted, instance=False) if "forward" in cls.__dict__ else None
        if made is not None and made[1] is not None and made[0] == "add_rms_norm" and not any(map(_is_rms_norm, own)):
            made = "add_rms_norm", None, _OTHER_NORM
        if made is not None and made[1] is not None:
            _replace_on_class(cls, "forward", made[1])
            report.replaced[cls.__name__] = made[0]
        elif made is not None:
            report.left[cls.__name__] = f"{made[0]}: {made[2]}"
        if "attention" not in wanted or not issubclass(cls, base) or base not in cls.__bases__:
            continue
        if cls in _classes and "get_correct_attn_implementation" in _classes[cls]:
            report.left[cls.__name__] = "attention: it is patched already"
        elif not _uses_interface(cls):
            report.left[cls.__name__] = "attention: the model does not call it through AttentionInterface"
        else:
            _default_attention(cls, impl)
            report.replaced[cls.__name__] = "attention"


def patch(model: Any, *, ops: Iterable[str] | str | None = None, impl: str | None = None) -> Report:
    """Makes a Hugging Face model run on these ops: an instance alone, or classes and what is built from them.

    A method is replaced only where its source is known to compute what the op computes; all else is left and named.
    RMSNorm, the residual addition with the RMSNorm behind it, the rotary embedding, SwiGLU and attention keep their
    module's inputs and outputs. With labels in training the loss is formed without the logits, which are then None;
    `forward(..., skip_logits=False)` asks for them, `skip_logits=True` drops them in evaluation too.

    Args:
        model: a model (also wrapped by PEFT, accelerate, FSDP2 or torch.compile); or a model class, or the name of
            one, or of a folder of `transformers.models` such as "mistral": then the classes of that modeling file are
            patched.
            Models built from them before are patched with them, up to their attention, which they looked up when
            they were built.
        ops: which of "rms_norm", "add_rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy"; None for all.
        impl: None for the fastest that can, or "reference", "cpu", "triton".

    Returns:
        A Report of what was replaced and what was left, and why; print it.

    Raises:
        ImportError: transformers is missing or older than 5.20.
        TypeError: `model` is none of these.
        ValueError: an unknown name in `ops` or `impl`, or of a family.
        NotImplementedError: `impl` cannot run here.
    """
    wanted, bound, report = _wanted(ops), using(impl), Report()
    if isinstance(model, nn.Module):
        pickles.register()
        _patch_modules(model, bound, wanted, report)
        if "attention" in wanted:
            _patch_attention(model, impl, report)
    else:
        _patch_classes(_module_of(model), bound, wanted, impl, report)
    return report


def _module_of(model: Any) -> Any:
    if isinstance(model, str):
        return _family(model)
    if isinstance(model, type) and issubclass(model, nn.Module):
        return _home(model)
    raise TypeError(f"model is {type(model).__name__}; it must be a model, a model class or the name of a family")


def unpatch(model: Any) -> None:
    """Takes back what `patch` did to the same model, class or family; the model computes bitwise what it did before.

    Raises:
        RuntimeError: another library replaced a forward after `patch`, on top of it: undo that first.
        TypeError, ValueError: as `patch`.
    """
    if isinstance(model, nn.Module):
        _unpatch_modules(model)
        return
    module = _module_of(model)
    for cls in [c for c in _classes if c.__module__ == module.__name__]:
        for name, old in _classes.pop(cls).items():
            if old is _ABSENT:
                delattr(cls, name)
            else:
                setattr(cls, name, old)


def _unpatch_modules(root: nn.Module) -> None:
    for name, module in root.named_modules():
        own = module.__dict__
        if parts.is_marked(own.get("forward")):
            del own["forward"]
        if parts.is_marked(own.get("_old_forward")):
            if "_hf_hook" not in own:
                raise RuntimeError(f"{name or type(module).__name__}: its forward was replaced on top of the patch")
            own["_old_forward"] = types.MethodType(type(module).forward, module)
    for model in _pretrained(root):
        previous = model.__dict__.pop(_PREVIOUS, None)
        if previous is not None:
            model.set_attn_implementation(previous.name)
