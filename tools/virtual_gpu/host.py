"""What a launch costs the host: Triton's own launcher in C, over a CUDA driver that does nothing.

`host_driver` compiles `stub.c` to a `libcuda.so.1` and makes Triton's driver for NVIDIA of it. From
specialisation to `cuLaunchKernelEx` everything is Triton's own, on tensors that lie on the CPU. No
kernel runs: what launches would write is never written.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_drivers

from .driver import THREADS_PER_WARP

_LIBRARY = "libcuda.so.1"


class NoHostDriver(RuntimeError):
    """There is none here; the message says why."""


def _library(folder: Path) -> ctypes.CDLL:
    """The stub, compiled and loaded under the name by which Triton looks for the real one."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        raise NoHostDriver(f"this process has loaded a {_LIBRARY}; time launches in one of its own")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoHostDriver("there is no C compiler (gcc or clang), which Triton's launcher needs")
    path = folder / _LIBRARY
    source = Path(__file__).with_name("stub.c")
    command = [compiler, "-shared", "-fPIC", "-O2", f"-Wl,-soname,{_LIBRARY}", "-o"]
    command += [str(path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0:
        raise NoHostDriver(f"{compiler} does not compile the stub of CUDA: {built.stderr.strip()}")
    return ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL | os.RTLD_NOW)


@contextlib.contextmanager
def host_driver(target: str = "sm_90") -> Iterator[Callable[[], int]]:
    """Triton launches on CPU tensors go through its own launcher to nowhere inside the block.

    A process may enter it once.

    Args:
        target: of the kernels' compilation, such as `sm_90`.

    Yields:
        The number of launches that have reached the driver so far.

    Raises:
        NoHostDriver: no C compiler, another driver of CUDA in this process, or a Triton without its
            backend for NVIDIA.
    """
    if knobs.runtime.interpret:
        raise NoHostDriver("TRITON_INTERPRET is set: kernels would be interpreted, not launched")
    try:
        from triton.backends.nvidia.driver import CudaDriver
    except ImportError as error:
        raise NoHostDriver(f"this Triton has no backend for NVIDIA: {error}") from None
    version = int(target.removeprefix("sm_"))

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", version, THREADS_PER_WARP)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    with tempfile.TemporaryDirectory() as folder, knobs.nvidia.scope():
        library = _library(Path(folder))
        knobs.nvidia.libcuda_path = folder
        before = triton_drivers._active
        triton_drivers.set_active(Driver())
        try:
            yield library.stub_launches
        finally:
            triton_drivers.set_active(before)
