"""Triton's interpreter without what it does in vain: the same bits in less than half the time.

It replaces the functions of the language anew at every call of a device function, and looks at the range of every
integer sum by six operations of its own, to tell nobody.
"""

import functools


def install() -> None:
    """Does nothing where the interpreter is another than the one that this was written for."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    semantic = getattr(interpreter, "interpreter_semantic", None)
    if hasattr(semantic, "binary_op_sanitize_overflow_impl") and not semantic.builder.options.debug:
        semantic.binary_op_sanitize_overflow_impl = lambda *_: None  # what it finds is told with "debug" alone
    if hasattr(interpreter, "_LangPatchScope"):
        _once_a_launch(interpreter)
    _made_once()
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)


def _once_a_launch(interpreter) -> None:
    """A launch replaces the language's functions and restores them at its end; device functions find them replaced,
    and replace them once more only where their module is the first of its kind."""
    replace, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launches: list[set[int]] = []

    def once(fn):
        if not launches:
            return replace(fn)
        if id(fn.__globals__) in launches[-1]:
            return interpreter._LangPatchScope()
        launches[-1].add(id(fn.__globals__))
        return replace(fn)

    @functools.wraps(run)
    def launch(*args, **kwargs):
        launches.append(set())
        try:
            return run(*args, **kwargs)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch


def _made_once() -> None:
    """Types of blocks, and what a tensor takes from its type, are the same for the same shape."""
    import triton.language as tl

    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[tuple, dict] = {}

    @functools.wraps(make_block)
    def block(self, element_ty, shape):
        if type(element_ty) is not tl.dtype:
            return make_block(self, element_ty, shape)
        key = element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        if (made := blocks.get(key)) is None:
            make_block(self, element_ty, shape)
            made = blocks[key] = dict(self.__dict__, of_tensor={})
        self.__dict__.update(made)

    @functools.wraps(make_tensor)
    def tensor(self, handle, type):
        made = type.__dict__.get("of_tensor")
        if not made:
            make_tensor(self, handle, type)
            if made is not None:
                made.update({n: v for n, v in self.__dict__.items() if n not in ("handle", "type")})
            return
        self.__dict__.update(made, handle=handle, type=type)

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor


def _remembered(original):
    import triton.language as tl

    by_name = functools.cache(lambda name: original(tl.dtype(name)))
    return lambda kind: by_name(kind.name) if type(kind) is tl.dtype else original(kind)
