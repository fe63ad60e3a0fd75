"""`python -m mistral_kernels.verify`, a process for each op at once, since most of its time goes into compiling Triton.

Takes verify's own options; prints its tables and writes one JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mistral_kernels import testing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    options, rest = parser.parse_known_args()
    ops = options.op or list(dict.fromkeys(case.op for case in testing.cases()))
    with tempfile.TemporaryDirectory() as folder:
        files = {op: Path(folder) / f"{op}.json" for op in ops}
        command = [sys.executable, "-m", "mistral_kernels.verify", *rest]
        runs = {
            op: subprocess.Popen([*command, "--op", op, "--json", str(file)], stdout=subprocess.PIPE, text=True)
            for op, file in files.items()
        }
        failed = 0
        for op, run in runs.items():
            said, _ = run.communicate()
            print(said if not failed and op == ops[0] else "\n".join(x for x in said.splitlines() if x.startswith(op)))
            failed += run.returncode != 0
        found = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    if found:
        merged = found[0] | dict(rows=[row for part in found for row in part["rows"]])
        beside = options.json.with_suffix(".tmp")
        beside.write_text(json.dumps(merged, indent=1))
        os.replace(beside, options.json)
    print(f"{failed} of {len(ops)} ops failed or could not run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
