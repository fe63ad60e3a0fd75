"""What scripts/gpu_hopper.py found, as a page.

python scripts/gpu_hopper_page.py docs/cuda/H100_hopper.json > docs/cuda/H100_hopper.md
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
NAMES = {"out0": "out", "out1": "lse (float32)", "dq": "dQ", "dk": "dK", "dv": "dV"}
# Of fixtures/pipeline.cu; what the strict reading forbids, and what only looks like a fault.
VARIANTS = {
    0: "none",
    12: "no fence after mbarrier.init",
    2: "no proxy fence before the store",
    34: "proxy fence in the storing thread",
    20: "no wait for the store at the end",
    19: "a tile reused without a barrier",
    41: "one lane waits for V",
    37: "one lane waits for K",
    42: "one lane waits for V, then the warp meets",
    30: "K released before its product is done",
    21: "no wgmma.fence before the second batch",
    60: "one warp releases for all four",
}


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def found(rows: Rows, piece: str) -> Rows:
    return [f for r in rows if r["piece"].startswith(piece) for f in r["found"]]


def parity(rows: Rows) -> str:
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for f in (f for r in rows if r["part"] in ("forward", "backward", "large") for f in r["found"]):
        for output, (_, _, share) in f.get("errors", {}).items():
            shares[NAMES.get(output, output), "largest error"].append(share)
        if "rms share" in f:
            shares[NAMES.get(f["output"].split()[1], f["output"]), "RMS error"].append(f["rms share"])
    lines = [[*key, len(s), sum(x > 1 for x in s), f"{max(s):.2f}"] for key, s in sorted(shares.items())]
    return table(["output", "of", "checks", "over budget", "largest share of the budget"], lines)


def rounding(rows: Rows) -> str:
    asked = found(rows, "calibrate rounding")
    lines = [[model, *(f["differ"][model] for f in asked)] for model in asked[0]["differ"]] if asked else []
    return table(["model", *(f"{f['dtype'].removeprefix('torch.')}, of {f['sums']} sums" for f in asked)], lines)


def times(rows: Rows) -> str:
    which = ("hopper", "sm_80", "triton", "sdpa")
    rates: dict[tuple, dict[str, str]] = defaultdict(dict)
    for f in found(rows, "times"):
        key = (f["pass"], f"B{f['batch']} S{f['sequence']} D{f['dim']}", f["window"] or "")
        rates[key][f["which"]] = f"{f['per s'] / 1e12:.0f}"
    return table(["", "shape", "window", *which], [[*k, *(r.get(w, "") for w in which)] for k, r in rates.items()])


def page(rows: Rows) -> str:
    device = next((f["device"] for f in found(rows, "facts") if "device" in f), "?")
    runs = [[VARIANTS[f["bug"]], f["runs"], f["wrong runs"]] for f in found(rows, "calibrate stress")]
    offsets = found(rows, "calibrate base_offset")
    right = sorted({f["base offset"] for f in offsets if f["right"]})
    absolute = all(f["copy is"]["absolute"] for f in offsets)
    narrow = all(f["rows of so many bytes"]["128"] for f in found(rows, "calibrate narrow_box"))
    early = found(rows, "calibrate early_copy")
    parts = [
        f"# The Hopper kernels on a GPU\n\nOne run of `scripts/gpu_hopper.py` on an {device}.",
        "## Parity\nErrors as shares of their budgets; at most 1 passes.\n\n" + parity(rows),
        "## How a product of 16 columns rounds\nSums that differ from each model.\n\n" + rounding(rows),
        "## What the emulator assumes",
        table(["fault planted in a pipeline", "runs", "wrong"], runs),
        f"- A tile that starts inside a swizzle pattern: the copy engine swizzles absolute addresses: {absolute}; "
        f"products read it right with these base offsets: {right}.",
        f"- A box narrower than its swizzle has rows of 128 bytes: {narrow}.",
        "- A copy that lands before its bytes are expected: the phase was over before the arrival: "
        f"{bool(early[0]['phase over before the arrival']) if early else '?'}, after it: "
        f"{bool(early[0]['after']) if early else '?'}.",
    ]
    if found(rows, "times"):
        parts.append("## Times\nTFLOP a second of visible pairs; the backward counts 2.5 times.\n\n" + times(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(page(json.loads(Path(sys.argv[1]).read_text())), end="")
