"""Capture and replay of CUDA graphs: all that `graphs` asks of a device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from w2vbert_fast.ops.dispatch import runs_triton

Run = Callable[[], list[Tensor]]


class GraphDevice(Protocol):
    """What `graphs.LayerGraphs` needs of a device. `CudaGraphs` is the real one."""

    def problem(self, x: Tensor) -> str | None:
        """Why nothing can be recorded or replayed for `x` here and now; `None` if it can."""

    def capture(self, device: torch.device, run: Run) -> tuple[list[Tensor], Callable[[], object]]:
        """Record `run`, which may be called several times.

        Returns:
            The tensors that each replay writes, and the function that replays.
        """

    def turn(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """What is launched inside waits for what was launched inside before, on any stream."""

    def wait(self) -> None:
        """Wait for what was launched in the last turn."""


class CudaGraphs:
    """Capture and replay on CUDA and ROCm devices. Not thread-safe by itself."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: Any = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._done: torch.cuda.Event | None = None

    def problem(self, x: Tensor) -> str | None:
        """See `GraphDevice`."""
        if not x.is_cuda:
            return f"the tensors are on {x.device}; graphs need a CUDA device"
        if not runs_triton(x):
            return f"the Triton kernels do not run for {x.dtype} tensors on {x.device}"
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                return "another graph is being captured"
        return None

    def capture(self, device: torch.device, run: Run) -> tuple[list[Tensor], Callable[[], object]]:
        """See `GraphDevice`. All graphs share one memory pool: they never run at the same time, and
        none reads what another one wrote.
        """
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            # On this stream first: it compiles the kernels.
            run()
            side = self._streams.setdefault(device, torch.cuda.Stream())  # type: ignore[no-untyped-call]
            # This context puts the stream back if the end of the capture fails.
            with torch.cuda.stream(current):
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    run()
                current.wait_stream(side)
                # A pool may not be used again once its last graph has gone.
                pool = self._pool if self._alive else None
                pool = torch.cuda.graph_pool_handle() if pool is None else pool
                self._pool = None  # one that a capture failed in is not used again either
                graph = torch.cuda.CUDAGraph()
                # Other threads may allocate memory and wait for the device meanwhile.
                place: dict[str, Any] = {
                    "pool": pool,
                    "stream": side,
                    "capture_error_mode": "thread_local",
                }
                try:
                    with torch.cuda.graph(graph, **place):
                        outputs = run()
                except Exception as error:
                    # Ending a capture that failed raises too, and hides what made it fail.
                    raise (error.__context__ or error) from None
                self._pool = pool
        self._alive.add(graph)
        return outputs, graph.replay

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """See `GraphDevice`. Two streams that replay one graph would share its buffers."""
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done = stream.record_event()

    def wait(self) -> None:
        """See `GraphDevice`."""
        if self._done is not None:
            self._done.synchronize()
