"""A function of several operations, recorded once and then repeated (`csrc_triton.script`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from w2vbert_fast.ops.autocast import without_kept_casts
from w2vbert_fast.ops.operation import OPERATIONS, refuse_double_backward

_KEYS = torch._C.DispatchKey
_AUTOCAST = torch._C.DispatchKeySet(_KEYS.AutocastCPU) | torch._C.DispatchKeySet(_KEYS.AutocastCUDA)
_device_of: Callable[[Tensor], AbstractContextManager[None]] = torch.cuda.device_of


def repeated(
    run: Callable[[], list[Tensor]],
    tensors: Sequence[Tensor | None],
    values: Sequence[Any],
    parameters: Sequence[Tensor | None],
    addresses: list[int],
) -> list[Tensor]:
    """`run()`, or what it launches and computes where a call with arguments like these was
    recorded.

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
    function = table.get(key)
    given = (*tensors, *parameters)
    if function is not None:
        return cast(list[Tensor], function(given, addresses))
    if key in table:  # there was no way
        return run()
    table[key], results = _record(run, given, len(parameters))
    return results


def repeated_with_gradient(
    run: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    values: Sequence[Any],
    parameters: Sequence[Tensor | None],
) -> Sequence[Tensor]:
    """`run(*inputs)` where gradients are recorded, as one function of autograd where a call with
    arguments like these was recorded: the same operations in the same order, and so is its
    gradient. Whoever changes one of the tensors in between gets autograd's error. Autocast's casts
    are among the operations; a weight is cast in every call.

    The caller has made sure that nothing watches (`is_watched`), no saved tensor is packed and
    Triton kernels run.

    Args:
        run: may depend on nothing but the other arguments.
        inputs: at least one; compared as `csrc_triton.plans` compares a launcher's.
        tensors: likewise, and they may be `None`.
        values: likewise, with what autocast casts to.
        parameters: further tensors, which one of `values` describes with whether each requires a
            gradient.
    """
    plans, table = _plans_and_table()
    given = (*inputs, *tensors)
    flags = [tensor is not None and tensor.requires_grad for tensor in given]
    key = plans.key_of((*given, *values, "gradient", *flags))
    if key is None:
        return run(*inputs)
    script, made = table.get(key), None
    if script is None:
        # Hooks of these would be called for a gradient that nobody asked for.
        hooked = any(t is not None and t._backward_hooks for t in (*tensors, *parameters))
        if key not in table and not hooked:
            others = (*tensors, *parameters)
            script, made = table[key], _ = _record_with_gradient(run, inputs, others)
        if script is None:
            return run(*inputs)
    return cast(Sequence[Tensor], _apply(script, made, *script.taken((*given, *parameters))))


@dataclass(frozen=True)
class _Script:
    """What was recorded of a function and of its gradient.

    Attributes:
        taken: what is of use, of all that is given.
        forward: from what is taken to its results, and what else the gradient keeps.
        num_results: of the function.
        kept: what the gradient keeps, of all that is taken and all that `forward` returns.
        gradient: from what is kept and the gradients of the results to those of all that is taken,
            `None` where there is none.
    """

    taken: Callable[[Sequence[Any]], Sequence[Any]]
    forward: Callable[[Sequence[Any]], list[Tensor]]
    num_results: int
    kept: Callable[[Sequence[Any]], Sequence[Any]]
    gradient: Callable[[Sequence[Any]], list[Tensor | None]]


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, script: _Script, made: list[Tensor] | None, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        if made is None:
            with _without_autocast():
                made = script.forward(given)
        ctx.script = script
        ctx.save_for_backward(*script.kept((*given, *made)))
        return tuple(made[: script.num_results])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            found = _Gradient.apply(ctx.script, *ctx.saved_tensors, *grads)  # type: ignore[no-untyped-call]
            return None, None, *found
        return None, None, *_gradient(ctx.script, ctx.saved_tensors, grads)


# Without what PyTorch looks for in every argument: a function transform, which would be watching.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Repeated).apply


class _Gradient(torch.autograd.Function):
    """Somebody records the gradient too, who may never ask for its own."""

    @staticmethod
    def forward(ctx: Any, script: _Script, *given: Tensor) -> Any:
        cut = len(given) - script.num_results
        return tuple(_gradient(script, given[:cut], given[cut:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_double_backward("what was repeated of an encoder layer")


def _gradient(
    script: _Script, kept: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    # As they were when it was recorded.
    ready = [
        grad
        if grad.is_contiguous() and not grad.data_ptr() & 15
        else grad.clone(memory_format=torch.contiguous_format)
        for grad in grads
    ]
    with _without_autocast():
        return script.gradient([*kept, *ready])


def _without_autocast() -> AbstractContextManager[object]:
    """What was recorded has autocast's casts already; a gradient is computed without it."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def _begun(given: Sequence[Tensor | None]) -> tuple[Any, list[int | None]]:
    """A recording of what is done with these tensors, and their places."""
    from csrc_triton.script import Recording

    recording = Recording()
    return recording, [recording.given(tensor) for tensor in given]


def _record(
    run: Callable[[], list[Tensor]], given: Sequence[Tensor | None], num_addresses: int
) -> tuple[Any, list[Tensor]]:
    """What does the same again, from tensors and addresses of the last of them, `None` where there
    is no way; and the results."""
    recording, places = _begun(given)
    if not recording.complete:
        return None, run()
    with _device_of(cast(Tensor, given[0])), _Operations(recording):
        results = run()
    outputs = [recording.view(result) for result in results]
    if not recording.complete:
        return None, results
    return recording.function(recording.steps, places, outputs, num_addresses), results


def _record_with_gradient(
    run: Callable[..., list[Tensor]], inputs: Sequence[Tensor], others: Sequence[Tensor | None]
) -> tuple[_Script | None, list[Tensor] | None]:
    """The script, and what its `forward` would return now. The gradient is gone through, but not
    computed."""
    recording, places = _begun((*inputs, *others))
    if not recording.complete:
        return None, None
    with _device_of(inputs[0]), _Operations(recording), without_kept_casts():
        # Cut off from what comes before, which has gradients and hooks of its own.
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        results = run(*leaves)
        outputs = [recording.view(result) for result in results]
        forward = [*recording.steps]
        grads = [torch.empty(r.shape, dtype=r.dtype, device=r.device) for r in results]
        grad_places = [recording.view(grad).place for grad in grads]
        num_steps = len(recording.steps)
        needs = [tensor is not None and tensor.requires_grad for tensor in (*leaves, *others)]
        sources = [t for t, needed in zip((*leaves, *others), needs, strict=True) if needed]
        found: Sequence[Tensor | None] = ()
        if sources and recording.complete:
            recording.is_dry = True
            with _without_autocast():
                found = torch.autograd.grad(results, sources, grads, allow_unused=True)  # type: ignore[arg-type]
    backward, remaining = recording.steps[num_steps:], iter(found)
    gradients = [next(remaining, None) if needed else None for needed in needs]
    views = [None if grad is None else recording.view(grad) for grad in gradients]
    made = {place for step in forward for place in step.made}
    whole = [view for view in recording.memory if view in outputs and view.place in made]
    own = [view.place for view in outputs if view.place is not None]
    if not recording.complete or len(whole) < len(outputs):
        return None, None
    _, free = recording.needed(backward, views)
    kept = [place for place in free if place not in grad_places]
    returned = [*own, *[place for place in kept if place in made and place not in own]]
    made_of = [recording.memory[place] for place in returned]
    used = {*recording.needed(forward, made_of)[1], *kept}
    taken = [i for i, place in enumerate(places) if place in used or views[i] is not None]
    places = [places[i] for i in taken]
    all_places = [*places, *returned]

    script = _Script(
        _picker(taken),
        recording.function(forward, places, made_of),
        len(outputs),
        _picker([all_places.index(place) for place in kept]),
        recording.function(backward, [*kept, *grad_places], [views[i] for i in taken]),
    )
    return script, recording.end(returned)


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    return itemgetter(*places) if len(places) > 1 else lambda values: [values[i] for i in places]


@functools.cache
def _plans_and_table() -> tuple[Any, Any]:
    from csrc_triton import plans

    return plans, plans.Table()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a recording what PyTorch does besides launches."""

    def __init__(self, tape: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "w2vbert":
            plans, _ = _plans_and_table()
            with self, plans.told(self._tape):  # of this thread, which may be autograd's
                return OPERATIONS[func._opname].run(*args)
        return self._tape.operation(func, args, kwargs or {})
