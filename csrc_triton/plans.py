"""Launch plans: what a launcher did once, done again for arguments like those.

A launcher checks its arguments, chooses tiles, allocates results, and has Triton specialise, look
up and launch a kernel: 30 microseconds of Python, of which the launch is one and a half. All but
the launch depends on what the arguments are and never on what they hold. So the first call is kept
as a plan; a call with arguments like those allocates the same and launches the same compiled
kernels.

A `planned` launcher allocates with `empty`, launches with `launch`, and does nothing else to a
tensor: no operation of PyTorch, not even a view. What its plans assume:

* the arguments: tensors by dtype, device, shape, strides and the lowest four bits of the address,
  on which Triton specialises (on AMD also whether the storage ends within 2 GB), others by value.
  Containers, configurations and subclasses of tensors are never planned;
* Triton's driver, and its settings that change how a kernel is compiled or run. Where launches have
  hooks, as under a profiler, nothing runs by a plan;
* Triton's interface: where a launch gives back no kernel that can be run as `_Steps.plan` does, as
  in its interpreter, there is no plan;
* the tables that tiles are chosen from: who changes one calls `forget`.

Streams, and which device is the current one, are asked for at every launch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from triton import knobs
from triton.runtime.driver import driver as drivers

_Value = TypeVar("_Value")
_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])
_Plan = Callable[[Sequence[Any]], Any]
_Call = Callable[[Any, tuple[Any, ...]], object]

MOST_PLANS = 1024
"""So many of a launcher are kept; then they are forgotten. A plan takes some kilobytes."""

_TENSORS = frozenset({Tensor, nn.Parameter})
_VALUES = frozenset({type(None), bool, int, float, str})
_IS_AMD = torch.version.hip is not None
_RUN_ARGUMENTS = 9
"""In front of a kernel's own: grid, stream, function, metadata of kernel and launch, two hooks."""


def _reader(names: Sequence[str], owner: object) -> Callable[[object], object]:
    """Reads those settings that this Triton has."""
    return attrgetter("__class__", *[name for name in names if hasattr(owner, name)])


_runtime_settings = _reader(("debug", "add_stages_inspection_hook"), knobs.runtime)
_compilation_settings = _reader(("instrumentation_mode",), knobs.compilation)
# Chains, which may be empty.
_hooks = attrgetter("launch_enter_hook.calls", "launch_exit_hook.calls")
_all_plans: list[Table[Any]] = []


class _Recording(threading.local):
    steps: _Steps | None = None  # of the planned launcher that runs in this thread
    tape: Any = None  # of the function around it


_recording = _Recording()
# Triton says that it has loaded a kernel before it has.
_loading = threading.RLock()


class Table(dict[tuple[Any, ...], _Value]):
    """Plans by what they assume, which `forget` drops. At `MOST_PLANS` it begins anew."""

    def __init__(self) -> None:
        super().__init__()
        _all_plans.append(self)

    def __setitem__(self, key: tuple[Any, ...], value: _Value) -> None:
        if len(self) >= MOST_PLANS:
            self.clear()
        super().__setitem__(key, value)


@contextlib.contextmanager
def told(tape: Any) -> Iterator[None]:
    """In this block, launches of this thread are kept by a `script.Recording`."""
    outer, _recording.tape = _recording.tape, tape
    try:
        yield
    finally:
        _recording.tape = outer


def forget() -> None:
    """Drop all plans: other tiles may be chosen for arguments that have had some."""
    for plans in _all_plans:
        plans.clear()


def planned(launcher: _Launcher) -> _Launcher:
    """A launcher that is called by position, its first argument a tensor, run by plans.

    It runs with that tensor's device as the current one, on which Triton launches.
    """
    plans: Table[_Plan] = Table()

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        key = key_of(args) if _recording.tape is None else None
        if key is not None:
            plan = plans.get(key)
            if plan is not None:
                return plan(args)
        with torch.cuda.device_of(args[0]):
            if key is None:
                return launcher(*args)
            distinct = _distinct(args)
            steps = _recording.steps = _Steps(distinct)
            try:
                result = launcher(*distinct)
            finally:
                _recording.steps = None
            plan = steps.plan(result)
            result = _given(result, args, distinct)
        if plan is not None:
            plans[key] = plan
        return result

    return cast(_Launcher, launcher if knobs.runtime.interpret else run)


def key_of(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a plan assumes about a launcher's arguments; `None` where there is to be none."""
    runtime = knobs.runtime
    try:
        entering, leaving = _hooks(runtime)
        parts = [drivers.active, _runtime_settings(runtime)]
    except (AttributeError, RuntimeError):  # another kind of hook; Triton's, without a device
        return None
    if entering or leaving:
        return None
    parts.append(_compilation_settings(knobs.compilation))
    for value in args:
        kind = type(value)
        if kind in _TENSORS:
            parts += (value.dtype, value.device, value.shape, value.stride())
            parts.append(value.data_ptr() & 15)
            if _IS_AMD:
                parts.append(value.untyped_storage().nbytes() < 2**31)
        elif kind in _VALUES:
            parts.append(value)
        else:
            return None
    return tuple(parts)


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments without a tensor that is there twice: in calls that the plan will serve those
    may be two, and what happens to which is known by the object."""
    seen: set[int] = set()
    distinct = []
    for value in args:
        if isinstance(value, Tensor):
            value = value.detach() if id(value) in seen else value
            seen.add(id(value))
        distinct.append(value)
    return distinct


def _given(result: Any, args: Sequence[Any], distinct: Sequence[Any]) -> Any:
    """The result with the caller's tensors where `_distinct` put others."""
    if isinstance(result, tuple):
        return tuple(_given(value, args, distinct) for value in result)
    if isinstance(result, Tensor):
        for own, other in zip(args, distinct, strict=True):
            if other is result:
                return own
    return result


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, front: int = 0
) -> Tensor:
    """`torch.empty`, contiguous, for planned launchers.

    Where `front` is not 0, the tensor has one dimension and the first `front` elements left out:
    they are memory that kernels may read.
    """
    whole = torch.empty(tuple(shape), dtype=dtype, device=device)
    tensor = whole[front:] if front else whole
    if _recording.steps is not None:
        _recording.steps.allocated(whole, tensor, front)
    return tensor


def launch(kernel: Any, grid: Sequence[int], *args: Any, **keywords: Any) -> None:
    """`kernel[grid](*args, **keywords)`, for planned launchers.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along x, or along x, y and z.
        args: the kernel's arguments in front of its constants.
        keywords: its constants, and options of its compilation.
    """
    recorders = [r for r in (_recording.steps, _recording.tape) if r is not None]
    with _loading:
        if getattr(_recording.tape, "is_dry", False):
            compiled = kernel.warmup(*args, grid=tuple(grid), **keywords)
        else:
            compiled = kernel[tuple(grid)](*args, **keywords)
        call = caller(compiled, [*grid, 1, 1][:3]) if recorders and can_run(compiled) else None
    for recorder in recorders:
        if call is None:
            recorder.complete = False
        else:
            constants = [keywords[name] for name in kernel.arg_names[len(args) :]]
            recorder.launched(call, [*args, *constants])


class _Steps:
    """What a launcher has done."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.tensors = list(args)  # and what was allocated
        self.empties: list[tuple[Any, ...]] = []
        self.numbers: list[Any] = []  # behind the tensors, so counted from the end
        self.launches: list[tuple[_Call, list[tuple[bool, int]]]] = []
        self.complete = True
        self.num_args = len(args)

    def allocated(self, whole: Tensor, tensor: Tensor, front: int) -> None:
        self.tensors.append(tensor)
        self.empties.append((whole.shape, whole.stride(), whole.dtype, whole.device, front))

    def launched(self, call: _Call, arguments: Sequence[Any]) -> None:
        self.launches.append((call, [self._place(value) for value in arguments]))

    def _place(self, value: Any) -> tuple[bool, int]:
        """Whether it is a tensor, and where it is in `tensors` or `numbers`."""
        if isinstance(value, Tensor):
            for place, tensor in enumerate(self.tensors):
                if tensor is value:
                    return True, place
            self.complete = False  # nobody knows where it comes from
        self.numbers.append(value)
        return False, len(self.numbers) - 1

    def plan(self, result: Any) -> _Plan | None:
        """Does the same with other arguments; `None` where that cannot be."""
        results = result if isinstance(result, tuple) else (result,)
        returned = [self._place(value) for value in results]
        if not self.complete:
            return None

        def values_at(places: Sequence[tuple[bool, int]]) -> Callable[[Sequence[Any]], Any]:
            offset = len(self.tensors)
            return itemgetter(*[i if is_tensor else offset + i for is_tensor, i in places])

        driver = drivers.active
        device = driver.get_current_device()
        current_device, current_stream = driver.get_current_device, driver.get_current_stream
        empties, numbers = self.empties, self.numbers
        launches = [(call, values_at(places)) for call, places in self.launches]
        give = values_at(returned) if results else lambda _: ()

        def plan(args: Sequence[Any]) -> Any:
            if current_device() != device:
                with torch.cuda.device(device):
                    return plan(args)
            values = list(args)
            for size, strides, dtype, where, front in empties:
                whole = torch.empty_strided(size, strides, dtype=dtype, device=where)
                values.append(whole[front:] if front else whole)
            values += numbers
            stream = current_stream(device)
            for call, pick in launches:
                call(stream, pick(values))
            return give(values)

        return plan


def can_run(compiled: Any) -> bool:
    """Whether a launch gave back a kernel whose `run` is that of Triton 3.6 to 3.9."""
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return False
    try:
        kinds = [
            parameter.kind for parameter in inspect.signature(compiled.run).parameters.values()
        ]
    except (TypeError, ValueError):
        return False
    *first, last = kinds
    return len(first) == _RUN_ARGUMENTS and last is inspect.Parameter.VAR_POSITIONAL


def caller(compiled: Any, grid: Sequence[int]) -> _Call:
    """Launches a kernel on a stream with arguments in the order of its parameters, constants too.

    `compiled.run` asks every time for what depends on the kernel alone, and then calls a function
    in C. Where that function takes grid and stream first and the arguments last, as in Triton 3.7,
    this calls it with what `run` would pass between them; kernels that need scratch memory, which
    is new for every launch, and any other Triton, go by `run`.
    """
    run, given = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    needs_scratch = any(getattr(run, f"{kind}_scratch_size", 1) for kind in ("global", "profile"))
    if hasattr(run, "launch") and not needs_scratch:
        calls: list[tuple[Any, ...]] = []
        watched = copy.copy(run)
        watched.launch = lambda *args: calls.append(args)
        first, argument = (*grid, object()), object()
        watched(*first, *given, argument)
        (passed,) = calls
        if passed[:4] == first and passed[-1] == (argument,):
            launch, (x, y, z), between = run.launch, grid, passed[4:-1]
            return lambda stream, args: launch(x, y, z, stream, *between, args)
    return lambda stream, args: run(*grid, stream, *given, *args)
