"""`python -m mistral_kernels.verify`: parity of every op, implementation and dtype on this machine.

Each case runs on inputs of several kinds against the eager op in float64; an error ratio of 1 is the whole budget
(see `mistral_kernels.testing`). Exit status 1 where a case fails.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import testing

DESCRIPTION = """\
Checks every op of mistral_kernels against float64 truth on this machine, and says why an implementation
is not usable here. An error ratio is the error as a share of its budget: at most 1 passes."""
EXAMPLES = """\
examples:
  python -m mistral_kernels.verify
  python -m mistral_kernels.verify --impl cpu --op attention --dtype bfloat16
  python -m mistral_kernels.verify --interpret --impl triton     Triton's kernels on a machine without a GPU
  python -m mistral_kernels.verify --json parity.json"""
DTYPE_NAMES = ("float32", "bfloat16", "float16")
DIFFERENTIABLE = (
    *("rms_norm", "add_rms_norm", "swiglu", "swiglu_packed", "linear", "rope", "attention"),
    *("linear_cross_entropy", "linear_int8", "linear_int4", "linear_nf4"),
)
INTERPRETER_BF16 = "Triton's interpreter miscomputes bfloat16 (triton issue 11584)"


@dataclasses.dataclass
class Row:
    """The verdict on one op, implementation and dtype."""

    op: str
    impl: str
    dtype: str
    passed: int = 0
    failed: int = 0
    unable: int = 0
    worst: float = 0.0
    where: str = ""
    skipped: str = ""

    def add(self, where: str, ratio: float) -> None:
        if ratio <= 1:
            self.passed += 1
        else:
            self.failed += 1
        rank = math.inf if math.isnan(ratio) else ratio
        if rank >= self.worst or not self.where:
            self.worst, self.where = rank, where


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mistral_kernels.verify",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--impl", action="append", help="only this implementation (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=DTYPE_NAMES, help="only this dtype (may be repeated)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--interpret", action="store_true", help="run Triton's kernels in its interpreter, on the CPU")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="judge N cases at once, in N processes (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, verdicts and ratios to FILE")
    return parser.parse_args(argv)


def check_case(
    number: int, impl: str | None, dtype_name: str, device: str
) -> list[tuple[str, "list[testing.Errors] | str | None"]]:
    """For each kind of input of one of `testing.cases()`: what it was, and the errors, forward and, where there is a
    backward, backward; None where the implementation refuses it; what was raised where it should not have been."""
    import torch

    from . import testing

    case = list(testing.cases())[number]
    dtype, gradients, found = getattr(torch, dtype_name), case.op in DIFFERENTIABLE, []
    for kind in testing.KINDS:
        errors: list[testing.Errors] | str | None = None
        try:
            errors = testing.parity(case, dtype, impl, device, kind, gradients)
        except NotImplementedError:
            pass
        except Exception as error:  # one broken kernel must not hide what the others do
            errors = f"{type(error).__name__} {error}".split("\n")[0][:200]
        found.append((f"{case.label}, {kind}", errors))
    return found


def check_row(op: str, impl: str, dtype_name: str, device: str, run: Callable = map) -> Callable[[], Row]:
    """Starts every case of one op in one dtype under `run`, which is `map` of this or of other processes.

    What is returned waits for the verdict. The largest error is judged case by case, the RMS error of each output over
    all cases together.
    """
    from . import testing
    from ._dispatch import triton_interpreted

    row = Row(op, impl, dtype_name)
    if impl == "triton" and dtype_name == "bfloat16" and triton_interpreted():
        row.skipped = INTERPRETER_BF16
        return lambda: row
    numbers = [n for n, case in enumerate(testing.cases()) if case.op == op]
    checks = run(functools.partial(check_case, impl=impl, dtype_name=dtype_name, device=device), numbers)

    def judge() -> Row:
        together: dict[str, list[testing.Errors]] = {}
        for where, errors in itertools.chain.from_iterable(checks):
            if errors is None:
                row.unable += 1
            elif isinstance(errors, str):
                row.add(f"{where}: {errors}", math.nan)
            else:
                for e in errors:
                    row.add(f"{e.output} of {where}", e.max_ratio)
                    together.setdefault(e.output, []).append(e)
        for output, errors in together.items():
            row.add(f"RMS of {output}", testing.pooled(errors))
        return row

    return judge


@contextlib.contextmanager
def mapping(jobs: int) -> Iterator[Callable]:
    """`map`, over so many processes of one thread each; CUDA asks for fresh ones."""
    if jobs == 1:
        yield map
        return
    import torch

    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map


def verdict(row: Row) -> str:
    if row.skipped:
        return "skipped"
    if row.failed:
        return f"{row.failed} FAILED"
    return "ok" if row.passed else "unable"


def print_row(r: Row) -> None:
    print(
        f"{r.op:<21}{r.impl:<11}{r.dtype:<10}{r.passed + r.failed:>8}{r.unable:>8}  {r.worst:>6.2f}"
        f"  {verdict(r):<9} {r.skipped or r.where}",
        flush=True,
    )


def machine() -> dict[str, Any]:
    """What a reader needs to know of where the ratios come from."""
    import torch

    from ._dispatch import backends, triton_interpreted

    facts = dict(torch=torch.__version__, python=platform.python_version(), cpu=platform.processor() or "unknown")
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    if backends()["triton"] is None:
        facts["triton"] = version("triton") + (" (interpreter)" if triton_interpreted() else "")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        facts["cpu"] = models[0] if models else facts["cpu"]
    return facts


def write_json(path: Path, facts: dict[str, Any], reasons: dict[str, str | None], rows: list[Row]) -> None:
    """Writes beside the file and renames, so that a reader never sees half of it."""
    payload = dict(machine=facts, backends=reasons, rows=[dataclasses.asdict(r) for r in rows])
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump(payload, file, indent=1, allow_nan=True)
    os.replace(file.name, path)


def check_names(what: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    for name in given or ():
        if name not in known:
            sys.exit(f"verify: --{what} {name!r} is not known; there are {', '.join(known)}")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import torch

    from . import testing
    from ._dispatch import IMPLS, backends

    ops = tuple(dict.fromkeys(case.op for case in testing.cases()))
    check_names("op", options.op, ops)
    check_names("impl", options.impl, IMPLS)
    device = options.device or ("cuda" if torch.cuda.is_available() and not options.interpret else "cpu")
    facts, reasons = machine(), backends()
    print("  ".join(f"{k} {v}" for k, v in facts.items()), f" device {device}")
    for impl, reason in reasons.items():
        print(f"  {impl:<10} {'usable' if reason is None else 'not usable: ' + reason}")
    impls = [i for i in options.impl or IMPLS if reasons[i] is None and not (i == "cpu" and device != "cpu")]
    grid = [(o, i, d) for o in options.op or ops for i in impls for d in options.dtype or DTYPE_NAMES]
    rows, start = [], time.perf_counter()
    print(f"{'op':<21}{'impl':<11}{'dtype':<10}{'checks':>8}{'unable':>8}  {'worst':>6}  verdict   at")
    with mapping(options.jobs) as run:
        for judge in [check_row(*what, device, run) for what in grid]:
            rows.append(judge())
            print_row(rows[-1])
            if options.json:
                write_json(options.json, facts, reasons, rows)
    failed, skipped = sum(r.failed for r in rows), sum(bool(r.skipped) for r in rows)
    passed, seconds = sum(r.passed for r in rows), time.perf_counter() - start
    print(
        f"{passed} checks of outputs and gradients passed, {failed} failed, {skipped} rows skipped, in {seconds:.0f} s"
    )
    wanted = [i for i in options.impl or () if i not in impls]
    for impl in wanted:
        print(f"verify: impl {impl!r} was asked for and is not usable: {reasons[impl]}", file=sys.stderr)
    return 1 if failed or wanted or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
