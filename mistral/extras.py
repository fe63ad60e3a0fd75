"""Packages that only some of the model's parts need, imported when they are."""

import importlib
from types import ModuleType


def need(module: str) -> ModuleType:
    """Imports a package of the extra `model`.

    Raises:
        ModuleNotFoundError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        message = f"{error.name} is not installed: pip install 'mistral-kernels[model]'"
        raise ModuleNotFoundError(message, name=error.name) from None
