"""What launches cost the host, without a GPU: multiples of Triton's bare `CompiledKernel.run`.

python -m bench.host [--rounds 101] [--check] [--out FILE]

Triton's own launcher runs over a CUDA driver that does nothing (`tools.virtual_gpu.host`), so no
kernel is waited for and none computes. Tensors are small and lie on the CPU: the time that our
Python takes does not depend on their size, and PyTorch's own operations, which do run, take little
more than their dispatch; what lies in memory that no kernel wrote to may be denormal, on which a
CPU takes ten times as long, and is taken for zero. Every round times each row, and the bare launch
beside it. Printed are medians over rounds of the ratio, as machines differ and are shared;
microseconds are those of this run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from bench.machine import write_results
from bench.table import Table
from csrc_triton.gemm import forward as gemm
from csrc_triton.gemm.config import linear_candidates
from tools.virtual_gpu.host import NoHostDriver, host_driver
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.encoder import Wav2Vec2BertEncoder
from w2vbert_fast.models.model import Wav2Vec2BertModel
from w2vbert_fast.ops import tap_major, tuned
from w2vbert_fast.ops.dispatch import force_triton
from w2vbert_fast.ops.examples import Sizes, example
from w2vbert_fast.ops.operation import OPERATIONS

SIZES = Sizes(
    lengths=(9, 7),
    width=64,
    inner=128,
    heads=1,
    head_size=64,
    left=64,
    right=8,
    taps=31,
    vocabulary=100,
)
LAYERS = 24
"""Of the published model."""
ROUND_SECONDS = 0.004
"""Short, so that on a busy machine the median is of rounds that nothing interrupts."""
LIMITS = {f"{LAYERS} layers, inference_mode": 6.0, f"{LAYERS} layers, training step": 20.0}
"""By row, the largest multiple of a bare launch that a launch may cost on a machine that does
nothing else. Of a training step that is 25 ms where a bare launch takes 1.5 microseconds."""


@dataclass
class Row:
    """A call that is timed.

    Attributes:
        name: what it is.
        run: the call.
        mode: in which it runs.
        library: launches of the vendor's library that `run` makes.
        launches: all that `run` makes.
    """

    name: str
    run: Callable[[], object]
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    library: int = 0
    launches: int = 0


@dataclass(frozen=True)
class Result:
    """A row's medians.

    Attributes:
        name: of the row.
        launches: kernels that it launches.
        multiple: of the bare launch, that one of its launches costs.
        microseconds: of the whole row.
    """

    name: str
    launches: int
    multiple: float
    microseconds: float


def bare_launch() -> Callable[[], object]:
    """`CompiledKernel.run` of a linear layer, with the arguments that Triton would pass."""
    x, weight, bias, _ = example("linear", SIZES)
    out = x.new_empty(x.shape[0], weight.shape[0])
    config = linear_candidates(x.dtype, "sm_90")[-1]
    constants = {"LOGISTIC": "division", **gemm._constants(config, "silu", False, True, x.shape[1])}
    strides = (x.stride(0), weight.stride(0), out.stride(0))
    arguments = (x, weight, bias, out, x.shape[0], out.shape[1], x.shape[1], *strides)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = gemm._linear_kernel[(1,)](*arguments, **constants, **options)
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    names = gemm._linear_kernel.arg_names[len(arguments) :]
    arguments = (*arguments, *(constants[name] for name in names))
    return lambda: run(1, 1, 1, 0, function, metadata, None, None, None, *arguments)


def operations() -> Iterator[Row]:
    """Every operation that launches a kernel, and every gradient."""
    for name, operation in OPERATIONS.items():
        arguments = list(example(name, SIZES))
        if name.startswith("conv_norm_act"):
            place = 1 + name.endswith("_backward")
            (arguments[place],) = tap_major([arguments[place]])
        if name == "linear_stacked":
            arguments[1:] = [list(torch.cat(parts).chunk(len(parts))) for parts in arguments[1:]]
        if name.startswith("shaw_attention"):
            query, *others = example("attention_tile_map", SIZES)
            tile_map = OPERATIONS["attention_tile_map"].call(query, SIZES.head_size, *others[1:])
            if name.endswith("_backward"):
                arguments[11] = tile_map
            else:
                arguments += [tile_map, False]
        yield Row(name, lambda call=operation.call, given=tuple(arguments): call(*given))


def encoder(layers: int, eps: float = 1e-5) -> tuple[Wav2Vec2BertEncoder, Tensor, PackedBatch]:
    """An encoder with its fast kernels, and what enters it."""
    config = Wav2Vec2BertConfig(
        num_hidden_layers=layers,
        hidden_size=SIZES.width,
        intermediate_size=SIZES.inner,
        num_attention_heads=SIZES.heads,
        output_hidden_size=SIZES.width,
        layerdrop=0.0,
        layer_norm_eps=eps,
    )
    model = Wav2Vec2BertModel(config)
    model.use_fast_kernels = True
    layout = PackedBatch.from_lengths(SIZES.lengths, max(SIZES.lengths), "cpu")
    return model.encoder, torch.zeros(sum(SIZES.lengths), SIZES.width), layout


def forward(layers: int, eps: float = 1e-5) -> Callable[[], object]:
    """A forward pass through so many layers, in evaluation."""
    model, x, layout = encoder(layers, eps)
    model.eval()
    return lambda: model.run_layers(x, layout, set(), False, None)


def training_step(layers: int) -> Callable[[], object]:
    """Forward and backward through so many layers; gradients are written, not added up."""
    model, x, layout = encoder(layers)
    model.train()
    x.requires_grad_()
    parameters = [x, *model.parameters()]
    ones = torch.ones(x.shape)

    def step() -> None:
        y = model.run_layers(x, layout, set(), False, None)[0]
        torch.autograd.backward(y, ones)
        for parameter in parameters:
            parameter.grad = None

    return step


@contextmanager
def products_by_pytorch() -> Iterator[None]:
    """Inference, and PyTorch's own product where no activation follows, as for many tokens on
    Hopper. Here it computes, which for so few takes little more than its call."""
    with torch.inference_mode(), patch.object(tuned, "product_by_pytorch", lambda x, weight: True):
        yield


PRODUCTS = 5
"""Of a layer, with no activation behind them: of both feed-forward blocks the second, query, key
and value in one, the attention's output, the second of the convolution module."""


def layers() -> Iterator[Row]:
    """What all layers take, and what they share."""
    name, run = f"{LAYERS} layers", forward(LAYERS)
    yield Row(f"{name}, inference_mode", run)
    # Of another kind, so that they do not repeat what was recorded of the others.
    mixed = forward(LAYERS, 1e-6)
    products = f"{name}, PyTorch's products, inference_mode"
    yield Row(products, mixed, products_by_pytorch, LAYERS * PRODUCTS)
    yield Row(f"{name}, no_grad", run, torch.no_grad)
    yield Row(f"{name}, training step", training_step(LAYERS), torch.enable_grad)


def seconds(row: Row, calls: int) -> float:
    """Of one call, the mean of `calls` after another one, in time of this thread: what else runs
    does not count."""
    with row.mode():
        row.run()
        started = time.thread_time()
        for _ in range(calls):
            row.run()
        return (time.thread_time() - started) / calls


def measure(rows: list[Row], launches: Callable[[], int], rounds: int) -> list[Result]:
    """The medians of a bare launch and of every row that launches something.

    Args:
        rows: the first is the bare launch.
        launches: number of launches so far.
        rounds: how often each row is timed.
    """
    for row in rows:
        with row.mode():
            row.run()  # what it launches is compiled
            before = launches()
            row.run()
        row.launches = launches() - before + row.library
    rows = [row for row in rows if row.launches > 0]
    times: list[list[float]] = []
    gc.collect()
    gc.disable()
    try:
        calls = [max(1, round(ROUND_SECONDS / max(seconds(row, 3), 1e-7))) for row in rows]
        for _ in range(rounds):
            times.append([seconds(row, n) for row, n in zip(rows, calls, strict=True)])
    finally:
        gc.enable()
    return [
        Result(
            row.name,
            row.launches,
            statistics.median(t / of_round[0] for t, of_round in zip(found, times, strict=True))
            / row.launches,
            1e6 * statistics.median(found),
        )
        for row, found in zip(rows, zip(*times, strict=True), strict=True)
    ]


def table(results: list[Result]) -> Table:
    """The results for the terminal."""
    header = ("", "launches", "a launch, x bare", "us")
    cells = [
        (row.name, str(row.launches), f"{row.multiple:.1f}", f"{row.microseconds:.1f}")
        for row in results
    ]
    return Table(header, cells, title="host time")


def missed(results: list[Result]) -> list[str]:
    """The rows above their limits, in words."""
    return [
        f"{row.name}: a launch costs {row.multiple:.1f} bare launches; at most "
        f"{LIMITS[row.name]:g} are allowed"
        for row in results
        if row.multiple > LIMITS.get(row.name, float("inf"))
    ]


def run(rounds: int) -> list[Result]:
    """Measures everything once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        with host_driver() as launches, force_triton():
            with torch.no_grad():
                measured = [Row("bare launch", bare_launch()), *operations(), *layers()]
            return measure(measured, launches, rounds)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="1 if a limit is missed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    try:
        results = run(arguments.rounds)
    except NoHostDriver as error:
        print(f"host time cannot be measured here: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if arguments.out is not None:
        write_results(arguments.out, layers=LAYERS, rows=[asdict(result) for result in results])
    wrong = missed(results)
    for line in wrong:
        print(f"MISSED {line}", file=sys.stderr)
    return 1 if arguments.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
