"""A function and its gradient as straight-line Python: recorded once, run again with other tensors.

Where `plans.Tape` has launches alone, PyTorch's operations lie between them here, as a training
step needs them: products of the vendor's library, sums over tokens, casts, random numbers. Both are
written down as statements over tensors (`t3`) and addresses (`p3`), with a tensor deleted behind
the last statement that uses it:

    t9 = empty_strided((8, 16), (16, 1), dtype=c0, device=c1)
    p9 = t9.data_ptr()
    c2(stream, (p0, p9, 8, True))
    t10 = c3(as_strided(t9, (16, 8), (1, 16)), t0)

A tensor is a place in memory: what PyTorch newly made, or what was given. Views are not followed;
an address says which memory they are part of.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver as drivers

from csrc_triton.plans import NEW_MEMORY, all_arguments, caller, can_run, extent_of


class _View(NamedTuple):
    """A tensor in the memory of the `place`-th; of one without elements `None`."""

    place: int | None
    offset: int  # in bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Address(NamedTuple):
    place: int
    offset: int


@dataclass(frozen=True)
class _Step:
    """`targets = function(*arguments, **keywords)`.

    Attributes:
        targets: places of the results; `None` for a single result, of `names` the only one.
        is_pure: it writes to nothing but its results.
    """

    function: Any
    arguments: Sequence[Any]
    keywords: Mapping[str, Any]
    made: tuple[int | None, ...]
    has_many: bool
    is_pure: bool

    def used(self) -> set[int]:
        """Places that it reads, or writes to."""
        return set(_places([*self.arguments, *self.keywords.values()]))

    def touched(self) -> set[int]:
        """Places that are other ones after it."""
        made = {place for place in self.made if place is not None}
        return made if self.is_pure else made | self.used()


def _places(value: Any) -> Iterable[int]:
    if isinstance(value, _View | _Address):
        if value.place is not None:
            yield value.place
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _places(entry)


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


_STREAM = object()


class Recording:
    """What a function does, told step by step; it takes the place of a `plans.Tape`.

    Attributes:
        complete: whether all that was told can be done again.
        is_dry: what is launched from now on is compiled only, and what PyTorch computes is left
            out: a gradient is recorded that nobody asked for yet.
        steps: so far.
    """

    def __init__(self) -> None:
        takes_addresses = getattr(drivers.active, "takes_addresses", True)
        self.complete = takes_addresses and not knobs.runtime.interpret
        self.is_dry = False
        self.steps: list[_Step] = []
        self.memory: list[_View] = []  # by place
        self._extents: list[range] = []  # likewise
        self._starts: list[tuple[int, int]] = []  # address and place, sorted
        self._tensors: list[Tensor] = []  # so that no address stands for two

    def given(self, tensor: Tensor | None) -> int | None:
        """The place of a tensor that will be another one the next time; `None` without memory."""
        if tensor is None or tensor.numel() == 0:
            return None
        place = self._keep(tensor)
        mine = self._extents[place]
        number = self._starts.index((mine.start, place))
        for _, other in self._starts[max(number - 1, 0) : number + 2]:
            memory = self._extents[other]
            apart = memory.stop <= mine.start or mine.stop <= memory.start
            self.complete &= other == place or apart
        return place

    def _keep(self, tensor: Tensor) -> int:
        place = len(self.memory)
        self.memory.append(_View(place, 0, *_kind(tensor)))
        self._extents.append(extent_of(tensor))
        self._tensors.append(tensor)
        bisect.insort(self._starts, (tensor.data_ptr(), place))
        return place

    def end(self, places: Sequence[int]) -> list[Tensor]:
        """Lets memory go, but for what is returned: that of these places."""
        tensors, self._tensors = self._tensors, []
        return [tensors[place].detach() for place in places]

    def _find(self, tensor: Tensor) -> _Address | None:
        """In which memory a tensor lies."""
        address = tensor.data_ptr()
        number = bisect.bisect(self._starts, (address + 1,))
        start, place = self._starts[number - 1] if number else (0, -1)
        if number and address in self._extents[place]:
            return _Address(place, address - start)
        return None

    def view(self, tensor: Tensor) -> _View:
        """A tensor by its place in memory."""
        kind = _kind(tensor)
        found = self._find(tensor) if tensor.numel() else None
        if found is None:
            self.complete &= tensor.numel() == 0  # else nobody knows where it comes from
            return _View(None, 0, *kind)
        self.complete &= self.memory[found.place].dtype == tensor.dtype
        return _View(found.place, found.offset, *kind)

    def operation(
        self, function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]
    ) -> Any:
        """An operation of PyTorch's: its results, which are kept."""
        is_pure = not function._schema.is_mutable
        given = [self._described(value) for value in arguments]
        named = {name: self._described(value) for name, value in keywords.items()}
        leave_out = self.is_dry and is_pure and not function.is_view
        run = _without_computing if leave_out else function
        result = run(*((function,) if leave_out else ()), *arguments, **keywords)
        has_many = isinstance(result, list | tuple)
        made: list[int | None] = []
        for tensor in result if has_many else (result,):
            if not isinstance(tensor, Tensor):
                self.complete = False  # a number that the function may have decided by
                return result
            is_new = tensor.numel() > 0 and self._find(tensor) is None
            made.append(self._keep(tensor) if is_new else None)
        if any(place is not None for place in made) or not is_pure:
            if function in NEW_MEMORY and made[0] is not None:
                like = self.view(result)
                given, named = [like.shape, like.strides], {"dtype": like.dtype}
                named["device"] = like.device
                function = torch.empty_strided
            self.steps.append(_Step(function, given, named, tuple(made), has_many, is_pure))
        return result

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.view(value)
        if isinstance(value, list | tuple):
            return [self._described(entry) for entry in value]
        return value

    def launched(
        self,
        kernel: Any,
        compiled: Any,
        grid: Sequence[int],
        args: Sequence[Any],
        keywords: Mapping[str, Any],
    ) -> None:
        """A kernel was launched; arguments as of `plans.launch`."""
        if not can_run(compiled):
            self.complete = False
            return
        values = []
        for value in all_arguments(kernel, args, keywords):
            if isinstance(value, Tensor):
                view = self.view(value)
                value = 0 if view.place is None else _Address(view.place, view.offset)
            values.append(value)
        run = caller(compiled, [*grid, 1, 1][:3])
        self.steps.append(_Step(run, (_STREAM, values), {}, (), False, False))

    def needed(
        self, steps: Sequence[_Step], results: Iterable[_View | None]
    ) -> tuple[list[_Step], list[int]]:
        """The steps that results depend on, and what these steps take from elsewhere."""
        live = set(_places([*results]))
        chosen: list[_Step] = []
        made: set[int | None] = set()
        for step in reversed(steps):
            if step.touched() & live:
                chosen.append(step)
                live |= step.used()
                made.update(step.made)
        return chosen[::-1], sorted(live - made)

    def function(
        self, steps: Sequence[_Step], given: Sequence[int | None], results: Sequence[_View | None]
    ) -> Callable[[Sequence[Any]], list[Any]]:
        """Does the steps that results depend on: from tensors at the places `given` to results."""
        chosen, _ = self.needed(steps, results)
        return _Writer(self.memory, chosen, results).function(given, results)


def _without_computing(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Results of an operation as far as their memory goes."""
    device: list[torch.device] = []

    def without(value: Any) -> Any:
        if isinstance(value, Tensor):
            device.append(value.device)
            shape, strides, dtype = value.shape, value.stride(), value.dtype
            return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        if isinstance(value, torch.device):
            device.append(value)
            return torch.device("meta")
        return [without(v) for v in value] if isinstance(value, list | tuple) else value

    given = [without(value) for value in arguments]
    made = function(*given, **{name: without(value) for name, value in keywords.items()})

    def real(like: Any) -> Any:
        if not isinstance(like, Tensor):
            return like
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device[0])

    return [real(like) for like in made] if isinstance(made, list | tuple) else real(made)


class _Writer:
    """The source of a function."""

    def __init__(
        self, memory: Sequence[_View], steps: Sequence[_Step], results: Sequence[_View | None]
    ) -> None:
        self._memory = memory
        self._steps = steps
        driver = drivers.active
        self._names: dict[int, str] = {}
        self._space: dict[str, Any] = {
            "as_strided": torch.as_strided,
            "empty_strided": torch.empty_strided,
            "current_device": driver.get_current_device,
            "current_stream": driver.get_current_stream,
            "device": torch.cuda.device,
        }
        self._addressed: set[int] = set()
        self._kept = set(_places(list(results)))

    def function(
        self, given: Sequence[int | None], results: Sequence[_View | None]
    ) -> Callable[[Sequence[Any]], list[Any]]:
        number = self._written(self._space["current_device"]())
        names = [f"_{i}" if place is None else f"t{place}" for i, place in enumerate(given)]
        lines = [
            "def run(given):",
            f"    if current_device() != {number}:",
            f"        with device({number}):",
            "            return run(given)",
            f"    stream = current_stream({number})",
            f"    [{', '.join(names)}] = given",
        ]
        last = {place: i for i, step in enumerate(self._steps) for place in self._all(step)}
        mine = {place for step in self._steps for place in step.made}
        for i, step in enumerate(self._steps):
            lines += [f"    {line}" for line in self._statements(step)]
            done = [place for place in self._all(step) if last[place] == i and place in mine]
            lines += [f"    del t{place}" for place in sorted({*done} - self._kept)]
        lines.append(f"    return [{', '.join(map(self._written, results))}]")
        exec("\n".join(lines), self._space)
        run: Callable[[Sequence[Any]], list[Any]] = self._space["run"]
        return run

    def _all(self, step: _Step) -> set[int]:
        return step.used() | {place for place in step.made if place is not None}

    def _statements(self, step: _Step) -> list[str]:
        lines = []
        for value in step.arguments[1] if step.arguments[:1] == (_STREAM,) else ():
            if isinstance(value, _Address) and value.place not in self._addressed:
                self._addressed.add(value.place)
                lines.append(f"p{value.place} = t{value.place}.data_ptr()")
        arguments = [self._written(value) for value in step.arguments]
        arguments += [f"{name}={self._written(value)}" for name, value in step.keywords.items()]
        names = ["_" if place is None else f"t{place}" for place in step.made]
        targets = "" if not any(names) else f"{', '.join(names)}{',' * step.has_many} = "
        return [*lines, f"{targets}{self._written(step.function)}({', '.join(arguments)})"]

    def _written(self, value: Any) -> str:
        if value is _STREAM:
            return "stream"
        if isinstance(value, _Address):
            return f"p{value.place} + {value.offset}" if value.offset else f"p{value.place}"
        if isinstance(value, _View):
            return self._view(value)
        if type(value) in (int, bool, str, type(None)):
            return repr(value)
        if isinstance(value, list | tuple):
            return f"({''.join(f'{self._written(entry)}, ' for entry in value)})"
        name = self._names.setdefault(id(value), f"c{len(self._names)}")
        self._space[name] = value  # which also keeps it, and so its identity
        return name

    def _view(self, view: _View) -> str:
        if view.place is None:
            kind = (self._written(view.dtype), self._written(view.device))
            return f"empty_strided({view.shape}, {view.strides}, dtype={kind[0]}, device={kind[1]})"
        name = f"t{view.place}"
        if view == self._memory[view.place]:
            return name
        offset = view.offset // view.dtype.itemsize
        start = f", {name}.storage_offset() + {offset}" if offset else ""
        return f"as_strided({name}, {view.shape}, {view.strides}{start})"
