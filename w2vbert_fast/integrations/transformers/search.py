"""The modules in whatever holds them: containers, pipelines, objects that were built around models.

Nothing but stored values is looked at: no property is read, nothing is called or loaded.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from collections.abc import Iterator
from types import MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

from torch import nn

_SEQUENCES = (list, tuple, set, frozenset, deque)
_CONTAINERS = (dict, *_SEQUENCES)
# Objects of these libraries, but for containers, hold no models, and some lead anywhere (loggers).
_CLOSED = frozenset({*sys.stdlib_module_names, "numpy", "torch"})
_ATTRIBUTES_OF_MODULES = frozenset(vars(nn.Module()))


def may_hold_modules(value: Any) -> bool:
    """Whether a value is a module, a container, or an object with attributes of its own."""
    kind: Any = type(value)
    return _may_hold(kind)


@functools.cache
def _may_hold(kind: Any) -> bool:
    if issubclass(kind, (nn.Module, *_CONTAINERS, SimpleNamespace, MethodType)):
        return True
    return not issubclass(kind, type) and str(kind.__module__).partition(".")[0] not in _CLOSED


def modules_in(root: Any) -> dict[str, nn.Module]:
    """Every module in a value, at any depth, each once.

    Args:
        root: a module, container or object (`may_hold_modules`). Cycles are no matter.

    Returns:
        The modules by where they are, as one would write it behind `root`'s name:
        `.model.encoder`, `['teacher'].encoder.layers[0]`; the root itself is at "".
    """
    found: dict[str, nn.Module] = {}
    seen = {id(root)}
    waiting = deque([("", root)])
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, nn.Module):
            found[path] = value
        for step, held in _held_by(value):
            if id(held) not in seen:
                seen.add(id(held))
                waiting.append((path + step, held))
    return found


def places_in(root: Any) -> list[str]:
    """What a value holds itself that `modules_in` looks through, with its class."""
    return [
        f"{step} ({type(held).__qualname__})"
        for step, held in _held_by(root)
        if not (isinstance(held, _CONTAINERS) and len(held) == 0)
    ]


def is_inside(path: str, other: str) -> bool:
    """Whether a path of `modules_in` leads through another, or is that."""
    return path.startswith(other) and path[len(other) :][:1] in ("", ".", "[")


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds itself that may hold modules, and how one writes the way there."""
    is_module = isinstance(value, nn.Module)
    if isinstance(value, dict):
        for key, held in list(dict.items(value)):
            if may_hold_modules(held):
                yield f"[{key!r}]", held
    elif isinstance(value, _SEQUENCES):
        for index, held in enumerate(list(value)):
            if may_hold_modules(held):
                yield f"[{index}]", held
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif is_module:
        for name, module in value._modules.items():
            if module is not None:
                yield (f"[{name}]" if name.isdecimal() else f".{name}"), module
    for name, held in _attributes(value):
        if may_hold_modules(held) and not (is_module and name in _ATTRIBUTES_OF_MODULES):
            yield f".{name}", held


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(AttributeError):
        yield from list(object.__getattribute__(value, "__dict__").items())
    if isinstance(value, nn.Module):
        return
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if type(slot) is MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # nothing in it
                    yield name, slot.__get__(value)
