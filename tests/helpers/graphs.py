"""CUDA graphs without CUDA: what a graph would replay runs again, on the same buffers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Rerun:
    """A `GraphDevice` for any device.

    Like a graph it leaves its outputs unwritten at capture, overwrites them at each replay, and
    must be used in turn.

    Attributes:
        captures: number of captures so far.
        reason: what `problem` answers.
        error: what `capture` raises after its first run.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.reason: str | None = None
        self.error: Exception | None = None
        self.in_turn = False

    def problem(self, x: Tensor) -> str | None:
        return self.reason

    def capture(
        self, device: torch.device, run: Callable[[], list[Tensor]]
    ) -> tuple[list[Tensor], Callable[[], object]]:
        assert self.in_turn
        self.captures += 1
        with torch.inference_mode(False):
            outputs = [torch.full_like(output, math.nan) for output in run()]
        if self.error is not None:
            raise self.error

        def replay() -> None:
            assert self.in_turn
            self.replays += 1
            time.sleep(0.0)  # lets another thread in
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        return outputs, replay

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        assert not self.in_turn
        self.in_turn = True
        try:
            yield
        finally:
            self.in_turn = False

    def wait(self) -> None:
        assert not self.in_turn
