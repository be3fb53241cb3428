"""A Triton driver without a GPU.

Triton specialises, compiles and launches as it always does, for the target that the driver names,
and with tensors that lie on the CPU. Where the launch would go to CUDA it becomes a `Launch` and is
handed to a function. The interfaces are those of Triton 3.6 and later (`triton.runtime.driver`,
`triton.knobs.runtime.kernel_load_end_hook`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver as triton_drivers

from .cubin import resources
from .record import Argument, Launch, leaves, named
from .tensor_maps import encoded

# Shared memory that one block can have, in bytes: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability". Its keys are the targets there are.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_120": 99 * 1024}

THREADS_PER_WARP = 32
MOST_THREADS = 1024

_ROUNDED = 11
"""The elemtype of a tensor map that rounds float32 to tf32."""

# Decided by the place of the installation and not by the kernel or its launch.
_NOT_RECORDED = frozenset({"extern_libs"})

Run = Callable[[Launch], None]


def described_by(argument: Argument, how: Mapping[str, Any] | None) -> list[Argument]:
    """What a kernel gets for a descriptor that the host made (`expand_signature` of Triton's own
    driver): its tensor map or, where the target has none (`how` is None), the tensor and what is
    known of it; then sizes and strides."""
    name, one = argument.name, argument.value
    sizes = [*(("i32", size) for size in one.shape), *(("i64", step) for step in one.strides)]
    # Triton 3.6 has no such flag, and hands none over.
    rounds = [one.round_f32_to_tf32] if hasattr(one, "round_f32_to_tf32") else []
    if how is None:
        first = [("*i8", one.base), *(("i64", number) for _, number in sizes)]
        first += [("i1", one.padding == "nan"), *(("i1", flag) for flag in rounds)]
    else:
        size = how["elem_size"]
        map_bytes = encoded(
            one.base.data_ptr(),
            _ROUNDED if any(rounds) else how["elem_type"],
            [*one.shape[:-1], one.shape[-1] * (1 + how["fp4_padded"])],
            [size * stride for stride in one.strides[:-1]],
            how["block_size"],
            how["swizzle"],
            int(one.padding == "nan"),
        )
        first = [("nvTmaDesc", torch.from_numpy(map_bytes))]
    return [
        Argument(f"{name}.{number}", kind, value)
        for number, (kind, value) in enumerate(first + sizes)
    ]


class _Utils:
    """What Triton asks a driver about its device, and has it do to load a kernel."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._functions = itertools.count(1)

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES[self.target],
            "max_num_regs": 65536,
            # Persistent kernels start this many programs or a multiple: few are quick to execute.
            "multiprocessor_count": 4,
            "warpSize": THREADS_PER_WARP,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: object
    ) -> tuple[None, int, int, int, int]:
        """(module, function, registers, spills, most threads). The function is only a number: what
        it stands for is noted by the hook that Triton calls next. Spills are words of local memory
        a thread, as Triton's own driver counts them."""
        registers, local_bytes = resources(binary, name)
        return None, next(self._functions), registers, local_bytes // 4, MOST_THREADS


class NamedGpu:
    """What Triton asks of a driver before it compiles. Its tensors are on the CPU.

    Attributes:
        takes_addresses: whether plans may launch with a number for a tensor, of which nobody knows
            where its memory ends.
    """

    takes_addresses = False

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> tuple[object, ...]:
        return self.gpu.backend, self.gpu.arch

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu


class Driver(NamedGpu):
    """The active driver of Triton while `activated` lasts.

    Args:
        target: `sm_80`, `sm_90` or `sm_120`.
        run: called with every launch, in the order of the launches.
    """

    def __init__(self, target: str, run: Run) -> None:
        if target not in SHARED_BYTES:
            raise ValueError(f"target is {target!r}; there are {', '.join(SHARED_BYTES)}")
        super().__init__(GPUTarget("cuda", int(target.removeprefix("sm_")), THREADS_PER_WARP))
        self.target = target
        self.utils = _Utils(target)
        self.ptx: dict[int, str] = {}

        class Launcher:
            """What Triton makes for every compiled kernel, and calls to launch it."""

            def __init__(self, source: Any, metadata: Any) -> None:
                self.source = source
                self.metadata = metadata

            def __call__(
                launcher,
                grid_x: int,
                grid_y: int,
                grid_z: int,
                stream: int,
                function: int,
                packed_metadata: object,
                launch_metadata: object,
                enter: Callable[[object], None] | None,
                leave: Callable[[object], None] | None,
                *values: Any,
            ) -> None:
                if enter is not None:
                    enter(launch_metadata)
                grid = (int(grid_x), int(grid_y), int(grid_z))
                run(self.launch(launcher.source, launcher.metadata, function, grid, values))
                if leave is not None:
                    leave(launch_metadata)

        self.launcher_cls = Launcher

    def launch(
        self,
        source: Any,
        metadata: Any,
        function: int,
        grid: tuple[int, int, int],
        values: Sequence[Any],
    ) -> Launch:
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        arguments, described = [], []
        for (name, types), value in zip(source.signature.items(), values, strict=True):
            for argument in leaves(name, types, value):
                if argument.type.startswith("tensordesc"):
                    arguments += described_by(argument, next(maps, None))
                    described.append(Argument(argument.name, "*i8", argument.value.base))
                else:
                    arguments.append(argument)
        for argument in arguments + described:
            if isinstance(argument.value, torch.Tensor) and argument.value.device.type != "cpu":
                raise ValueError(
                    f"{metadata.name}: {argument.name} is on {argument.value.device}; "
                    "a virtual GPU's tensors are on the CPU"
                )
        if metadata.num_ctas != 1:
            raise NotImplementedError(
                f"{metadata.name} has num_ctas={metadata.num_ctas}; there are no clusters here"
            )
        # Triton's own memory, which lies behind the kernel's parameters: blocks work in it.
        sizes = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
        if any(sizes) or described:
            for kind, size in zip(("global", "profile"), sizes, strict=True):
                memory = torch.empty(size * math.prod(grid), dtype=torch.uint8)
                arguments.append(Argument(f"{kind}_scratch", "*i8", memory))
        arguments += described
        options = dataclasses.fields(make_backend(metadata.target).parse_options({}))
        return Launch(
            kernel=f"{source.fn.fn.__module__}:{source.fn.fn.__qualname__}",
            name=metadata.name,
            target=self.target,
            signature=source.signature,
            constants={named(source.fn, path): value for path, value in source.constants.items()},
            hints={
                named(source.fn, path): dict(hints) for path, hints in source.attrs.items() if hints
            },
            options={
                field.name: getattr(metadata, field.name)
                for field in options
                if field.name not in _NOT_RECORDED and hasattr(metadata, field.name)
            },
            grid=grid,
            arguments=arguments,
            ptx=self.ptx[function],
            shared_bytes=metadata.shared,
        )

    def loaded(
        self, module: object, function: int, name: str, files: dict[str, str], key: str
    ) -> None:
        """Triton's `kernel_load_end_hook`: where the files of the kernel just loaded lie."""
        (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
        self.ptx[function] = Path(path).read_text()

    # What Triton asks of a driver.

    def get_current_device(self) -> tuple[object, ...]:
        # Triton keeps compiled kernels and properties by device: those of two drivers stay apart.
        return self.target, id(self)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """An autotuner's. There is nothing to time, so its first configuration wins."""
        return lambda call, quantiles, **options: [0.0] * len(quantiles)


@contextlib.contextmanager
def active(driver: NamedGpu) -> Iterator[None]:
    """Triton's driver inside the block; the one before is the one after."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    before = triton_drivers._active
    triton_drivers.set_active(driver)
    try:
        yield
    finally:
        triton_drivers.set_active(before)


@contextlib.contextmanager
def activated(target: str, run: Run) -> Iterator[Driver]:
    """Triton launches go to `run` inside the block."""
    mine = Driver(target, run)
    with active(mine):
        knobs.runtime.kernel_load_end_hook.add(mine.loaded)
        try:
            yield mine
        finally:
            knobs.runtime.kernel_load_end_hook.remove(mine.loaded)
