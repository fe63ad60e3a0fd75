"""The Triton kernels, compiled ahead of time by the machinery of the tests, with what each launch moves."""

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
RING = 4096
LAUNCH = tuple[Any, tuple, dict]


def spec_modules() -> list[str]:
    """Every module of specs beside the tests: those that are added are reported without further ado."""
    return sorted(p.stem for p in TESTS.glob("aot_specs_*.py"))


# ---- work, from the tensors of a launch ----


def tensors(launch: LAUNCH) -> list[torch.Tensor]:
    """Those of the arguments; a descriptor for bulk copies stands for its tensor."""
    found: list[torch.Tensor] = []
    for argument in (*launch[1], *launch[2].values()):
        base = getattr(argument, "base", argument)
        if isinstance(base, torch.Tensor) and all(base is not t for t in found):
            found.append(base)
    return found


def tensor_bytes(t: torch.Tensor) -> int:
    """Of the elements that a tensor shows; repeated ones count once."""
    shown = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return shown * t.element_size()


def elements(launch: LAUNCH) -> int:
    return max((t.numel() for t in tensors(launch)), default=0)


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of a launch at least, and how they were counted."""

    bytes: float
    flops: float
    formula: str


def _each_once(launch: LAUNCH) -> float:
    return float(sum(tensor_bytes(t) for t in tensors(launch)))


def _streams(per_element: float) -> Callable[[LAUNCH, str], Work]:
    """A memory-bound kernel: every tensor once, some operations an element of the largest."""

    def count(launch: LAUNCH, name: str) -> Work:
        return Work(_each_once(launch), per_element * elements(launch), f"each tensor once; {per_element:g} an element")

    return count


def _write(launch: LAUNCH, name: str) -> Work:
    """Rings and rope tables are only touched at the tokens' places."""
    token = [t for t in tensors(launch) if not _is_ring(t) and not _is_table(t)]
    largest = max(token, key=torch.Tensor.numel)
    k = min((t for t in token if t.dim() >= 3), key=torch.Tensor.numel)
    moved = sum(tensor_bytes(t) for t in token) + 2 * tensor_bytes(k)
    flops = 3 * (largest.numel() + k.numel()) if "rope" in name else 0
    return Work(float(moved), float(flops), "tokens' tensors once, k and v to the ring")


def _is_ring(t: torch.Tensor) -> bool:
    return t.dim() == 4 and t.shape[1] == RING


def _is_table(t: torch.Tensor) -> bool:
    return t.dim() == 2 and t.dtype == torch.float32 and t.shape[0] == RING


def _heads(launch: LAUNCH) -> tuple[torch.Tensor, torch.Tensor]:
    """q, and k or a ring of keys."""
    found = [t for t in tensors(launch) if t.dim() >= 3]
    q = found[0]
    return q, next(t for t in found[1:] if t.shape[-2] != q.shape[-2])


def _attention(products: int) -> Callable[[LAUNCH, str], Work]:
    """`products` FLOPs for each element of a head and visible pair: 4 forward, 10 backward."""

    def count(launch: LAUNCH, name: str) -> Work:
        from .families.attention import visible_pairs

        q, _ = _heads(launch)
        length = q.shape[-3]
        batch = q.numel() // (length * q.shape[-2] * q.shape[-1])
        window = None if "no window" in name or "not causal" in name else RING
        pairs = length * length if "not causal" in name else visible_pairs(length, window)
        flops = products * batch * pairs * q.shape[-2] * q.shape[-1]
        return Work(_each_once(launch), float(flops), f"each tensor once; {products} D a visible pair")

    return count


def _cached(launch: LAUNCH, name: str) -> Work:
    """Every query sees a full window of the ring (or of ring and chunk)."""
    q = tensors(launch)[0]
    return Work(_each_once(launch), 4.0 * q.numel() * RING, "each tensor once; 4 D a query and slot")


def _linear_on_codes(launch: LAUNCH, name: str) -> Work:
    """x [M, K] times codes [N, K] of any width; the launch that only rounds x to int8 has no product."""
    x, *_, out = tensors(launch)
    if out.dim() < 2:
        return _streams(2)(launch, name)
    return Work(_each_once(launch), 2.0 * x.numel() * out.shape[-1], "each tensor once; 2 M N K")


# The first that fits a spec's name counts for the spec's first launch; what follows it (partial sums, merging)
# streams its tensors. A linear layer on codes tells its launches apart itself.
RULES: tuple[tuple[str, Callable[[LAUNCH, str], Work]], ...] = (
    (r"write_kv", _write),
    (r"attention.*(backward|gradient|dq|dkv)", _attention(10)),
    (r"attention", _attention(4)),
    (r"decode|chunk", _cached),
    (r"rms_norm.*backward", _streams(8)),
    (r"rms_norm", _streams(4)),
    (r"swiglu.*backward", _streams(12)),
    (r"swiglu", _streams(5)),
    (r"rope", _streams(3)),
    (r"loss", _streams(4)),
    (r"^(int8|int4|nf4|w8a8) \d+ rows?", _linear_on_codes),
)


def work(launch: LAUNCH, name: str, first: bool) -> Work | None:
    """None where no rule knows the kernel: nothing is guessed."""
    rule = next((count for pattern, count in RULES if re.search(pattern, name)), None)
    if rule is None:
        return None
    return rule(launch, name) if first or rule is _linear_on_codes else _streams(1)(launch, name)


# ---- compiling ----


def _specs(module: str, slow: bool, only: str) -> list[Any]:
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    specs = importlib.import_module(module).SPECS
    return [s for s in specs if (slow or not s.slow) and only in s.name]


def _works(specs: list[Any], capability: int) -> dict[tuple[str, int], Work | None]:
    record = importlib.import_module("triton_aot").record
    found = {}
    for spec in (s for s in specs if capability in s.capabilities):
        for i, launch in enumerate(record(spec, capability)):
            found[spec.name, i] = work(launch, spec.name, i == 0)
    return found


def kernels(capability: int, slow: bool, only: str, jobs: int) -> Iterator[dict[str, Any]]:
    """One report a kernel: what `tests/triton_aot.py` reads from the machine code, and the work of its launch.

    Raises:
        RuntimeError: a compile run failed; with what it said.
    """
    for module in spec_modules():
        specs = _specs(module, slow, only)
        if not specs:
            continue
        flags = ["--only", only, "--jobs", str(jobs), *["--slow"] * slow]
        command = [sys.executable, str(TESTS / "triton_aot.py"), module, str(capability), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{module} for sm_{capability}: {done.stderr[-1500:]}")
        works, seen = _works(specs, capability), dict[str, int]()
        for report in json.loads(done.stdout):
            at = seen.get(report["spec"], 0)
            seen[report["spec"]] = at + 1
            needed = works.get((report["spec"], at))
            yield dict(source="Triton", module=module) | report | dict(work=needed and dataclasses.asdict(needed))
