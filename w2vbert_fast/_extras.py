"""Third-party modules that only some features need, imported when they are first used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import a module that belongs to one of the package's extras.

    Args:
        module: name of the module, such as ``"soundfile"``.
        extra: the extra, or several separated by commas, that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: the module is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"{module} is not installed. Install it with: pip install 'w2vbert_fast[{extra}]'",
            name=module,
        ) from error
