"""One declaration an operation: schema, plain form, fast forms, shapes of the results, gradient.

`torch.library.custom_op` does the same with more checks at every call: 15 microseconds of Python,
against 4 for what is registered here (two cores of a server, in `torch.inference_mode`; under
`torch.no_grad` PyTorch's autograd kernel adds about 11). An encoder of 24 layers makes 340 calls,
so a call that nobody traces, casts or watches goes to its implementation at once, by a function of
autograd where a gradient is recorded.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.autocast import cast

_Result = TypeVar("_Result")

_LIBRARY: Any = torch.library.Library("w2vbert", "FRAGMENT")  # type: ignore[no-untyped-call]
# Compilers hand over tensors with the strides that they would have without compilation; in the
# older PyTorch that has no such tag, with strides in the same order.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)
_is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
_AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

Autocast = Literal["lower", "float32", "as_is"]
"""What autocast does to an operation's floating-point tensors: cast to autocast's dtype, to
float32, or nothing. The operation itself then runs without autocast."""


@dataclass(frozen=True)
class Operation:
    """What was declared.

    Attributes:
        call: as `operation` returns it.
        run: the form for these arguments, which nobody records.
        plain: the plain form.
        cpu: the form of the CPU, where there is one.
        triton: the Triton form, where there is one: a function, or a launcher's name.
        takes: whether the Triton form takes these arguments; `None`: it takes all.
    """

    call: Callable[..., Any]
    run: Callable[..., Any]
    plain: Callable[..., Any]
    cpu: Callable[..., Any] | None
    triton: str | Callable[..., Any] | None
    takes: Callable[..., bool] | None


OPERATIONS: dict[str, Operation] = {}
"""Every operation that was declared, by name."""
_RECORDED: dict[str, Callable[..., Any]] = {}
"""Of those with a gradient: the form for these arguments, recorded by autograd."""
_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float, str, list})


def operation(
    schema: str,
    plain: Callable[..., _Result],
    *,
    fake: Callable[..., Any],
    triton: str | Callable[..., Any] | None = None,
    takes: Callable[..., bool] | None = None,
    cpu: Callable[..., Any] | None = None,
    autocast: Autocast = "as_is",
    results: Callable[..., Any] | None = None,
) -> Callable[..., _Result]:
    """Declare `torch.ops.w2vbert.<name>`, for every device.

    It has no gradient until `gradient` gives it one.

    Args:
        schema: such as `"linear(Tensor x, Tensor weight) -> Tensor"`. No argument is written to and
            no result shares memory with an argument or with another result. Device and dtype of the
            first `Tensor` that is not a gradient decide which form runs.
        plain: runs where no other form does, on any device, in any dtype. All forms take the
            operation's arguments, by position.
        fake: gives results of the right shape, strides and dtype without computing anything.
        triton: what runs where Triton kernels do: a function, or the name of a launcher,
            `"csrc_triton.module:function"`, which is imported when it is first called. Its
            gradients of results, arguments in front of all others, have dense rows.
        takes: whether the Triton form takes these arguments, from the deciding one on. Where it
            does not, the plain form runs. `None`: it takes all.
        cpu: what runs on a CPU in the dtypes that `dispatch` knows; `None`: the plain form.
        autocast: what happens to its arguments under `torch.autocast`.
        results: makes the operation's results of what a form returns.

    Returns:
        A function that calls the registered operation, or where nobody watches (`is_watched`) its
        form for these arguments, recorded by autograd where there is a gradient. It takes arguments
        by position.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    registered: Callable[..., Any] = getattr(torch.ops.w2vbert, name).default
    run = _ladder(registered, plain, triton, takes, cpu, results)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"w2vbert::{name}", fake, lib=_LIBRARY)

    def direct(*args: Any) -> Any:
        if is_watched(args):
            return registered(*args)
        if not torch.is_grad_enabled():
            return run(*args)
        return _RECORDED.get(name, registered)(*args)

    for device_type, key in _AUTOCAST_DEVICES.items():
        _LIBRARY.impl(name, _under_autocast(direct, device_type, key, autocast), key)

    @functools.wraps(plain)
    def call(*args: Any) -> Any:
        return (registered if _is_any_autocast_enabled() else direct)(*args)

    OPERATIONS[name] = Operation(call, run, plain, cpu, triton, takes)
    return call


def _ladder(
    registered: Any,
    plain: Callable[..., Any],
    triton: str | Callable[..., Any] | None,
    takes: Callable[..., bool] | None,
    cpu: Callable[..., Any] | None,
    results: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The operation's arguments -> its results, by the form that is for them."""
    arguments = registered._schema.arguments
    decides = next(
        index
        for index, argument in enumerate(arguments)
        if str(argument.type) == "Tensor" and not argument.name.startswith("grad")
    )
    on_cpu = plain if cpu is None else cpu
    on_triton = _by_name(triton) if isinstance(triton, str) else triton

    def run(*args: Any) -> Any:
        implementation = dispatch.implementation(args[decides])
        if implementation == "cpu":
            return on_cpu(*args)
        if implementation == "plain" or on_triton is None:
            return plain(*args)
        if takes is not None and not takes(*args[decides:]):
            return plain(*args)
        if decides:
            grads = [None if g is None else dense_rows(g) for g in args[:decides]]
            args = (*grads, *args[decides:])
        return on_triton(*args)

    return run if results is None else lambda *args: results(run(*args))


def _by_name(launcher: str) -> Callable[..., Any]:
    module, _, name = launcher.partition(":")

    @functools.cache
    def imported() -> Any:
        return importlib.import_module(module)

    def launch(*args: Any) -> Any:
        return getattr(imported(), name)(*args)

    return launch


def is_watched(args: Sequence[Any]) -> bool:
    """Whether more than autograd and autocast would see a call with these arguments: a compiler, a
    dispatch mode, the profiler, a function transform or a subclass of tensors."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, args))
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.maybe_current_level() is not None
    )


def gradient(
    schema: str,
    plain: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    triton: str | Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Give an operation a gradient, itself an operation: `<name>_backward` for `<name>`.

    Its schema says all that connects the two. Of the forward pass are kept the arguments and
    results whose names it bears; `grad` is the gradient of the first result, `grad_y` that of the
    result y, and a result without one is not differentiable. `bool[] needs`, last, says which
    tensors need a gradient, of the arguments of both schemas; these alone are then the results.
    Otherwise results are named: `grad_x` is the gradient of x, in any floating dtype. A gradient
    that is the same tensor as the one before it, which a form may return again and an operation may
    not, is a result of shape `[0]` where its argument has another shape.

    It has no gradient itself: whoever differentiates it gets a RuntimeError that says so.

    Args:
        schema: of the gradient.
        plain: as of `operation`.
        fake: as of `operation`.
        triton: as of `operation`; the Triton forms of both passes take the same arguments.
    """
    backward_name = schema.partition("(")[0]
    name = backward_name.removesuffix("_backward")
    backward = operation(
        schema,
        plain,
        fake=fake,
        triton=triton,
        takes=OPERATIONS[name].takes,
        results=_distinct,
    )

    def refuse(ctx: Any, *grads: Any) -> Any:
        refuse_double_backward(f"w2vbert::{backward_name}")

    torch.library.register_autograd(f"w2vbert::{backward_name}", refuse, lib=_LIBRARY)

    # What is where: values of the forward pass are its arguments and then its results.
    forward_schema = getattr(torch.ops.w2vbert, name).default._schema
    backward_schema = getattr(torch.ops.w2vbert, backward_name).default._schema
    entries = (*forward_schema.arguments, *forward_schema.returns)
    are_tensors = [str(entry.type) in ("Tensor", "Optional[Tensor]") for entry in entries]
    inputs = [argument.name for argument in forward_schema.arguments]
    outputs = [result.name for result in forward_schema.returns]
    values = [*inputs, *outputs]
    arguments = [argument.name for argument in backward_schema.arguments]
    grads = [n for n in arguments if n.startswith("grad")]
    of_outputs = [0 if n == "grad" else outputs.index(n.removeprefix("grad_")) for n in grads]
    tensors = [n for n in arguments if n in values and are_tensors[values.index(n)]]
    others = [n for n in arguments if n in inputs and n not in tensors]
    selects = "needs" in arguments
    found = [n for n in tensors if n in inputs]
    if not selects:
        found = [result.name.removeprefix("grad_") for result in backward_schema.returns]
    places = [inputs.index(n) for n in found]

    # The same as functions, so that a call looks nothing up by name.
    take_grads = _picker(of_outputs)
    take_tensors = _picker([values.index(n) for n in tensors])
    take_others = _picker([values.index(n) for n in others])
    arrange = _picker([[*grads, *tensors, *others, "needs"].index(n) for n in arguments])
    has_one_output = len(outputs) == 1
    not_differentiable = [i for i in range(len(outputs)) if i not in of_outputs]
    may_be_none = [str(backward_schema.arguments[i].type) != "Tensor" for i in range(len(grads))]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = (*inputs, output) if has_one_output else (*inputs, *output)
        ctx.save_for_backward(*take_tensors(values))
        ctx.others = take_others(values)
        ctx.kinds = [
            (None, None) if inputs[i] is None else (inputs[i].dtype, inputs[i].shape)
            for i in places
        ]
        if not has_one_output:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*[output[i] for i in not_differentiable])

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(inputs)
        grads = take_grads(grads)
        if not has_one_output:
            given = [grad for grad in grads if grad is not None]
            if not given:
                return tuple(found)
            if len(given) < len(grads):
                pairs = zip(grads, may_be_none, strict=True)
                grads = tuple(
                    torch.zeros_like(given[0]) if grad is None and not optional else grad
                    for grad, optional in pairs
                )
        needs = [ctx.needs_input_grad[i] for i in places]
        results = backward(*arrange((*grads, *ctx.saved_tensors, *ctx.others, needs)))
        left = iter(results)
        grad = None
        for i, needed, (dtype, shape) in zip(places, needs, ctx.kinds, strict=True):
            if needed or not selects:
                result = next(left)
                grad = grad if result.shape == (0,) != shape else result
                if grad is not None and dtype is not None:
                    found[i] = grad.to(dtype)
        return tuple(found)

    torch.library.register_autograd(
        f"w2vbert::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY
    )
    _RECORDED[name] = _recorded(
        OPERATIONS[name].run, forward_schema.arguments, setup_context, differentiate
    )
    return backward


def refuse_double_backward(name: str) -> NoReturn:
    """Somebody asks for the gradient of the gradient `name`."""
    raise RuntimeError(
        f"{name} is a gradient and has no gradient itself: the fast kernels do not support double "
        "backward; set use_fast_kernels=False for it"
    )


def _recorded(
    run: Callable[..., Any],
    arguments: Sequence[Any],
    setup_context: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """`run` with its gradient, as `torch.library.register_autograd` makes it of these functions,
    without the dispatcher."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

    defaults = [argument.default_value for argument in arguments]

    def apply(*args: Any) -> Any:
        return Recorded.apply(*args, *defaults[len(args) :])  # type: ignore[no-untyped-call]

    return apply


def _picker(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """The entries of a sequence at these places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[i] for i in places])


def _distinct(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """What the form of a gradient returns, as `gradient` says that the operation does."""
    results = [grad for grad in grads if grad is not None]
    for i in range(len(results) - 1, 0, -1):
        if results[i] is results[i - 1]:
            results[i] = results[i].new_empty(0)
    return results


def dense_rows(grad: Tensor) -> Tensor:
    """A gradient whose last dimension is contiguous, as kernels need it; sums expand theirs."""
    return grad if grad.stride(-1) == 1 and grad.stride(0) > 0 else grad.contiguous()


def _under_autocast(
    function: Callable[..., Any], device_type: str, key: str, autocast: Autocast
) -> Callable[..., Any]:
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: Any) -> Any:
        if autocast != "as_is":
            lower = autocast == "lower"
            dtype = torch.get_autocast_dtype(device_type) if lower else torch.float32
            args = tuple(_cast(value, device_type, dtype) for value in args)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return function(*args)

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
        return value if value.dtype == dtype else cast(value, dtype)
    return value
