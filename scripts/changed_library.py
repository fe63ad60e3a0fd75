"""The compiled library with a changed copy of its sources: only what is named is compiled again.

`build` is a folder in which setup.py ran ninja; its commands are taken as they are, with other paths.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "libmistral_kernels.so"


def build_folder() -> Path:
    """That of `setup.py build_ext --inplace`."""
    found = sorted((ROOT / "build").glob("temp.*/build.ninja"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise SystemExit("the library is not built here (make build)")
    return found[-1].parent


def commands(build: Path, target: Path) -> list[list[str]]:
    """What ninja runs to make the target, in order."""
    beside = Path(sys.executable).with_name("ninja")
    ninja = str(beside) if beside.exists() else "ninja"
    listed = subprocess.run([ninja, "-C", build, "-t", "commands", target], check=True, capture_output=True, text=True)
    return [shlex.split(line) for line in listed.stdout.splitlines()]


def plant(sources: Path, file: str, old: str, new: str) -> None:
    """Replaces `old`, which stands once in `file`."""
    path = sources / file
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{old!r} stands {text.count(old)} times in {file}; once is needed")
    path.write_text(text.replace(old, new))


def relink(build: Path, folder: Path, objects: list[str], output: Path) -> None:
    """Compiles `objects` from folder/csrc and links the library with them and the other objects of `build`.

    Args:
        build: as build_folder() gives it.
        folder: with csrc, which copy_sources() made.
        objects: names of object files, such as "cpu_rope_base.o".
        output: the library.
    """
    default = next(line for line in (build / "build.ninja").read_text().splitlines() if line.startswith("default "))
    link = commands(build, Path(default.removeprefix("default ")))[-1]
    for name in objects:
        changed = folder / name
        (compile_it,) = commands(build, build / name)
        subprocess.run([moved(word, folder, {str(build / name): str(changed)}) for word in compile_it], check=True)
        link = [str(changed) if word == str(build / name) else word for word in link]
    output.unlink(missing_ok=True)
    link[link.index("-o") + 1] = str(output)
    subprocess.run(link, check=True)


def moved(word: str, folder: Path, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        word = word.replace(old, new)
    return word.replace(str(ROOT / "csrc"), str(folder / "csrc"))


def copy_sources(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT / "csrc", folder / "csrc"))
