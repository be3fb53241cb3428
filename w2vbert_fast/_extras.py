"""Third-party modules: those that only some features need, and the versions of all."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Iterable
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


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name == "torch":  # its own tells the build too, as 2.13.0+cu130
            found[name] = str(importlib.import_module(name).__version__)
    return found
