"""Registration of operations as `torch.ops.w2vbert.*`.

`torch.library.custom_op` does the same with more checks at every call: 15 microseconds of Python,
against 4 for what is registered here (two cores of a server, in `torch.inference_mode`; under
`torch.no_grad` PyTorch's autograd kernel adds about 11). An encoder of 24 layers makes 340 calls,
so a call that nobody records, traces, casts or watches goes to the implementation at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("w2vbert", "FRAGMENT")  # type: ignore[no-untyped-call]
# Compilers hand over tensors with the strides that they would have without compilation; in the
# older PyTorch that has no such tag, with strides in the same order.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

Autocast = Literal["lower", "float32", "as_is"]
"""What autocast does to an operation's floating-point tensors: cast to autocast's dtype, to
float32, or nothing. The operation itself then runs without autocast."""


def operation(
    schema: str, fake: Callable[..., Any], *, autocast: Autocast = "as_is"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as `torch.ops.w2vbert.<name>`, for every device.

    It has no gradient until `differentiable` gives it one.

    Args:
        schema: such as `"linear(Tensor x, Tensor weight) -> Tensor"`. No argument is written to and
            no result shares memory with an argument or with another result.
        fake: the same signature; gives results of the right shape, strides and dtype without
            computing anything.
        autocast: what happens to its arguments under `torch.autocast`.

    Returns:
        A decorator. In the function's place it leaves one that calls the registered operation, or
        the function itself where PyTorch would do nothing else (`_runs_at_once`).
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"w2vbert::{name}", fake, lib=_LIBRARY)
        registered: Callable[..., Any] = getattr(torch.ops.w2vbert, name).default
        for device_type, key in _AUTOCAST_DEVICES.items():
            _LIBRARY.impl(name, _under_autocast(registered, device_type, key, autocast), key)

        @functools.wraps(implementation)
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            function = implementation if _runs_at_once(x) else registered
            return function(x, *args, **kwargs)

        return call

    return register


def _runs_at_once(x: Tensor) -> bool:
    """Whether PyTorch's dispatcher would hand a call with this first argument straight on."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.is_autocast_enabled(x.device.type)
    )


def backward_operation(
    schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`operation` for the gradient of one, which has no gradient itself.

    Whoever differentiates it gets a RuntimeError that says so.
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        registered = operation(schema, fake)(implementation)
        name = schema.partition("(")[0]

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"w2vbert::{name} is a gradient and has no gradient itself: the fast kernels do "
                "not support double backward; set use_fast_kernels=False for it"
            )

        torch.library.register_autograd(f"w2vbert::{name}", backward, lib=_LIBRARY)
        return registered

    return register


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Give the operation `torch.ops.w2vbert.<name>` a gradient.

    Args:
        name: of an operation registered before.
        setup_context: `(ctx, inputs, output)`, keeps what the backward pass needs.
        backward: `(ctx, *grads)` -> a gradient or `None` for each argument of the schema.
    """
    torch.library.register_autograd(
        f"w2vbert::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def dense_rows(grad: Tensor) -> Tensor:
    """A gradient whose last dimension is contiguous, as kernels need it; sums expand theirs."""
    return grad if grad.stride(-1) == 1 and grad.stride(0) > 0 else grad.contiguous()


def _under_autocast(
    registered: Callable[..., Any], device_type: str, key: str, autocast: Autocast
) -> Callable[..., Any]:
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        if autocast != "as_is":
            lower = autocast == "lower"
            dtype = torch.get_autocast_dtype(device_type) if lower else torch.float32
            args = tuple(_cast(value, device_type, dtype) for value in args)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return registered(*args)

    return kernel


def _cast(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    """Floating-point tensors of the device in `dtype`, float64 as it is, as autocast does."""
    if isinstance(value, list):
        return [_cast(entry, device_type, dtype) for entry in value]
    if (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.device.type == device_type
    ):
        return value.to(dtype)
    return value
