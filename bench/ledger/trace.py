"""Runs a model on tensors without data and writes down what every operation costs.

`FakeTensorMode` computes shapes only, so a batch of 24 layers takes a second and no GPU. A dispatch
mode sees each operation with its arguments and results; the storages that are alive after it give
the peak of the activation memory.

Both models run on "meta", ours with the Triton path forced: PyTorch built without CUDA refuses
tensors that claim to be on "cuda" in places, and has no autograd for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bench.ledger.aten import aten_cost, launches
from bench.ledger.cost import Call, Cost
from bench.ledger.kernels import kernels
from bench.ledger.ours import FLOPS
from csrc_triton import architectures
from tools.compile.target import Target
from tools.virtual_gpu.requests import Uncompiled, requests
from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.operation import OPERATIONS

DEVICE = "meta"
"""Tensors on it count; those on the CPU are the host's bookkeeping."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """One operation of a trace.

    Attributes:
        name: such as "w2vbert.linear" or "aten.bmm".
        shape: of its largest result, or of the two factors of a matrix product.
        cost: what it costs.
    """

    name: str
    shape: str
    cost: Cost


@dataclass
class Trace:
    """The operations of a run in order, and the most bytes of activations alive at once.

    The inputs and the weights do not count as activations; the outputs do.
    """

    operations: list[Operation] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def cost(self) -> Cost:
        return sum((operation.cost for operation in self.operations), Cost())


def _tensors_in(values: object) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [v for v in leaves if isinstance(v, Tensor) and v.device.type == DEVICE]


class Counter(TorchDispatchMode):
    """Writes down the operations that run under it in `trace`.

    Args:
        arch: the architecture whose launch configurations count, such as "sm_90".
    """

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch
        self.trace = Trace()
        self._live: dict[int, int] = {}
        self.live_bytes = 0
        self.given: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # or a copy where it must be, such as `contiguous`, which this shows
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = _tensors_in((args, kwargs))
        for tensor in tensors:  # what the run did not allocate itself
            storage = tensor.untyped_storage()._cdata
            if storage not in self._live:
                self.given.add(storage)
        result = func(*args, **kwargs)
        results = _tensors_in(result)
        if func.namespace == "prim" or not (tensors or results):
            return result
        for tensor in results:
            self._allocate(tensor)
        cost = self._cost(func, args, kwargs, tensors, results, result)
        if cost is not None:
            self.trace.peak_bytes = max(self.trace.peak_bytes, self.live_bytes + cost.temporary)
            name = f"{func.namespace}.{func.overloadpacket.__name__}"
            self.trace.operations.append(Operation(name, _shape(cost, tensors, results), cost))
        return result

    def _cost(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        results: list[Tensor],
        result: object,
    ) -> Cost | None:
        schema = func._schema.arguments
        arguments = {argument.name: argument.default_value for argument in schema}
        arguments |= dict(zip((argument.name for argument in schema), args, strict=False))
        arguments |= kwargs
        if func.namespace == "w2vbert":
            return self._operation(func.overloadpacket.__name__, arguments, results)
        if not launches(func):
            return None
        return aten_cost(
            func,
            arguments,
            tensors,
            results,
            lambda counter: int(counter(*args, **kwargs, out_val=result)),
        )

    def _operation(self, name: str, arguments: dict[str, Any], results: list[Tensor]) -> Cost:
        """Of an operation of ours: what its Triton form does, and its arithmetic."""
        if name not in FLOPS:
            raise NotImplementedError(
                f"the ledger has no cost for torch.ops.w2vbert.{name}; add its FLOPs to "
                "bench/ledger/ours.py"
            )
        storages: dict[int, int] = {}
        key = (self.arch, name, str(tree_map(partial(_described, storages), arguments)))
        costs = kernels().costs
        if key not in costs:
            costs[key] = self._launched(name, arguments)
        return costs[key] + FLOPS[name](Call(arguments, results))

    def _launched(self, name: str, arguments: dict[str, Any]) -> Cost:
        """Of the kernels, ours and PyTorch's, that the Triton form of an operation launches."""
        cost = Cost()

        def note(request: Uncompiled) -> None:
            nonlocal cost
            cost += kernels().cost(request)

        gpu = Target.of(self.arch).gpu
        with unset_fake_temporarily(), torch.no_grad(), requests(gpu, note):
            given = tree_map(without_memory(), arguments)
            with Counter(self.arch) as counter:
                result = OPERATIONS[name].run(*given.values())
        held = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors_in(result)
        }
        temporary = max(counter.trace.peak_bytes - sum(held.values()), 0)
        return replace(cost + counter.trace.cost, temporary=temporary)

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self.given:
            return
        self._live[key] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.trace.peak_bytes = max(self.trace.peak_bytes, self.live_bytes)

    def _free(self, key: int) -> None:
        self.live_bytes -= self._live.pop(key, 0)


def _described(storages: dict[int, int], value: object) -> object:
    """An argument as another may be too: a tensor by its place in one of the `storages`."""
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    number = storages.setdefault(storage._cdata, len(storages))
    place = (number, storage.nbytes(), value.storage_offset(), value.shape, value.stride())
    return f"{place} {value.dtype} {value.device}"


def without_memory() -> Callable[[object], object]:
    """A function that gives arguments whose tensors nobody fakes, in storages shared as theirs."""
    storages: dict[int, torch.UntypedStorage] = {}

    def converted(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=DEVICE)
            storages[storage._cdata] = made.untyped_storage()
        empty = torch.empty(0, dtype=value.dtype, device=DEVICE)
        place = (value.storage_offset(), value.shape, value.stride())
        return empty.set_(storages[storage._cdata], *place)

    return converted


def _shape(cost: Cost, tensors: list[Tensor], results: list[Tensor]) -> str:
    shown = [max(results, key=Tensor.numel)] if results else []
    if cost.matrix_flops:
        shown = [tensor for tensor in tensors if tensor.dim() > 1][:2]
    return " @ ".join("x".join(str(size) for size in tensor.shape) for tensor in shown)


class AsOnAGpu(TorchFunctionMode):
    """Replaces functions that run other operations on a GPU than on tensors without data.

    Args:
        sdpa: the kernel that stands for `scaled_dot_product_attention`: "efficient", or "math",
            which is what PyTorch itself decomposes to on tensors without data.
    """

    def __init__(self, sdpa: str = "efficient") -> None:
        super().__init__()
        if sdpa not in ("efficient", "math"):
            raise ValueError(f"sdpa is {sdpa!r}; it must be 'efficient' or 'math'")
        self.sdpa = sdpa

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.sdpa == "efficient":
            return _efficient_attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """What `dropout` does on a GPU: one kernel, which keeps a mask of a byte an element."""
    if not training or p == 0.0:
        return x
    dropped: Tensor = aten.native_dropout.default(x, p, True)[0]
    return dropped


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` does on a GPU when it takes its memory-efficient kernel.

    The flash kernel takes no additive mask. The memory-efficient one wants rows of the mask at
    multiples of 16 elements, and PyTorch pads a mask whose rows are not (1500 is not).
    """
    if attn_mask is not None and attn_mask.shape[-1] % 16:
        frames = attn_mask.shape[-1]
        padded = F.pad(attn_mask, (0, -frames % 16))
        attn_mask = aten.slice.Tensor(padded, attn_mask.dim() - 1, 0, frames)
    output: Tensor = aten._scaled_dot_product_efficient_attention.default(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return output


@contextmanager
def without_data(arch: str, sdpa: str = "efficient", training: bool = False) -> Iterator[None]:
    """Tensors made inside have no data, and operations of ours run the kernels for `arch` on them.

    Nothing needs a gradient, except in `training`.
    """

    with (
        FakeTensorMode(),
        torch.set_grad_enabled(training),
        AsOnAGpu(sdpa),
        on_triton(arch),
    ):
        yield


@contextmanager
def on_triton(arch: str) -> Iterator[None]:
    """Operations of ours run the kernels for `arch`, wherever their tensors are."""

    def choose(*_: object) -> str:
        return "triton"

    with (
        patch.object(dispatch, "_forced", "triton"),
        patch.object(dispatch, "_implementation", choose),
        patch.object(architectures, "architecture", lambda device: arch),
    ):
        yield


def place(module: nn.Module, dtype: torch.dtype, training: bool = False) -> None:
    """Gives a module that was built on "meta" parameters and buffers there, without data.

    To be called inside `without_data`. In `training` the parameters need gradients.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(empty, requires_grad=training)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                to = dtype if buffer.is_floating_point() else buffer.dtype
                part._buffers[name] = torch.empty(buffer.shape, dtype=to, device=DEVICE)


def trace(function: Callable[[], object], arch: str) -> Trace:
    """The second of two runs of `function`, inside `without_data`.

    What is prepared once (packed weights, tables) belongs to the first.
    """
    function()
    with Counter(arch) as counter:
        result = function()
    del result
    return replace(counter.trace)


@dataclass
class StepTrace:
    """Forward pass and loss, and backward pass, of one training step.

    Attributes:
        forward: operations up to the loss.
        backward: operations after it.
        kept_bytes: activations alive between the two: what autograd saved for the backward pass,
            and what is computed again begins from. Parameters and inputs do not count.
        peak_bytes: most bytes alive at once in the whole step, with the parameters' gradients.
    """

    forward: Trace
    backward: Trace
    kept_bytes: int
    peak_bytes: int


def trace_step(function: Callable[[], Tensor], arch: str) -> StepTrace:
    """One run of `function`, which returns a loss, and its backward pass, inside `without_data`."""
    with Counter(arch) as counter:
        loss = function()
        behind, kept = len(counter.trace.operations), counter.live_bytes
        peak = counter.trace.peak_bytes
        loss.backward()  # type: ignore[no-untyped-call]
    operations = counter.trace.operations
    forward, backward = Trace(operations[:behind], peak), Trace(operations[behind:])
    return StepTrace(forward, backward, kept, counter.trace.peak_bytes)
