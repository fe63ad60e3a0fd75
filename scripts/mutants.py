"""Plants bugs into copies of the kernels, one at a time, and demands that a named test fails on each.

    python scripts/mutants.py [--only WORDS] [--missing] [--json FILE] [--markdown FILE]

With --only or --missing the verdicts in FILE on other mutants stay, as long as these are what they were.

First all named tests run on unchanged copies, where they must pass. A mutant is caught if its test fails (or takes the
process down); a test that cannot be collected counts for nothing. Exit status 1 where a mutant survives. Triton runs in
its interpreter; the eager mutants run without the compiled library, so that the eager gradients are what is tested. Of
a C++ mutant the changed file is compiled for the plainest instruction set, which the linked library starts with.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import changed_library
from mutants_cpp import BUGS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "kernels/mistral_kernels"
ELEMENTWISE, ATTENTION = "tests/test_triton_elementwise.py::", "tests/test_triton_attention.py::"
BACKWARD, OPS, REFERENCE = "tests/test_triton_backward.py::", "tests/test_ops.py::", "tests/test_reference.py::"
LOSS = "tests/test_linear_cross_entropy.py::"
CPP = "C++"
LENGTHS = ATTENTION + "test_lengths_and_windows[17-3-pointers]"
GRADCHECK = OPS + "test_gradcheck_attention[3-None]"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug: `old` stands once in `file`, and becomes `new`; `test` must then fail."""

    bug: str
    kind: str
    file: str
    old: str
    new: str
    test: str


def triton(bug: str, file: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(bug, "Triton", file, old, new, test)


def eager(bug: str, file: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(bug, "eager", file, old, new, test)


FORWARD, NORM = "attention/triton_forward.py", "rms_norm/triton_kernel.py"
MUTANTS = (
    triton("window one key too wide", FORWARD, "(distance < W)", "(distance <= W)", LENGTHS),
    triton("window one key too narrow", FORWARD, "(distance < W)", "(distance < W - 1)", LENGTHS),
    triton("diagonal off by one", FORWARD, "seen = distance >= 0", "seen = distance > 0", LENGTHS),
    triton("missing scale", FORWARD, "scale2 = scale * LOG2E", "scale2 = LOG2E", LENGTHS),
    triton("lse sign", "attention/triton_blocks.py", "top * scale + (rounded", "-top * scale - (rounded", LENGTHS),
    triton("KV head h % Hkv", FORWARD, "h = kv_head * G + g", "h = g * (H // G) + kv_head",
           ATTENTION + "test_groups[3]"),
    triton("missing tail mask", FORWARD, "seen = (keys < end)[None, :]", "seen = (keys >= 0)[None, :]",
           ATTENTION + "test_not_causal"),
    triton("swapped rotary halves", "_triton.py", "return first * cos - second * sin, second * cos + first * sin, mask",
           "return second * cos + first * sin, first * cos - second * sin, mask",
           ELEMENTWISE + "test_rope_of_strided_heads"),
    triton("rotation not inverted", "_triton.py", "        sin = -sin\n", "        sin = sin\n",
           ELEMENTWISE + "test_inverse_rotation_undoes_the_rotation"),
    triton("missing tail mask", NORM, "x = tl.load(X + x_at, mask=mask, other=0.0)",
           "x = tl.load(X + x_at, mask=mask, other=1.0)", ELEMENTWISE + "test_rows_of_any_layout"),
    triton("int32 offset", "_triton.py", "        offset = row * s2\n", "        offset = row.to(tl.int32) * s2\n",
           "tests/test_offsets.py::test_rows_far_apart[triton]"),
    triton("dropped residual gradient", "rms_norm/triton_backward.py", "            dx += _load_row(DTOTAL",
           "            dx += 0 * _load_row(DTOTAL", BACKWARD + "test_both_outputs_carry_gradients"),
    triton("dW without one row block", "rms_norm/triton_backward.py", "mask=(row < count) & (column < N)",
           "mask=(row < count - 1) & (column < N)", BACKWARD + "test_many_and_long_rows[shape0-torch.float32]"),
    triton("gradient of the norm without its mean", "rms_norm/triton_backward.py", "dx = rstd * (g - n * mean)",
           "dx = rstd * g", BACKWARD + "test_many_and_long_rows[shape0-torch.float32]"),
    triton("gradient of the loss without the label", "linear_cross_entropy/triton_kernel.py",
           "tl.where(column == label, 1.0, 0.0)", "0.0", LOSS + "test_is_torchs_cross_entropy[triton-5-mean]"),
    triton("last block of words left out", "linear_cross_entropy/triton_kernel.py",
           "for start in range(0, V, BLOCK):", "for start in range(0, V - BLOCK, BLOCK):",
           LOSS + "test_is_torchs_cross_entropy[triton-5-mean]"),
    eager("window one key too wide", "attention/reference.py", "seen & (j > i - window)", "seen & (j >= i - window)",
          REFERENCE + "test_window_is_the_number_of_visible_keys"),
    eager("window one key too narrow", "attention/reference.py", "seen & (j > i - window)",
          "seen & (j > i - window + 1)", REFERENCE + "test_attention_is_masked_sdpa"),
    eager("missing scale", "attention/reference.py", "k.to(wide)) * scale\n    mask", "k.to(wide))\n    mask",
          REFERENCE + "test_attention_is_masked_sdpa"),
    eager("missing scale of dQ", "attention/reference.py", ".reshape(q.shape) * scale", ".reshape(q.shape)", GRADCHECK),
    eager("KV head h % Hkv", "attention/reference.py", "grouped = q.to(wide).unflatten(2, (k.shape[2], -1))",
          "grouped = q.to(wide).unflatten(2, (-1, k.shape[2])).transpose(2, 3)",
          REFERENCE + "test_query_heads_of_a_group_are_adjacent"),
    eager("lse sign", "attention/reference.py", ".to(q.dtype), lse.flatten(1, 2)", ".to(q.dtype), -lse.flatten(1, 2)",
          REFERENCE + "test_attention_lse"),
    eager("sign of the gradient of lse", "attention/reference.py", "(p * dp).sum(-1) - dlse", "(p * dp).sum(-1) + dlse",
          GRADCHECK),
    eager("swapped rotary halves", "rope/reference.py", "return torch.cat((a * c - b * s, b * c + a * s), dim=-1)",
          "return torch.cat((b * c + a * s, a * c - b * s), dim=-1)", REFERENCE + "test_rope_halves_are_hugging_faces"),
    eager("rotation not inverted", "rope/reference.py", "        s = -s\n", "        s = +s\n",
          OPS + "test_gradcheck_elementwise[None]"),
    eager("dropped residual gradient", "rms_norm/reference.py", "(dx + dtotal.to(dx.dtype))", "(dx)",
          OPS + "test_gradient_through_either_output_of_add_rms_norm"),
    eager("dW without its last row", "rms_norm/reference.py", ".reshape(-1, x.shape[-1]).sum(0)",
          ".reshape(-1, x.shape[-1])[:-1].sum(0)", OPS + "test_gradcheck_norms[None-model]"),
    eager("sign in the gradient of silu", "swiglu/reference.py", "(1 + g * (1 - s))", "(1 - g * (1 - s))",
          OPS + "test_gradcheck_elementwise[None]"),
    eager("ignored tokens have a gradient", "linear_cross_entropy/chunked.py",
          "return gradient.masked_fill_((labels == ignore_index).unsqueeze(-1), 0)", "return gradient",
          LOSS + "test_ignored_tokens[None]"),
    eager("one chunk of dW left out", "linear_cross_entropy/chunked.py", "        if of_weight:\n",
          "        if of_weight and span.start:\n", LOSS + "test_is_torchs_cross_entropy[None-5-mean]"),
    *(Mutant(bug, CPP, file, old, new, test) for bug, file, old, new, test in BUGS),
)  # fmt: skip


def tree(folder: Path, binary: bool) -> Path:
    """A copy of what the tests read, with or without the compiled library."""
    ignore = shutil.ignore_patterns("__pycache__", *(() if binary else ("*.so",)))
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "mistral").symlink_to(ROOT / "mistral")
    return folder


def run(folder: Path, tests: list[str]) -> tuple[int, str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(folder / "kernels"), str(folder), str(folder / "tests")))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


def plant(folder: Path, mutant: Mutant) -> None:
    if mutant.kind == CPP:
        # A header's bug goes into the source that it is named after, alone.
        name = Path(mutant.file).stem.removesuffix("_math").removesuffix("_tile").removesuffix("_join")
        plainest(folder, mutant, f"cpu_{name}_base.o")
    else:
        changed_library.plant(folder / PACKAGE, mutant.file, mutant.old, mutant.new)


def plainest(folder: Path, mutant: Mutant | None = None, *objects: str) -> None:
    """A library that starts with the plainest instruction set, where `objects` have the mutant's bug."""
    sources = changed_library.copy_sources(folder)
    changed_library.plant(sources, "torch/isa.cpp", "int found = tiers - 1;", "int found = 0;")
    if mutant:
        changed_library.plant(sources, mutant.file, mutant.old, mutant.new)
    library = folder / PACKAGE / changed_library.LIBRARY
    changed_library.relink(changed_library.build_folder(), folder, ["torch_isa.o", *objects], library)


def verdict(mutant: Mutant) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = tree(Path(name), mutant.kind != "eager")
        plant(folder, mutant)
        start = time.perf_counter()
        code, output = run(folder, [mutant.test])
    # 1: a test failed; below 0: a signal, as where a planted bug reads memory that is not there.
    caught = code == 1 or code < 0
    if not caught:
        print(output)
    row = dataclasses.asdict(mutant) | dict(caught=caught, exit=code, seconds=round(time.perf_counter() - start, 1))
    print(f"{'caught' if caught else 'SURVIVED':<9}{row['seconds']:>7} s  {mutant.kind:<7} {mutant.bug}", flush=True)
    return row


def unchanged_pass(mutants: list[Mutant]) -> None:
    for kind in dict.fromkeys(m.kind for m in mutants):
        tests = sorted({m.test for m in mutants if m.kind == kind})
        with tempfile.TemporaryDirectory() as name:
            folder = tree(Path(name), kind != "eager")
            if kind == CPP:
                plainest(folder)
            code, output = run(folder, tests)
        if code:
            raise SystemExit(f"mutants: the tests do not pass on the unchanged {kind} kernels:\n{output}")


def markdown(rows: list[dict]) -> str:
    caught = sum(bool(r["caught"]) for r in rows)
    lines = ["# Mutants", ""]
    lines.append(
        f"`make mutants` plants {len(rows)} bugs into copies of the kernels, one at a time, and runs one test for each,"
        f" which passes on the unchanged kernels. Caught: {caught} of {len(rows)}. Triton runs in its interpreter, C++"
        " with the plainest instruction set. The CUDA kernels are not mutated here: tests/test_cuda_faults.py and"
        " tests/test_cuda_hopper_faults.py leave out their synchronisation. Written from docs/mutants.json."
    )
    lines += ["", "| kernels | bug | file | test | caught |", "|---|---|---|---|---|"]
    for r in rows:
        test = r["test"].removeprefix("tests/")
        lines.append(f"| {r['kind']} | {r['bug']} | `{r['file']}` | `{test}` | {'yes' if r['caught'] else '**no**'} |")
    return "\n".join(lines) + "\n"


def kept(file: Path | None, chosen: list[Mutant]) -> list[dict]:
    """The file's verdicts on the mutants that are not chosen."""
    rows = json.loads(file.read_text()) if file and file.exists() else []
    others = [dataclasses.asdict(m).items() for m in MUTANTS if m not in chosen]
    return [row for row in rows if any(other <= row.items() for other in others)]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose kind and bug contain these words")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file, each as it comes")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--missing", action="store_true", help="mutants on which the JSON file has no verdict")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.kind} {m.bug}"]
    if options.missing:
        known = kept(options.json, [])
        chosen = [m for m in chosen if not any(dataclasses.asdict(m).items() <= row.items() for row in known)]
    if not chosen:
        parser.error("no mutant is left to run")
    unchanged_pass(chosen)
    order = [m.test + m.new + m.bug for m in MUTANTS]
    rows = kept(options.json, chosen)
    for mutant in chosen:
        rows.append(verdict(mutant))
        rows.sort(key=lambda row: order.index(row["test"] + row["new"] + row["bug"]))
        if options.json:
            write(options.json, json.dumps(rows, indent=1) + "\n")
        if options.markdown:
            write(options.markdown, markdown(rows))
    print(f"{sum(bool(r['caught']) for r in rows)} of {len(rows)} caught")
    return 0 if all(r["caught"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
