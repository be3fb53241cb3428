"""What there is to choose from for a model on a GPU, and how it is timed there.

A product is timed with as many copies of its operands as do not stay in a cache, as a model's
layers take turns, in a CUDA graph: the host is not in it. Limits and budgets are timed with the
whole model, the host included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.doctor import error_limit, relative_error
from w2vbert_fast.inference.batching import USUAL_BUDGET, doubled
from w2vbert_fast.ops import tuned
from w2vbert_fast.ops.tuned import PYTORCH, Case, Choice, Entries, Found
from w2vbert_fast.tuning.choose import Candidate, Clock, fastest
from w2vbert_fast.tuning.warm import UTTERANCE_FRAMES, compile_all, noted

COLD_BYTES = 2**27
"""Operands that together are larger than any L2."""
MOST_COPIES = 16
CHECKED_ROWS = 256
BUCKETS = (4096, 16384, 1024, 32768, 512, 2048, 8192, 256, 64, 128, 65536)
"""The most telling first: time may be up."""
GRAPH_LIMITS = (1024, 2048, 4096, 8192, 16384, 32768)
LARGEST_BUDGET = 256_000
_PRODUCTS_SHARE = 0.75
"""Of the time, for products; the rest is for whole models."""


class GpuClock:
    """Seconds on the device between the first and the last kernel of a call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            run()  # what is made once, and what another candidate left in caches
            event: Any = torch.cuda.Event
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same call without the host: a CUDA graph, captured at its first call."""
        graphs: list[torch.cuda.CUDAGraph] = []

        def replay() -> None:
            if not graphs:
                run()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.device(self.device), torch.cuda.graph(graph):
                    run()
                graphs.append(graph)
            graphs[0].replay()

        return replay


class Product:
    """Operands of a product, and every way to compute it.

    Args:
        case: which product.
        device: where.
        num_tokens: rows; `None`: in the middle of the case's bucket.
    """

    def __init__(self, case: Case, device: torch.device, num_tokens: int | None = None) -> None:
        from csrc_triton.architectures import architecture, device_multiprocessors
        from csrc_triton.gemm.config import linear_candidates, linear_config

        columns, inner = case.shape
        dtype: torch.dtype = getattr(torch, case.dtype)
        self.dtype = dtype
        tokens = num_tokens or 3 * case.bucket // 4
        arch = architecture(device)
        self.epilogue = case.operation.partition(" ")[2]
        self.tiles = linear_candidates(dtype, arch)
        size = (tokens, columns, inner, dtype, arch, device_multiprocessors(device))
        self.usual: Choice = tuned.tile_name(linear_config(*size))
        self.may_be_pytorchs = not self.epilogue and tuned.may_be_pytorchs(tokens, dtype)
        if self.may_be_pytorchs and tuned.usually_by_pytorch(device):
            self.usual = PYTORCH
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(dtype)

        nbytes = (tokens * inner + columns * inner) * dtype.itemsize
        copies = min(max(COLD_BYTES // nbytes, 1), MOST_COPIES)
        self.operands = [
            (draw(tokens, inner), draw(columns, inner, scale=inner**-0.5), draw(columns))
            for _ in range(copies)
        ]
        outputs = columns // 2 if self.epilogue == "glu" else columns
        self.out = torch.empty(tokens, outputs, dtype=dtype, device=device)

    def computed(self, choice: Choice, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The product by one of the ways."""
        from csrc_triton import gemm

        if choice == PYTORCH:
            return F.linear(*operands)
        config = next(tile for tile in self.tiles if tuned.tile_name(tile) == choice)
        if self.epilogue == "glu":
            return gemm.linear_glu(*operands, out=self.out, config=config)
        return gemm.linear(*operands, self.epilogue or None, out=self.out, config=config)

    def is_right(self, choice: Choice) -> bool:
        """Whether a way gives finite numbers everywhere, and the right ones in a sample of rows:
        in the dtype of the operands as near to float64 as `doctor` wants it."""
        x, weight, bias = operands = self.operands[0]
        self.out.fill_(torch.nan)
        found = self.computed(choice, operands)
        if not bool(torch.isfinite(found).all()):
            return False
        step = max(len(x) // CHECKED_ROWS, 1)
        sample = slice((len(x) - 1) % step, None, step)  # the last row among them
        plain = ops.linear_glu if self.epilogue == "glu" else ops.linear
        end = () if self.epilogue in ("", "glu") else (self.epilogue,)
        given = (x[sample], weight, bias)
        exact = plain(*(tensor.double() for tensor in given), *end)
        limit = error_limit(relative_error(plain(*given, *end), exact), self.dtype)
        return relative_error(found[sample], exact) <= limit

    def candidates(
        self, prepared: Callable[[Callable[[], object]], Callable[[], object]] = lambda run: run
    ) -> list[Candidate]:
        """All ways; `prepared` makes of a call what is timed."""
        choices: list[Choice] = [tuned.tile_name(tile) for tile in self.tiles]
        if self.may_be_pytorchs:
            choices.append(PYTORCH)

        def candidate(choice: Choice) -> Candidate:
            def run() -> None:
                for operands in self.operands:
                    self.computed(choice, operands)

            timed = prepared(run)

            def right() -> bool:
                if not self.is_right(choice):
                    return False
                timed()  # so that what fails now is left out as well
                return True

            return Candidate(choice, timed, right)

        return [candidate(choice) for choice in choices]


def tune(
    model: nn.Module,
    seconds: float,
    keep: Callable[[Entries], None],
    say: Callable[[str], None],
) -> None:
    """Measure what a model on a GPU can choose, and keep what is found as it is found.

    Args:
        model: in evaluation mode with `use_fast_kernels`, on a CUDA device.
        seconds: after them nothing new is begun.
        keep: is given each answer.
        say: is told of each.
    """
    device = next(model.parameters()).device
    here, clock = tuned.machine(device), GpuClock(device)
    started = time.perf_counter()

    def is_over(share: float = 1.0) -> bool:
        return time.perf_counter() - started > share * seconds

    def found(case: Case, answer: Found | None) -> None:
        if answer is None:
            say(f"{case.operation} {case.shape}, {case.bucket} tokens: no answer")
            return
        keep({(here, case): answer})
        gain = answer.usual_seconds / answer.seconds
        instead = "" if answer.choice == answer.usual else f", {gain:.2f} times {answer.usual}"
        say(f"{case.operation} {case.shape}, {case.bucket} tokens: {answer.choice}{instead}")

    with torch.inference_mode():
        cases = products_of(model)
        kernels, taken, _ = compile_all(tile_launches(cases, device), device)
        say(f"{len(cases)} products, {kernels} kernels compiled in {taken:.0f} s")
        every = [Case(c.operation, c.shape, c.dtype, b) for b in BUCKETS for c in cases]
        for case in sorted(every, key=tuned.of_device(device).__contains__):
            if is_over(_PRODUCTS_SHARE):
                say("time for products is up; run again, it begins with the others")
                break
            answer = None
            with contextlib.suppress(torch.OutOfMemoryError):
                product = Product(case, device)
                candidates = product.candidates(clock.prepared)
                answer = fastest(candidates, product.usual, clock, is_over)
            found(case, answer)
        tuned.forget()  # what follows runs by what was found
        found(*graph_limit(model, clock, is_over))
        found(*frame_budget(model, clock, is_over))


def products_of(model: nn.Module) -> list[Case]:
    """The products of a forward pass, without their number of tokens; the largest first."""
    with tuned.asked() as asked, torch.inference_mode():
        forward(model, 16)
    cases = {Case(case.operation, case.shape, case.dtype) for case in asked}
    return sorted(
        (case for case in cases if case.operation.startswith("linear")),
        key=lambda case: (-case.shape[0] * case.shape[1], case.operation),
    )


def tile_launches(cases: Sequence[Case], device: torch.device) -> list[Any]:
    """Launches of every tile of some products."""
    with noted() as launches:
        for case in cases:
            product = Product(case, device, 64)
            for tile in product.tiles:
                product.computed(tuned.tile_name(tile), product.operands[0])
    return launches


def forward(model: Any, num_tokens: int) -> Tensor:
    """The model's first output for a batch of so many frames, in utterances of 10 seconds."""
    lengths = [UTTERANCE_FRAMES] * (num_tokens // UTTERANCE_FRAMES)
    if rest := num_tokens % UTTERANCE_FRAMES:
        lengths.append(rest)
    parameter = next(model.parameters())
    width = model.config.feature_projection_input_dim
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    features = torch.zeros(*shape, width, dtype=parameter.dtype, device=parameter.device)
    output: Tensor = model(features, mask.to(parameter.device)).to_tuple()[0]
    return output


def graph_limit(model: Any, clock: Clock, is_over: Callable[[], bool]) -> tuple[Case, Found | None]:
    """Up to how many tokens CUDA graphs make a model faster: 1 where they never do."""
    case = tuned.model_case(tuned.GRAPH_LIMIT, model.config, next(model.parameters()).dtype)
    model.compile_for_inference(max_tokens=GRAPH_LIMITS[-1])
    encoders = [part for part in model.modules() if hasattr(part, "layer_graphs")]
    graphs = [encoder.layer_graphs for encoder in encoders]

    def run(num_tokens: int, by_graph: bool) -> Tensor:
        for encoder, own in zip(encoders, graphs, strict=True):
            encoder.layer_graphs = own if by_graph else None
        return forward(model, num_tokens)

    def agree(num_tokens: int) -> bool:
        # Larger batches have other tiles, whose sums are rounded otherwise.
        exact = run(num_tokens, False)
        error = relative_error(run(num_tokens, True), exact)
        return error <= 8 * torch.finfo(exact.dtype).eps

    answer = None
    try:
        for limit in GRAPH_LIMITS:
            candidates = [
                Candidate(limit, partial(run, limit, True), partial(agree, limit)),
                Candidate(1, partial(run, limit, False), lambda: True),
            ]
            found = fastest(candidates, 1, clock, is_over)
            if found is None or (found.choice == 1 and answer is not None):
                break
            answer = found
            if found.choice == 1:
                break
    finally:
        model.compile_for_inference(enabled=False)
    return case, answer


def frame_budget(
    model: Any, clock: Clock, is_over: Callable[[], bool]
) -> tuple[Case, Found | None]:
    """Up to how many frames in a batch of a job a frame takes less time."""
    case = tuned.model_case(tuned.FRAME_BUDGET, model.config, next(model.parameters()).dtype)
    usual = USUAL_BUDGET["cuda"]
    taken: dict[int, float] = {}

    def seconds_a_frame(budget: int) -> float:
        seconds = min(clock(partial(forward, model, budget)) for _ in range(2))
        taken[budget] = seconds / budget
        return taken[budget]

    best = doubled(seconds_a_frame, LARGEST_BUDGET, is_over)
    if best not in taken:
        return case, None
    nearest = min(taken, key=lambda budget: abs(budget - usual))
    return case, Found(best, taken[best], usual, taken[nearest])
