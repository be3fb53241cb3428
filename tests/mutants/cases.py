"""Calls of operations that launch every kernel, and what they come to with a mutant in it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.operations import (
    OF_WAVEFORMS,
    SMALL,
    WITH_KERNELS,
    answers,
    arguments,
    leaves,
)
from tests.kernels.judge import Judge
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, ExecutionError, Executor
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.mutants import Mutant, watched
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.trace import ORDERS, Trace, traced
from w2vbert_fast.ops.dispatch import force
from w2vbert_fast.ops.examples import Sizes

# What takes longest comes last.
NAMES = sorted(WITH_KERNELS, key=lambda name: name in OF_WAVEFORMS)
_LARGER: dict[str, list[dict[str, Any]]] = {
    # The number of tiles decides which kernel it is. Few rows are missing in the last one; of the
    # columns of a product none.
    r"(linear|feed_forward)(_[a-z]+)?_backward": [{"lengths": (312, 0, 261), "inner": 112}],
    r"linear.*|feed_forward": [
        {"lengths": (64, 0, 61), "width": 304, "inner": 320},
        {"lengths": (64, 0, 61), "width": 320, "inner": 304},
        {"lengths": (312, 0, 261)},  # more rows of tiles than are numbered together
    ],
    # Three rounds of each loop over far blocks.
    r"shaw_attention.*": [{"lengths": (70, 0, 150, 1)}, {"lengths": (75, 0, 107, 330)}],
    r"ctc_greedy": [{"lengths": (70, 0, 150, 1)}, {"lengths": (1100, 0, 30, 1)}],
    r".*": [{"lengths": (70, 0, 150, 1)}],
}


def larger(name: str) -> list[Sizes]:
    """Several rounds of every loop, and tiles that are full. Taken for mutants that live at `SMALL`
    of kernels that are the same there.
    """
    changes = next(sizes for names, sizes in _LARGER.items() if re.fullmatch(names, name))
    return [dataclasses.replace(SMALL, **change) for change in changes]


def among_nans(name: str, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an operation as views whose rows are strided, with NaN in between and around;
    what the forward pass leaves for the backward one alone is as it left it."""
    schema = getattr(torch.ops.w2vbert, name).default._schema

    def view(tensor: Any, turned: bool = False) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
            return tensor
        rows = (tensor.t() if turned else tensor).flatten(1)
        buffer = torch.full((len(rows) + 2, rows.shape[1] + 32), math.nan, dtype=tensor.dtype)
        inside = buffer[1:-1, 16 : 16 + rows.shape[1]].copy_(rows)
        return inside.t() if turned else inside.unflatten(1, tensor.shape[1:])

    return tuple(
        [view(one) for one in value]
        if isinstance(value, list)
        else view(value, turned=argument.name == "conv_weight")
        if argument.name != "log_sum_exp"
        else value
        for argument, value in zip(schema.arguments, given, strict=False)
    )


HOW = ("fault", "wrong", "within the limit", "unchanged", "equal", "not reached")
UNCHECKED = Checks(races=False, written_once=False, written_whole=False, garbage=False)


@dataclass
class Ran:
    """A launch as it ran with the kernel as compiled: the bytes of its tensors after it."""

    launch: Launch
    after: dict[str, np.ndarray]
    branches: int


def _storage(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


class _Unchanged(Exception):
    """All that a mutant can still reach is as without it."""


class Case:
    """One call of one operation on one target.

    Attributes:
        name: of the operation.
        ran: its launches.
    """

    def __init__(self, name: str, sizes: Sizes, target: str, strided: bool = False) -> None:
        self.name, self.target = name, target
        self.dtype = torch.float32 if name in OF_WAVEFORMS else torch.bfloat16
        with activated(target, Executor(UNCHECKED)), force("triton"):
            self.arguments = arguments(name, sizes, self.dtype)
        self.plain, self.exact = answers(name, self.arguments)
        self.strided = strided
        self.ran: list[Ran] = []
        self.traces: dict[str, list[Trace]] = {}
        branches: list[int] = []

        def counted(launch: Launch, counts: Counts) -> None:
            branches.append(sum(n for op, n in counts.instructions.items() if op.startswith("bra")))

        executor = Executor(counted=counted)

        def run(launch: Launch) -> None:
            executor(launch)
            after = {name: _storage(t).copy() for name, t in launch.tensors.items()}
            self.ran.append(Ran(launch, after, branches[-1]))

        ours = self._called(run)
        if fault := self._off(ours):
            raise AssertionError(f"{name} on {target}: {fault}")

    def _called(self, run: Callable[[Launch], None]) -> list[Tensor]:
        given = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, self.arguments)
        if self.strided:
            given = among_nans(self.name, given)
        # What is never written has the same bits in every run.
        torch.use_deterministic_algorithms(True)
        try:
            with torch.no_grad(), activated(self.target, run), force("triton"):
                return leaves(getattr(torch.ops.w2vbert, self.name)(*given))
        finally:
            torch.use_deterministic_algorithms(False)

    def _off(self, ours: list[Tensor]) -> str:
        """By how much results are further off than the tests of kernels let them be, or nothing."""
        try:
            Judge().operation(self.name, self.dtype, ours, self.plain, self.exact)
        except AssertionError as error:
            return str(error).partition("\n")[0]
        return ""

    def tried(self, ptx: str, mutant: Mutant) -> Outcome:
        """What the call does with the mutant in place of the kernel."""
        mine = [n for n, ran in enumerate(self.ran) if ran.launch.ptx == ptx]
        most = 4 * sum(ran.branches for ran in self.ran) + 1000
        number, same = -1, True

        def run(launch: Launch) -> None:
            nonlocal number, same
            number += 1
            ran = self.ran[number]
            if number in mine:
                Executor()(one.launch(launch))
                for name, tensor in launch.tensors.items():
                    same &= np.array_equal(_storage(tensor), ran.after[name])
                if same and number == mine[-1]:
                    raise _Unchanged
            elif same:
                for name, tensor in launch.tensors.items():
                    _storage(tensor)[:] = ran.after[name]
            else:
                Executor(UNCHECKED)(launch)

        with watched(mutant, most) as one:
            try:
                said = self._off(self._called(run))
                how = "wrong" if said else "within the limit"
            except _Unchanged:
                how, said = "unchanged", ""
            except ExecutionError as fault:
                how, said = "fault", str(fault).partition("\n")[0]
        if how in ("unchanged", "within the limit"):
            if not one.reached:
                how = "not reached"
            elif one.differs is False or not self._is_needed(ptx, mutant):
                how = "equal"
        return Outcome(how, said)

    def _is_needed(self, ptx: str, mutant: Mutant) -> bool:
        """Whether a statement of synchronisation is, by the accesses that were written down."""
        if (what := ORDERS.get(mutant.before.split()[0])) is None:
            return True
        left = int(mutant.after.split()[1], 0) if mutant.after else None
        if ptx not in self.traces:
            self.traces[ptx] = self._traced(ptx)
        return any(trace.needs(what, mutant.line, left) for trace in self.traces[ptx])

    def _traced(self, ptx: str) -> list[Trace]:
        traces = []
        number = -1

        def run(launch: Launch) -> None:
            nonlocal number
            number += 1
            if launch.ptx == ptx:
                with traced() as trace:
                    Executor(UNCHECKED)(trace.launch(launch))
                traces.append(trace)
            for name, tensor in launch.tensors.items():
                _storage(tensor)[:] = self.ran[number].after[name]

        self._called(run)
        return traces


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        how: "fault" or "wrong": it was noticed. "not reached", "equal": nothing of what the kernel
            does in this call was changed. "unchanged", "within the limit": it lives.
        said: the fault.
    """

    how: str
    said: str

    @property
    def noticed(self) -> bool:
        return self.how in ("fault", "wrong")

    @property
    def rank(self) -> int:
        """Of two calls the one that says more of the mutant comes first."""
        return HOW.index(self.how)
