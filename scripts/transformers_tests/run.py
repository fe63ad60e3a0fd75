"""transformers' own model tests, without and with patched classes: every test must end the same way (but EXPECTED).

PYTHONPATH=kernels:. python scripts/transformers_tests/run.py --json docs/huggingface/transformers_tests.json

The source distribution of the installed version is fetched by pip; it carries the shared mixins, without the test files
of models and of generation. Its mixins are run on the smallest models (test_models.py); the two mixins that it imports
and lacks are empty here.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
EXPECTED = {
    "test_sdpa_can_dispatch_non_composite_models": "it asserts that the default attention is sdpa; a patched class's is"
    " mistral_kernels",
}


def fetched(version: str, folder: Path) -> Path:
    """The folder `tests` of the source distribution, made complete."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "-d", str(folder), f"transformers=={version}"]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tests = folder / f"transformers-{version}" / "tests"
    (tests / "__init__.py").touch()
    for name, mixin in MISSING.items():
        file = tests / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(f"class {mixin}:\n    pass\n")
    (tests / "test_models.py").write_text((HERE / "test_models.py").read_text())
    return tests


def outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        if case.find(kind) is not None:
            return "failed" if kind != "skipped" else kind
    return "passed"


def run(tests: Path, patched: bool, extra: list[str]) -> dict[str, str]:
    """How each test ended."""
    found = tests.parent / f"{'patched' if patched else 'plain'}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={found}"]
    command += ["-p", "patched_classes"] if patched else []
    command += ["-p", "no:warnings", "--rootdir", str(tests.parent), "-c", os.devnull, *extra]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", RUN_TRAINING_TESTS="1")
    paths = [str(HERE), str(HERE.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    done = subprocess.run([*command, "tests/test_models.py"], cwd=tests.parent, env=environment)
    if not found.exists():
        sys.exit(f"pytest ended with status {done.returncode} and wrote no results")
    cases = ElementTree.parse(found).iter("testcase")
    return {f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": outcome(case) for case in cases}


def table(results: dict[str, dict]) -> str:
    """What the JSON file says, for the page."""
    from bench import report

    rows = []
    for version, found in results.items():
        ends = [found[which].get(end, 0) for which in ("plain", "patched") for end in ("passed", "failed", "skipped")]
        rows.append((version, found["torch"], *ends, len(found["differ"])))
    head = (
        "transformers",
        "torch",
        *(f"{e}, {w}" for w in ("as it is", "patched") for e in ("passed", "failed", "skipped")),
    )
    differ = sorted({name.rpartition("::")[2] for found in results.values() for name in found["differ"]})
    reasons = [f"`{name}` ends differently: {EXPECTED.get(name, 'a fault')}." for name in differ]
    return "\n\n".join([report.markdown((*head, "end differently"), rows), *reasons])


def keep(path: Path, results: dict[str, dict], page: Path | None) -> None:
    from bench import report

    report.write(path, json.dumps(results, indent=1, sort_keys=True) + "\n")
    if page:
        results = json.loads(path.read_text())
        report.write(page, report.placed(page.read_text(encoding="utf-8"), "transformers_tests", table(results)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file that the counts of this version are added to")
    parser.add_argument("--page", type=Path, help="a Markdown page whose marked part is replaced by that file's table")
    parser.add_argument("extra", nargs="*", help="arguments for pytest, behind --")
    options = parser.parse_args()
    import torch
    import transformers

    version = transformers.__version__
    with tempfile.TemporaryDirectory() as folder:
        tests = fetched(version, Path(folder))
        plain, patched = (run(tests, p, options.extra) for p in (False, True))
    other = {name: (end, patched.get(name)) for name, end in plain.items() if patched.get(name) != end}
    counts = {n: dict(collections.Counter(r.values())) for n, r in (("plain", plain), ("patched", patched))}
    failing = sorted(name for name, end in plain.items() if end == "failed")
    result = dict(torch=torch.__version__, **counts, differ=other, fail_without_the_patch_too=failing)
    print(json.dumps(result, indent=1))
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        keep(options.json, kept | {version: result}, options.page)
    return 0 if plain and all(name.rpartition("::")[2] in EXPECTED for name in other) else 1


if __name__ == "__main__":
    sys.exit(main())
