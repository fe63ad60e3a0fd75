"""Packages that only some of the model's parts need, imported when they are."""

import importlib
from types import ModuleType


def need(module: str, extra: str = "model") -> ModuleType:
    """Imports a package of one of the extras in pyproject.toml.

    Raises:
        ModuleNotFoundError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"{error.name} is not installed: pip install 'mistral-kernels[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from None
