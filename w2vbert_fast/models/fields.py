"""Fields of a configuration: a row says the default, the check of a value and what it means.

A value is kept in the one form that the rest of the package relies on (a plain `int`, a plain
`float`, a list), or is a `ValueError` with the field, the value and what is needed.

As `dataclasses` does of annotated fields, `field_class` makes a constructor of the rows of a
class. It is another one because values are checked whenever they are set, and because there are
keys that are no fields.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from w2vbert_fast.ops.activations import ACTIVATIONS

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**options: Any) -> Callable[[Any], Any]:
        """What tells type checkers of the constructor does nothing when the code runs."""
        return lambda function: function


_Class = TypeVar("_Class", bound=type)
Convert = Callable[[Any], Any]
"""From a value to the one that is kept. Raises `TypeError` or `ValueError` for others."""


class Field:
    """A field whose values are checked when they are set, and lie in the object's `__dict__`.

    Args:
        default: what the constructor sets where nothing is given.
        needed: what a value has to be, for messages.
        convert: see `Convert`.
        doc: what it means, for the class's docstring.
        common: all models of the reference have it; a file leaves it out while it has its default.
    """

    name: str

    def __init__(
        self, default: object, needed: str, convert: Convert, doc: str, common: bool = False
    ) -> None:
        self.default, self.needed, self.convert, self.common = default, needed, convert, common
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__[self.name] = self.checked(value)

    def checked(self, value: object) -> Any:
        """The value in the form that is kept. Raises `ValueError` where there is none."""
        try:
            return self.convert(value)
        except (TypeError, ValueError):
            raise fail(self.name, value, self.needed) from None


def fail(name: str, value: object, needed: str) -> ValueError:
    """The error for a value that a field cannot take."""
    return ValueError(f"{name} is {value!r}; it must be {needed}")


def fields_of(cls: type) -> dict[str, Field]:
    """The rows of a class and of those that it derives from, by name and in order."""
    found: dict[str, Field] = {}
    for kind in reversed(cls.__mro__):
        found |= {name: row for name, row in vars(kind).items() if isinstance(row, Field)}
    return found


@dataclass_transform(eq_default=False)
def field_class(cls: _Class) -> _Class:
    """Give a class the constructor of its rows, and their meaning a place in its docstring.

    The constructor calls the method `_begin` with the values of all rows by name, and with the
    keywords that are no rows. Rows behind an annotation `_: KW_ONLY` are passed by name only.
    """
    rows, kind = fields_of(cls), Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter("self", kind)]
    for name, annotation in inspect.get_annotations(cls).items():
        if annotation in (KW_ONLY, "KW_ONLY"):
            kind = Parameter.KEYWORD_ONLY  # type: ignore[assignment]
        elif name in rows:
            # A row that is given as one type and kept as another has a class that says as which.
            given = inspect.get_annotations(type(rows[name]).__set__)["value"]
            given = annotation if given == "Any" else given
            parameters.append(Parameter(name, kind, default=rows[name].default, annotation=given))
    parameters.append(Parameter("kwargs", Parameter.VAR_KEYWORD, annotation="Any"))
    signature = Signature(parameters, return_annotation="None")

    def __init__(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self, further = bound.arguments.pop("self"), bound.arguments.pop("kwargs")
        self._begin(bound.arguments, further)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__module__ = cls.__module__
    cls.__init__ = __init__  # type: ignore[misc]
    if cls.__doc__ is not None:  # as under `python -OO`
        meanings = "\n".join(f"        {name}: {row.__doc__}" for name, row in rows.items())
        cls.__doc__ = cls.__doc__.replace("        ...: the rows below.", meanings)
    return cls


# The kinds of rows. They give `Any`, so that a row's annotation is the type of its values.


def integer(
    default: int | None,
    minimum: int | None,
    doc: str,
    *,
    optional: bool = False,
    common: bool = False,
) -> Any:
    """An integer, at least `minimum`; None as well where `optional`."""
    needed = "an integer" if minimum is None else f"an integer >= {minimum}"

    def convert(value: object) -> int | None:
        return None if value is None and optional else _as_integer(value, minimum)

    return Field(default, needed + " or None" * optional, convert, doc, common)


def integers(default: Sequence[int], minimum: int, doc: str) -> Any:
    """A sequence of one or more integers, each at least `minimum`, kept as a list."""

    def convert(value: object) -> list[int]:
        if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
            raise TypeError
        return [_as_integer(item, minimum) for item in value]

    return Field(default, f"a list of one or more integers >= {minimum}", convert, doc)


def token_id(default: int, doc: str) -> Any:
    """A token id, a list of them, or None."""

    def convert(value: object) -> int | list[int] | None:
        if isinstance(value, list | tuple):
            return [_as_integer(item) for item in value]
        return None if value is None else _as_integer(value)

    return Field(default, "an integer, a list of integers or None", convert, doc)


def _as_integer(value: Any, minimum: int | None = None) -> int:
    if isinstance(value, bool):
        raise TypeError
    number = operator.index(value)
    if minimum is not None and number < minimum:
        raise ValueError
    return number


def real(
    default: float, low: float, doc: str, *, high: float = math.inf, exclusive: bool = False
) -> Any:
    """A finite number in `[low, high]`, or in `(low, high]` when `exclusive`."""
    if high == math.inf:
        needed = f"a number {'>' if exclusive else '>='} {low:g}"
    else:
        needed = f"a number from {low:g} to {high:g}"

    def convert(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError
        number = float(value)
        below = number <= low if exclusive else number < low
        if below or number > high or not math.isfinite(number):
            raise ValueError
        return number

    return Field(default, needed, convert, doc)


def share(default: float, doc: str) -> Any:
    """A number from 0 to 1: a probability, or a share of something."""
    return real(default, 0, doc, high=1)


def choice(default: object, options: Collection[object], doc: str, *, common: bool = False) -> Any:
    """One of a few values, each of its own type."""

    def convert(value: object) -> object:
        if any(isinstance(value, type(option)) and value == option for option in options):
            return value
        raise ValueError

    return Field(default, f"one of {', '.join(map(repr, options))}", convert, doc, common)


def boolean(default: bool, doc: str, *, optional: bool = False, common: bool = False) -> Any:
    """`True` or `False`; None as well where `optional`."""
    options = (True, False, None) if optional else (True, False)
    return choice(default, options, doc, common=common)


def activation(default: str, doc: str) -> Any:
    """The name of an activation, or a callable from tensor to tensor."""

    def convert(value: object) -> object:
        if callable(value) or (isinstance(value, str) and value in ACTIVATIONS):
            return value
        raise ValueError

    return Field(default, f"a callable or one of {', '.join(sorted(ACTIVATIONS))}", convert, doc)


def text(default: str, doc: str) -> Any:
    """Anything, as a string."""
    return Field(default, "a string", str, doc)


def strings(doc: str, *, common: bool = False) -> Any:
    """A list of strings or None."""

    def convert(value: object) -> list[str] | None:
        if value is None:
            return None
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return list(value)
        raise TypeError

    return Field(None, "a list of strings or None", convert, doc, common)


def floating_dtype(name: str, value: object) -> torch.dtype | None:
    """A floating point `torch.dtype`, from itself or its name (`"float32"`), or None.

    Raises:
        ValueError: it is none; the message names the field or argument.
    """
    found = value
    if isinstance(value, str):
        found = getattr(torch, value.removeprefix("torch."), None)
    if value is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found  # type: ignore[return-value]
    raise fail(name, value, 'a floating point torch.dtype or its name, such as "float32"')


# Rows that are given as one type and read as another say so themselves.


class FloatingDtype(Field):
    """A floating point `torch.dtype`, given as such or by its name, or None."""

    def __init__(self, doc: str) -> None:
        super().__init__(None, "", str, doc, common=True)

    def __get__(self, config: Any, owner: object) -> torch.dtype | None:
        return self if config is None else config.__dict__[self.name]  # type: ignore[return-value]

    def __set__(self, config: Any, value: torch.dtype | str | None) -> None:
        config.__dict__[self.name] = floating_dtype(self.name, value)


class LabelNames(Field):
    """Names of the classes by index; JSON's string keys become integers. Sets their inverse too."""

    def __init__(self, doc: str) -> None:
        needed = "a mapping of one or more class indices, none of them twice, to label names"
        super().__init__(None, needed, _label_names, doc)

    def __get__(self, config: Any, owner: object) -> dict[int, str]:
        return self if config is None else config._id2label  # type: ignore[return-value]

    def __set__(self, config: Any, value: Mapping[int, str] | Mapping[str, str] | None) -> None:
        config._id2label = self.checked(value)
        config._label2id = {label: index for index, label in config._id2label.items()}


class LabelIndices(Field):
    """Indices of the classes by name; those written as strings become integers."""

    def __init__(self, doc: str) -> None:
        needed = "a mapping of one or more label names to class indices"
        super().__init__(None, needed, _label_indices, doc)

    def __get__(self, config: Any, owner: object) -> dict[str, int]:
        return self if config is None else config._label2id  # type: ignore[return-value]

    def __set__(self, config: Any, value: Mapping[str, int] | None) -> None:
        config._label2id = self.checked(value)


class LabelCount(Field):
    """The number of classes, which is that of their names. Another one makes other names."""

    def __init__(self, doc: str) -> None:
        super().__init__(None, "an integer >= 1", lambda value: _as_integer(value, 1), doc)

    def __get__(self, config: Any, owner: object) -> int:
        return self if config is None else len(config._id2label)  # type: ignore[return-value]

    def __set__(self, config: Any, value: int | None) -> None:
        count = self.checked(value)
        if count != len(config.__dict__.get("_id2label", ())):
            config.id2label = {index: f"LABEL_{index}" for index in range(count)}


def _label_names(value: object) -> dict[int, str]:
    if not isinstance(value, Mapping) or not value:
        raise TypeError
    labels = {int(key): str(label) for key, label in value.items()}
    if len(labels) != len(value):
        raise ValueError
    return labels


def _label_indices(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or not value:
        raise TypeError
    return {str(label): int(index) for label, index in value.items()}
