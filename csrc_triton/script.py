"""A function of several launchers as straight-line Python: recorded once, run with other tensors.

Where a plan of `plans` keeps what one launcher does with tensors, which must be its arguments or
its own, this keeps what many do one after the other, and PyTorch's operations between them:
products of the vendor's library, and of a training step sums over tokens, casts, random numbers.
They are written down as statements over tensors (`t3`) and addresses (`p3`), with a tensor deleted
behind the last statement that uses it:

    p9 = address + 512
    c2(stream, (p0, p9, 8, True))
    t10 = empty_strided((8, 16), (16, 1), dtype=c0, device=c1)
    p10 = t10.data_ptr()
    c3(stream, (p9, p10, 8, True))
    t11 = c4(as_strided(t10, (16, 8), (1, 16)), t0)

A tensor is a place in memory: what PyTorch newly made, or what was given. Views are not followed;
an address says which memory they are part of. What only launches use lies in one buffer, where
memory is used again as its last reader allows.
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

_NEW_MEMORY = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
    }
)
"""What PyTorch allocates with, as it is dispatched."""
_BINDINGS = {
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.cat.default: torch.cat,
    torch.ops.aten.clone.default: torch.clone,
    torch.ops.aten.contiguous.default: Tensor.contiguous,
    torch.ops.aten.linear.default: torch.nn.functional.linear,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.mul.Tensor: torch.mul,
    torch.ops.aten.sum.dim_IntList: torch.sum,
}
"""By operation what takes the same arguments and is called in a microsecond or two less."""
_ALIGNMENT = 256  # of what is allocated together; no kernel is specialised on more than 16


class _View(NamedTuple):
    """A tensor in the memory of the `place`-th; of one without elements `None`."""

    place: int | None
    offset: int  # in bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    behind: tuple[int, ...] = ()  # places that it reaches into, of tensors that lie end to end

    @property
    def nbytes(self) -> int:
        """From the first element to the last."""
        pairs = zip(self.shape, self.strides, strict=True)
        return (1 + sum((size - 1) * stride for size, stride in pairs)) * self.dtype.itemsize


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

    @property
    def is_launch(self) -> bool:
        return self.arguments[:1] == (_STREAM,)

    def touched(self) -> set[int]:
        """Places that are other ones after it."""
        made = {place for place in self.made if place is not None}
        return made if self.is_pure else made | self.used()


def _places(value: Any) -> Iterable[int]:
    if isinstance(value, _View | _Address):
        if value.place is not None:
            yield value.place
        if isinstance(value, _View):
            yield from value.behind
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _places(entry)


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


_STREAM = object()

Function = Callable[[Sequence[Any], Sequence[int]], list[Any]]
"""From tensors, and addresses of the last of them, to results."""


class Recording:
    """What a function does, told step by step.

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
        start, memory = tensor.data_ptr(), _View(place, 0, *_kind(tensor))
        self.memory.append(memory)
        self._extents.append(range(start, start + memory.nbytes))
        self._tensors.append(tensor)
        bisect.insort(self._starts, (start, place))
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

    def _address(self, tensor: Tensor) -> _Address | None:
        """Where a tensor lies; `None` where it has no elements."""
        found = self._find(tensor) if tensor.numel() else None
        if found is None:
            self.complete &= tensor.numel() == 0  # else nobody knows where it comes from
        return found

    def view(self, tensor: Tensor) -> _View:
        """A tensor by its place in memory."""
        kind, found = _kind(tensor), self._address(tensor)
        if found is None:
            return _View(None, 0, *kind)
        self.complete &= self.memory[found.place].dtype == tensor.dtype
        view = _View(found.place, found.offset, *kind)
        first = bisect.bisect(self._starts, (self._extents[found.place].start, found.place))
        stop = bisect.bisect(self._starts, (tensor.data_ptr() + view.nbytes,))
        return view._replace(behind=tuple(place for _, place in self._starts[first:stop]))

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
            if function in _NEW_MEMORY and made[0] is not None:
                like = self.view(result)
                given, named = [like.shape, like.strides], {"dtype": like.dtype}
                named["device"] = like.device
                function = torch.empty_strided
            casts = function is torch.ops.aten._to_copy.default and [*keywords] == ["dtype"]
            if casts and arguments[0].dtype != keywords["dtype"]:
                function = Tensor.to
            function = _BINDINGS.get(function, function)
            self.steps.append(_Step(function, given, named, tuple(made), has_many, is_pure))
        return result

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.view(value)
        if isinstance(value, list | tuple):
            return [self._described(entry) for entry in value]
        return value

    def launched(self, call: Callable[..., object], arguments: Sequence[Any]) -> None:
        """A kernel was launched: by `call` of a stream and the arguments it is launched again."""
        values = [self._address(v) or 0 if isinstance(v, Tensor) else v for v in arguments]
        self.steps.append(_Step(call, (_STREAM, values), {}, (), False, False))

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
        self,
        steps: Sequence[_Step],
        given: Sequence[int | None],
        results: Sequence[_View | None],
        num_addresses: int = 0,
    ) -> Function:
        """Does the steps that results depend on, with tensors at the places `given`.

        Of the last `num_addresses` it is given the addresses, too.
        """
        chosen, _ = self.needed(steps, results)
        return _Writer(self.memory, chosen, results).function(given, results, num_addresses)


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
            "cuda": torch.cuda,
        }
        self._kept = set(_places(list(results)))
        self._offsets, self._num_bytes = self._arranged()
        self._addressed = set(self._offsets)

    def _arranged(self) -> tuple[dict[int, int], int]:
        """Where in one buffer lies what only launches use, and the size of that buffer.

        The largest first, each at the lowest place that is free from its first launch to its last.
        """
        used: dict[int, list[int]] = {}
        others = set(self._kept)
        for number, step in enumerate(self._steps):
            if step.is_launch:
                for place in step.used():
                    used.setdefault(place, []).append(number)
            else:
                others |= step.used()
        new = {step.made[0] for step in self._steps if step.function is torch.empty_strided}
        places = [place for place in used if place in new - others]
        placed: list[tuple[int, int, int]] = []
        offsets: dict[int, int] = {}
        for place in sorted(places, key=lambda place: -self._memory[place].nbytes):
            size, first, last = self._memory[place].nbytes, used[place][0], used[place][-1]
            offset = 0
            for start, stop, other in sorted(placed):
                beside = used[other][-1] < first or last < used[other][0]
                if not beside and start < offset + size and offset < stop:
                    offset = -(-stop // _ALIGNMENT) * _ALIGNMENT
            offsets[place] = offset
            placed.append((offset, offset + size, place))
        return offsets, max((stop for _, stop, _ in placed), default=0)

    def function(
        self, given: Sequence[int | None], results: Sequence[_View | None], num_addresses: int
    ) -> Function:
        number = self._written(self._space["current_device"]())
        cut = len(given) - num_addresses
        used = {place for step in self._steps for place in step.used()} | self._kept
        lines = [
            "def run(given, addresses=()):",
            f"    if current_device() != {number}:",
            f"        with cuda.device({number}):",
            "            return run(given, addresses)",
            f"    stream = current_stream({number})",
        ]
        self._addressed.update(place for place in given[cut:] if place is not None)
        others = [step.used() for step in self._steps if not step.is_launch]
        as_tensors = used - self._addressed | self._kept.union(*others)
        lines += [f"    t{p} = given[{i}]" for i, p in enumerate(given) if p in as_tensors]
        lines += [f"    p{p} = addresses[{i}]" for i, p in enumerate(given[cut:]) if p in used]
        if self._offsets:
            device = self._written(self._memory[next(iter(self._offsets))].device)
            size = f"({self._num_bytes},), (1,), dtype={self._written(torch.uint8)}"
            lines.append(f"    memory = empty_strided({size}, device={device})")
            lines.append("    address = memory.data_ptr()")
            lines += [f"    p{p} = address + {offset}" for p, offset in self._offsets.items()]
        last = {place: i for i, step in enumerate(self._steps) for place in self._all(step)}
        mine = {place for step in self._steps for place in step.made} - set(self._offsets)
        for i, step in enumerate(self._steps):
            if step.made[:1] and step.made[0] in self._offsets:
                continue
            lines += [f"    {line}" for line in self._statements(step)]
            done = [place for place in self._all(step) if last[place] == i and place in mine]
            lines += [f"    del t{place}" for place in sorted({*done} - self._kept)]
        lines.append(f"    return [{', '.join(map(self._written, results))}]")
        exec("\n".join(lines), self._space)
        run: Function = self._space["run"]
        return run

    def _all(self, step: _Step) -> set[int]:
        return step.used() | {place for place in step.made if place is not None}

    def _statements(self, step: _Step) -> list[str]:
        lines = []
        for value in step.arguments[1] if step.is_launch else ():
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
