"""Makes a domain corpus from Debian's documentation packages: one JSONL file with a passage a line.

python scripts/debian_corpus.py out/corpus/debian.jsonl        # on Debian or Ubuntu, with apt's package lists
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mistral.training.log import replace_text

PACKAGES = ("debian-policy", "developers-reference", "debian-reference-en")
PASSAGE = 6000  # characters, roughly


def download(packages: tuple[str, ...], folder: Path) -> Path:
    """Fetches and unpacks packages, without installing them; returns the folder with their files."""
    subprocess.run(["apt-get", "download", "-qq", *packages], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "files")], check=True)
    return folder / "files"


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the documents: the sources where a package has them, else the plain text."""
    found = sorted(folder.rglob("*.rst.txt")) + sorted(folder.rglob("debian-reference.en.txt.gz"))
    for path in found:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield path.name, data.decode("utf-8", "replace")


def passages(text: str) -> Iterator[str]:
    """Runs of paragraphs of about PASSAGE characters."""
    held: list[str] = []
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        if sum(map(len, held)) >= PASSAGE:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSONL file to write; one that is there is kept")
    out = parser.parse_args().out
    if out.exists():
        return 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # apt's own user writes there
        try:
            files = download(PACKAGES, Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"debian_corpus: {error}; apt-get update first, on Debian; or name other text", file=sys.stderr)
            return 1
        rows = [json.dumps(dict(source=name, text=p)) for name, text in texts(files) for p in passages(text)]
    if not rows:
        print(f"debian_corpus: {' '.join(PACKAGES)} have no text of the kind that is known", file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, "\n".join(rows) + "\n")
    print(f"{out}: {len(rows)} passages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
