"""Packages whose names are loaded on first use, so that importing them costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def names_of(
    package: str,
    modules: Mapping[str, Iterable[str]],
    aliases: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its dotted name.
        modules: the public names that each module of this project has for it.
        aliases: other names for some of them.
    """
    homes = {name: (module, name) for module, names in modules.items() for name in names}
    homes |= {alias: homes[name] for alias, name in (aliases or {}).items()}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        value = getattr(importlib.import_module(f"w2vbert_fast.{module}"), attribute)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names
