"""Compiling a model's Triton kernels in parallel, before the first call needs them.

A forward pass notes what it would launch and launches nothing; Triton then compiles all of that in
threads, whose work is machine code and not Python, and keeps it in its own cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from w2vbert_fast import cpus, ops
from w2vbert_fast.inference.pipeline import features_of
from w2vbert_fast.models import Wav2Vec2BertForCTC
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

UTTERANCE_FRAMES = 500
"""10 seconds."""
TOKENS = tuple(UTTERANCE_FRAMES >> shift for shift in (3, 2, 1)) + tuple(
    UTTERANCE_FRAMES << shift for shift in range(7)
)
"""Of batches, from 62 to 32,000: their products have other tiles."""


@dataclass(frozen=True)
class Launch:
    """What Triton was asked for.

    Attributes:
        function: the `triton.jit` function.
        args: of the launch.
        grid: of the launch.
        keywords: constants and options.
    """

    function: Any
    args: tuple[Any, ...]
    grid: Any
    keywords: dict[str, Any]

    def compile(self) -> float:
        """Have it compiled where that has not been done; seconds."""
        started = time.perf_counter()
        self.function.run(*self.args, grid=self.grid, warmup=True, **self.keywords)
        return time.perf_counter() - started


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches of Triton kernels inside are not made, and listed. Results hold garbage."""
    from triton.runtime.jit import JITFunction

    from csrc_triton import plans

    found: list[Launch] = []
    plans.forget()  # which launch without asking Triton

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        found.append(Launch(self, args, grid, keywords))

    with patch.object(JITFunction, "run", note):
        yield found


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """One of those that Triton compiles one kernel for, as far as is seen without asking it."""

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16
        if isinstance(value, int) and not isinstance(value, bool):
            return value == 1, value % 16 == 0, value < 2**31
        return repr(value)

    found: dict[Any, Launch] = {}
    for launch in launches:
        constants = sorted((name, repr(value)) for name, value in launch.keywords.items())
        found.setdefault((launch.function, *map(described, launch.args), *constants), launch)
    return list(found.values())


def compile_all(
    launches: Sequence[Launch], device: torch.device, workers: int | None = None
) -> tuple[int, float, float]:
    """Have Triton compile what launches need.

    Args:
        launches: as `noted` lists them.
        device: that they are for.
        workers: threads; `None`: as many as this process may use CPUs.

    Returns:
        How many kernels, seconds of the clock, and seconds of all threads together, which one call
        after another would have waited for.
    """
    needed = distinct(launches)

    def compiled(launch: Launch) -> float:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return launch.compile()

    started = time.perf_counter()
    with ThreadPoolExecutor(workers or cpus.of_process().usable) as pool:
        waited = sum(pool.map(compiled, needed))
    return len(needed), time.perf_counter() - started, waited


def model_launches(
    model: Any, forward: Callable[[Any, int], object], tokens: Sequence[int] = TOKENS
) -> list[Launch]:
    """What is launched from a waveform to a model's outputs, and to tokens where it has CTC's head.

    Args:
        model: the model.
        forward: runs it on a batch of so many tokens.
        tokens: of the batches.
    """
    parameter = next(model.parameters())
    with noted() as launches, torch.inference_mode():
        features_of(model, SeamlessM4TFeatureExtractor(), [torch.rand(16_000)])
        for count in tokens:
            forward(model, count)
        if isinstance(model, Wav2Vec2BertForCTC):
            logits = parameter.new_zeros(2, model.config.vocab_size)
            ends = torch.tensor([0, 2], dtype=torch.int32, device=parameter.device)
            ops.ctc_greedy(logits, ends, 0)
    return launches
