"""One file an op family, each with `benches()`: what is found in this folder is benchmarked."""

import importlib
import pkgutil
from collections.abc import Iterator

from ..cases import Bench


def all_benches() -> Iterator[Bench]:
    """The benches of every family, in alphabetical order of the families."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        yield from importlib.import_module(f"{__name__}.{module}").benches()
