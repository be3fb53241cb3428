"""A function of several operations whose Triton launches are recorded once and then repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from w2vbert_fast.ops.operation import OPERATIONS

_NEW_MEMORY = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
    }
)
_device_of: Callable[[Tensor], AbstractContextManager[None]] = torch.cuda.device_of


def repeated(
    run: Callable[[], list[Tensor]],
    tensors: Sequence[Tensor | None],
    values: Sequence[Any],
    parameters: Sequence[Tensor | None],
    addresses: list[int],
) -> list[Tensor]:
    """`run()`, or its launches alone where a call with arguments like these was recorded.

    The caller has made sure that nothing watches (`is_watched`), no gradient is recorded and Triton
    kernels run.

    Args:
        run: may depend on nothing but the other arguments.
        tensors: compared as `csrc_triton.plans` compares a launcher's; the first is not `None`.
        values: likewise.
        parameters: further tensors, which one of `values` describes.
        addresses: of `parameters`, 0 for `None`.
    """
    plans, table = _plans_and_table()
    key = plans.key_of((*tensors, *values))
    if key is None:
        return run()
    plan = table.get(key)
    if plan is None:
        if key in table:  # there was no way
            return run()
        tape = plans.Tape((*tensors, *parameters))
        with _device_of(cast(Tensor, tensors[0])), tape.recording(), _Operations(tape):
            results = run()
            table[key] = tape.plan(results)
        return results
    given = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return cast(list[Tensor], plan(given + addresses))


@functools.cache
def _plans_and_table() -> tuple[Any, Any]:
    from csrc_triton import plans

    return plans, plans.Table()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a tape what PyTorch does besides launches."""

    def __init__(self, tape: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "w2vbert":
            with self:
                return OPERATIONS[func._opname].run(*args)
        result = func(*args, **(kwargs or {}))
        is_new = func in _NEW_MEMORY
        self._tape.complete &= is_new or func.is_view
        self._tape.made(result, is_new)
        return result
