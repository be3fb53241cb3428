"""What a launch is: everything that Triton decided before the GPU would have been asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch


@dataclass(frozen=True)
class Argument:
    """An argument of a compiled kernel: a tensor, None or a number, and its Triton type."""

    name: str
    type: str
    value: Any

    def described(self) -> Any:
        """JSON's view of the value: a tensor as dtype, shape, strides and where it starts."""
        if not isinstance(self.value, torch.Tensor):
            return self.value
        tensor = self.value
        return {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "strides": list(tensor.stride()),
            "storage_offset": tensor.storage_offset(),
            "storage_bytes": tensor.untyped_storage().nbytes(),
        }


def named(function: Any, path: Any) -> str:
    """The name of an argument that Triton gives by its place; elements of tuples as `name.0`."""
    if isinstance(path, str):
        return path
    first, *rest = path
    return ".".join([function.arg_names[first], *map(str, rest)])


def leaves(name: str, types: Any, value: Any) -> Iterator[Argument]:
    """Arguments by name, elements of tuples as `name.0`, without those that were compiled in."""
    if isinstance(types, tuple):
        for i, (part_type, part) in enumerate(zip(types, value, strict=True)):
            yield from leaves(f"{name}.{i}", part_type, part)
    elif types != "constexpr":
        yield Argument(name, types, value)


@dataclass(frozen=True)
class Request:
    """What a launch asks of Triton.

    Attributes:
        kernel: module and name of the function, `module:name`.
        target: `sm_90`, `gfx942`.
        signature: parameter -> Triton type; "constexpr" where the value was compiled in.
        constants: parameter -> the value compiled in (elements of tuples as `name.0`).
        hints: parameter -> {hint: value}, such as {"tt.divisibility": 16}.
        options: the compiler's options, num_warps and num_stages among them.
        grid: blocks in x, y and z.
        arguments: what the kernel was given, constants left out, in the order of its parameters.
    """

    kernel: str
    target: str
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    hints: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    grid: tuple[int, int, int]
    arguments: Sequence[Argument]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors among the arguments, by name."""
        return {a.name: a.value for a in self.arguments if isinstance(a.value, torch.Tensor)}

    def described(self) -> dict[str, Any]:
        """The launch without its code, in JSON's types. Two equal launches have equal descriptions:
        there is no address and no path in it."""
        return {
            "kernel": self.kernel,
            "target": self.target,
            "signature": dict(self.signature),
            "constants": dict(self.constants),
            "hints": {name: dict(hints) for name, hints in self.hints.items()},
            "options": dict(self.options),
            "grid": list(self.grid),
            "arguments": {a.name: a.described() for a in self.arguments},
        }


@dataclass(frozen=True)
class Launch(Request):
    """One launch of one compiled kernel.

    Attributes:
        name: the entry's name in the PTX.
        ptx: the code.
        shared_bytes: shared memory of one block.
    """

    name: str
    ptx: str
    shared_bytes: int

    def described(self) -> dict[str, Any]:
        return {**super().described(), "shared_bytes": self.shared_bytes}


class Recorder:
    """Writes each launch it is called with as one line of JSON."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, launch: Launch) -> None:
        # Constants may be what JSON has no word for: dtypes and other kernels. They go by name.
        self.file.write(json.dumps(launch.described(), default=str) + "\n")
        self.file.flush()
