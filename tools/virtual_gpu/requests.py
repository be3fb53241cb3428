"""What launches would ask Triton to compile, without compiling and launching anything.

    with requests(GPUTarget("hip", "gfx942", 64)) as found:
        kernel[(3,)](x, out, x.numel(), BLOCK=1024)
    found[0].compiled().asm

Triton specialises as for a launch; its hook in front of the compiler says what it would compile,
and that it need not. So tensors may lie on the CPU or have no memory at all ("meta"): a tensor
without memory counts as aligned. Every target that Triton compiles for will do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .driver import NamedGpu, active
from .record import Launch, Request, leaves, named

# What Triton itself adds to the options of a launch.
_OF_THE_SESSION = frozenset({"debug", "instrumentation_mode"})
# The options that have another default on every target.
_RESOLVED = ("num_warps", "num_ctas", "num_stages")


@dataclass(frozen=True)
class Uncompiled(Request):
    """A launch whose kernel is still to be compiled.

    Attributes:
        source: what `triton.compile` takes.
        gpu: and the target.
    """

    source: ASTSource
    gpu: GPUTarget

    @property
    def name(self) -> str:
        """The function's, without what all kernels' names have."""
        return self.kernel.rpartition(":")[2].removeprefix("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        """Equal for two launches of one target that one compilation serves."""
        facts = (self.signature, self.constants, self.hints, self.options)
        return repr((self.kernel, *(sorted(fact.items()) for fact in facts)))

    def compiled(self) -> Any:
        """Triton's compiled kernel, as the launch would have run it; `asm` holds its code."""
        return triton.compile(self.source, target=self.gpu, options=dict(self.options))

    def launch(self) -> Launch:
        """The launch with its code, of a target whose code is PTX."""
        kernel = self.compiled()
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(Request)}
        return Launch(
            **facts,
            name=kernel.metadata.name,
            ptx=kernel.asm["ptx"],
            shared_bytes=kernel.metadata.shared,
        )


@contextlib.contextmanager
def requests(
    gpu: GPUTarget, noted: Callable[[Uncompiled], None] | None = None
) -> Iterator[list[Uncompiled]]:
    """Launches inside the block are not made, and listed.

    Args:
        gpu: for which they are specialised.
        noted: called with each launch in place of listing it, which keeps what it was given alive.
    """
    found: list[Uncompiled] = []
    keep = found.append if noted is None else noted
    under_way: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    run, before = JITFunction.run, knobs.runtime.jit_cache_hook

    def noting(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        under_way.append((grid, args, dict(kwargs)))
        try:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        finally:
            under_way.pop()

    def note(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        grid, args, kwargs = under_way[-1]
        names = function.arg_names
        bound = function.signature.bind(*args, **{n: v for n, v in kwargs.items() if n in names})
        bound.apply_defaults()
        if callable(grid):
            grid = grid(bound.arguments)
        x, y, z, *_ignored = (*map(int, grid), 1, 1)
        (places,) = compile["configs"]
        options = {n: v for n, v in kwargs.items() if n not in {*names, *_OF_THE_SESSION}}
        keep(
            Uncompiled(
                kernel=f"{function.fn.__module__}:{function.fn.__qualname__}",
                target=f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch),
                signature=compile["signature"],
                constants={named(function, path): v for path, v in compile["constants"].items()},
                hints={named(function, path): dict(h) for path, h in places.items() if h},
                options=options | {name: compile[name] for name in _RESOLVED},
                grid=(x, y, z),
                arguments=[
                    argument
                    for name, types in compile["signature"].items()
                    for argument in leaves(name, types, bound.arguments[name])
                ],
                source=ASTSource(function, compile["signature"], compile["constants"], places),
                gpu=gpu,
            )
        )
        return True  # as if another process had compiled it: Triton then launches nothing

    with active(NamedGpu(gpu)):
        JITFunction.run = noting
        knobs.runtime.jit_cache_hook = note
        try:
            yield found
        finally:
            JITFunction.run = run
            knobs.runtime.jit_cache_hook = before
