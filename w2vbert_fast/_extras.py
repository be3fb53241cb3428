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
        ImportError: the module is not installed, and the message holds the command that installs
            it; or a library that it needs cannot be loaded.
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
    except OSError as error:
        # soundfile, where there is no libsndfile for it.
        raise ImportError(f"{module} cannot be loaded: {error}", name=module) from error
