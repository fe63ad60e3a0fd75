"""python -m mistral_kernels.tune: times the tiles of the attention kernels on this GPU and keeps the fastest.

    python -m mistral_kernels.tune                  all kernels; the launchers use what was found from then on
    python -m mistral_kernels.tune --show           the file and what it says
    python -m mistral_kernels.tune --delete         back to the built-in configurations
    python -m mistral_kernels.tune --cache FOLDER   another folder, which mistral_kernels._tuned.use(FOLDER) then reads

A candidate counts where its results pass the parity rule of `mistral_kernels.testing`; one that does not compile, or
wants more shared memory than the GPU has, is passed over.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

try:
    from . import _tuned
except ImportError as error:
    raise ImportError(f"mistral_kernels.tune needs Triton ({error}); pip install mistral-kernels[triton]") from None
from . import testing
from ._dispatch import backends, triton_interpreted
from .attention import reference
from .attention.triton_blocks import Config, family

KERNELS = ("attention_forward", "attention_dq", "attention_dkv")
DIMS = (64, 128, 256)
Timer = Callable[[Callable[[], Any]], float]


def seconds(run: Callable[[], Any]) -> float:
    """The median of Triton's own benchmark, which clears the L2 cache between runs."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median") / 1e3


def candidates(kernel: str, device_family: int, dim: int, itemsize: int) -> list[Config]:
    """The built-in choice first, then other tiles that were seen to compile without spills on some GPU."""
    if itemsize == 4:
        tiles = [(32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)]
    elif kernel == "attention_forward":
        tiles = [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)]
        tiles += [(128, 64, 4, 3), (128, 32, 4, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2)]
    elif kernel == "attention_dq":
        tiles = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)]
    else:
        tiles = [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 32, 8, 2)]
    modern = device_family >= 90 and itemsize == 2
    tmas = (True, False) if modern else (False,)
    lags = (False, True) if modern and kernel == "attention_forward" else (False,)
    found = [Config(*tile, tma=tma, lag=lag) for tile in tiles for tma in tmas for lag in lags]
    return list(dict.fromkeys([built_in(kernel, device_family, dim, itemsize), *found]))


def built_in(kernel: str, device_family: int, dim: int, itemsize: int) -> Config:
    from .attention import triton_backward_launch as backward
    from .attention import triton_forward as forward

    if kernel == "attention_forward":
        return forward.production_config(device_family, dim, itemsize)
    return backward.production_configs(device_family, dim, itemsize)[KERNELS.index(kernel) - 1]


def calls(
    kernel: str, dim: int, dtype: torch.dtype, device: torch.device, length: int, window: int, heads: int, kv_heads: int
) -> tuple[Callable[[Config], tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """Runs the kernel's op under a configuration, and its inputs: dout, dlse, q, k, v, out, lse."""
    from .attention import triton_backward_launch as backward
    from .attention import triton_forward as forward

    shapes = [(1, length, heads, dim)] * 2 + [(1, length, kv_heads, dim)] * 2
    dout, q, k, v = (testing.fill(s, seed=i).to(device, dtype) for i, s in enumerate(shapes))
    dlse = torch.zeros(1, heads, length, device=device)
    lengths: dict[str, Any] = dict(window=window, scale=dim**-0.5, causal=True, cu_q=None, cu_k=None)
    lengths |= dict(max_q=length, max_k=length)
    out, lse = forward.attention(q, k, v, **lengths)
    tensors = [dout, dlse, q, k, v, out, lse]
    if kernel == "attention_forward":
        return lambda config: forward.attention(q, k, v, **lengths, config=config), tensors
    pair = backward.production_configs(family(device), dim, dtype.itemsize)

    def run(config: Config) -> tuple[torch.Tensor, ...]:
        both = (config, pair[1]) if kernel == "attention_dq" else (pair[0], config)
        return backward.attention_backward(dout, dlse, q, k, v, out, lse, **lengths, configs=both)

    return run, tensors


def passes(kernel: str, config: Config, dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every output, with blocks at both edges of a window, obeys the parity rule."""
    length, window = 200, 130
    run, tensors = calls(kernel, dim, dtype, device, length, window, 2, 1)
    lengths: Any = (window, dim**-0.5, True)
    forward = kernel == "attention_forward"
    attend: Callable[..., tuple[torch.Tensor, ...]] = reference.attend if forward else reference.attend_backward
    eager, truth = (attend(*(t[2:5] if forward else t), *lengths) for t in (tensors, [t.double() for t in tensors]))
    found = zip(run(config), eager, truth, strict=True)
    return all(testing.compare(kernel, *each).passed for each in found)


def best(
    kernel: str,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer = seconds,
    length: int = 8192,
    window: int = 4096,
    heads: tuple[int, int] = (32, 8),
    say: Callable[[str], Any] = print,
) -> dict[str, Any] | None:
    """Tries every candidate; returns the entry of the fastest that is right, or None where none is."""
    tried = candidates(kernel, family(device), dim, dtype.itemsize)
    run, _ = calls(kernel, dim, dtype, device, length, window, *heads)
    times: dict[Config, float] = {}
    for config in tried:
        try:
            if not passes(kernel, config, dim, dtype, device):
                say(f"  {config}: wrong results, not used")
                continue
            times[config] = timer(functools.partial(run, config))
        except Exception as error:  # the compiler raises what it likes
            say(f"  {config}: {type(error).__name__}, not used")
            continue
        say(f"  {config}: {times[config] * 1e6:.1f} us")
    if not times:
        return None
    config = min(times, key=lambda c: times[c])
    return _tuned.entry(config, times[config], times.get(tried[0]))


def tune(
    device: torch.device, kernels: tuple[str, ...], dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...], **how: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, entry) of each kernel, head dimension and dtype."""
    say = how.get("say", print)
    for kernel in kernels:
        for dim in dims:
            for dtype in dtypes:
                say(f"{kernel} D={dim} {dtype}")
                if (found := best(kernel, dim, dtype, device, **how)) is not None:
                    yield _tuned.key(kernel, dim, dtype.itemsize), found


def _show(file: Path) -> None:
    entries = _tuned.read(file)
    print(
        f"{file}: {len(entries)} entries" if file.exists() else f"{file}: not there; built-in configurations are used"
    )
    for name, entry in entries.items():
        print(f"  {name}: {entry['config']} {entry['microseconds']} us, built-in {entry['built_in']} us")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mistral_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, help="folder of the file; the platform's cache folder if left out")
    parser.add_argument("--show", action="store_true", help="print the file and what it says")
    parser.add_argument("--delete", action="store_true", help="delete the file")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one (repeatable)")
    parser.add_argument("--dim", type=int, choices=DIMS, action="append", help="only this head dimension (repeatable)")
    parser.add_argument("--float32", action="store_true", help="float32 too, beside 16 bits")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available() or triton_interpreted():
        raise SystemExit("tune: it times kernels on a CUDA GPU, and none can be used here; nothing was changed")
    if (reason := backends()["triton"]) is not None:
        raise SystemExit(f"tune: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    file = _tuned.path(str(_tuned.device_name(device)), options.cache)
    if options.delete:
        file.unlink(missing_ok=True)
        print(f"deleted {file}")
    elif options.show:
        _show(file)
    else:
        dtypes = (torch.bfloat16, *((torch.float32,) if options.float32 else ()))
        for name, found in tune(device, tuple(options.kernel or KERNELS), tuple(options.dim or DIMS), dtypes):
            _tuned.write(file, {name: found})
        _show(file)


if __name__ == "__main__":
    main()
