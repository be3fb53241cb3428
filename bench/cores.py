"""What an encoder layer would reach on many cores, predicted from counts: no measurement.

python -m bench.cores [--cores 64] [--seconds 30] [--dtype bf16] [--packed] [--operations]

One layer of the published width runs here on one thread, cut into shares as on a machine of so many
cores, and counts: parallel regions, the shares of each, and of each share the FLOPs of its
products, the bytes of its other calls, and its calls. On p cores a region takes as long as its
shares when each goes to the core that is free first, and a barrier. A call that is not divided here
is PyTorch's: divided evenly where it is large, and a region of its own.

The rates of a core are measured here, on one thread: the fastest GEMM, passes over values in cache,
and the smallest call. Left out: that small products are slower than the fastest one, powers than
other passes, and that cores share memory and slow down together. The last column also counts
Python's lock, which a thread holds outside of what its calls compute: however many cores there are,
a region takes as long as its calls one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import w2vbert_fast
from bench.context import limit_threads
from bench.flops import encoder_flops
from bench.machine import DTYPES, best_gemm
from bench.table import Table
from w2vbert_fast.ops import operation
from w2vbert_fast.ops.cpu import threads

CORES = (2, 8, 32, 64)
BARRIERS = (5e-6, 10e-6)
"""Seconds."""
FRAMES_PER_SECOND = 50
_GRAIN = 1 << 15
"""Elements from which PyTorch divides a call among its threads."""


@dataclass
class Work:
    """What a share does.

    Attributes:
        flops: of its products.
        bytes: that its other calls read and write.
        calls: of PyTorch, views included.
    """

    flops: float = 0.0
    bytes: float = 0.0
    calls: int = 0

    def seconds(self, rates: Rates) -> float:
        """On one core."""
        return self.flops / rates.flops + self.bytes / rates.bytes


@dataclass
class Region:
    """Work at whose end threads wait for each other.

    Attributes:
        operation: whose it is.
        shares: of the work.
        even: one share, which PyTorch divides evenly.
    """

    operation: str
    shares: list[Work] = field(default_factory=list)
    even: bool = False

    def seconds(self, cores: int, rates: Rates, barrier: float) -> float:
        """On so many cores, each of which takes the next share when it is free."""
        times = [share.seconds(rates) for share in self.shares]
        if self.even:
            return sum(times) / cores + barrier
        free = [0.0] * cores
        for seconds in times:
            heapq.heapreplace(free, free[0] + seconds)
        lock = rates.call * sum(share.calls for share in self.shares)
        return max(*free, lock) + (barrier if len(times) > 1 else 0.0)


@dataclass(frozen=True)
class Rates:
    """What a core does in a second.

    Attributes:
        flops: of products.
        bytes: read and written in cache.
        call: seconds for which a call of PyTorch holds Python's lock.
    """

    flops: float
    bytes: float
    call: float = 0.0


class _Counter(TorchDispatchMode):
    """Counts every call; those of a divided operation by share."""

    def __init__(self, cores: int) -> None:
        super().__init__()
        self.cores = cores
        self.regions: list[Region] = []
        self.share: Work | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        work, elements = _work_of(func, args, kwargs, result)
        if self.share is not None:
            self.share.flops += work.flops
            self.share.bytes += work.bytes
            self.share.calls += 1
        elif work.flops or work.bytes:
            name = str(func).removesuffix(".default")
            self.regions.append(Region(name, [work], even=elements >= _GRAIN))
        return result

    def count(self) -> int:
        """In place of `threads.count`."""
        return self.cores if self.share is None else 1

    def run(
        self, function: Callable[[Any], Any], shares: Sequence[Any], *, divided: bool = True
    ) -> list[Any]:
        """In place of `threads.run`."""
        if self.share is not None or not divided or len(shares) == 1 or self.cores == 1:
            return [function(share) for share in shares]
        region = Region(function.__qualname__.partition(".")[0])
        self.regions.append(region)
        results = []
        for share in shares:
            self.share = Work()
            region.shares.append(self.share)
            results.append(function(share))
            self.share = None
        return results


def _work_of(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Work, int]:
    """A call's work, and the elements of its result."""
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    elements = max((tensor.numel() for tensor in results), default=0)
    if func.is_view or func in _MAKES_ROOM:
        return Work(calls=1), elements
    if flops := _flops(func, args, kwargs, result):
        return Work(flops, calls=1), elements
    moved = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in operands}
    moved |= {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in results}
    return Work(0.0, sum(moved.values()), 1), elements


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Of a product; 0 for other calls."""
    if func is torch.ops.aten.linear.default:
        return 2.0 * args[0].numel() * args[1].shape[0]
    if func.namespace in ("mkldnn", "onednn") and "linear" in str(func):
        if "reorder" in str(func) or "prepack" in str(func):
            return 0.0
        return 2.0 * args[0].numel() * result.shape[-1]
    formula = flop_registry.get(func.overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


_MAKES_ROOM = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty_strided.default,
}


@contextlib.contextmanager
def _counting(cores: int) -> Iterator[_Counter]:
    counter = _Counter(cores)
    with (
        mock.patch.object(threads, "count", counter.count),
        mock.patch.object(threads, "run", counter.run),
        # What operations are made of is counted, not they.
        mock.patch.object(operation, "is_watched", lambda args: False),
        counter,
    ):
        yield counter


def count(model: Any, x: Tensor, cores: int) -> list[Region]:
    """Regions of a pass through an encoder layer, cut as on a machine of so many cores.

    Args:
        model: with one encoder layer, in evaluation mode.
        x: `[1, T, 160]`.
        cores: threads among which operations are divided.
    """
    with torch.inference_mode(), _counting(cores) as counter:
        model(x)
    return counter.regions


def share_of_gemm(
    regions: Sequence[Region], flops: float, cores: int, rates: Rates, barrier: float
) -> float:
    """The rate of a pass of so many FLOPs, over that of as many cores' GEMMs."""
    seconds = sum(region.seconds(cores, rates, barrier) for region in regions)
    return flops / seconds / (cores * rates.flops)


def measured_rates(dtype: str) -> Rates:
    """Of this machine, on one thread."""
    with torch.inference_mode():
        values = torch.ones(1 << 17)
        passes = _seconds(lambda: values.mul_(1.0))
        one = torch.ones(1)
        call = _seconds(lambda: one.mul_(1.0))
        gemm = best_gemm(dtype, torch.device("cpu"), square=1024)
        product = _seconds(gemm.run, 1)
    return Rates(gemm.flops / product, 2 * 4 * values.numel() / passes, call)


def _seconds(call: Callable[[], object], calls: int = 200) -> float:
    """Of a call, the median, as this thread's clock has it: other processes do not count."""
    times = []
    for _ in range(7):
        start = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - start) / calls)
    return statistics.median(times)


def by_operation(regions: Sequence[Region], cores: int, rates: Rates, barrier: float) -> Table:
    """What each operation takes beyond its work spread evenly over all cores, the worst first."""
    sums: dict[str, list[float]] = {}
    for region in regions:
        even = sum(share.seconds(rates) for share in region.shares) / cores
        calls = sum(share.calls for share in region.shares)
        entry = sums.setdefault(region.operation, [0.0] * 5)
        found = (1, len(region.shares), calls, region.seconds(cores, rates, barrier), even)
        sums[region.operation] = [a + b for a, b in zip(entry, found, strict=True)]
    ordered = sorted(sums.items(), key=lambda item: item[1][4] - item[1][3])
    rows = [
        (name, *(f"{count:,.0f}" for count in counts), *(f"{1e3 * t:.2f}" for t in (taken, even)))
        for name, (*counts, taken, even) in ordered
    ]
    header = ("operation", "regions", "shares", "calls", "ms", "ms if even")
    return Table(header, rows, title=f"{cores} cores, barrier {1e6 * barrier:g} us")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cores", description=__doc__)
    parser.add_argument("--cores", type=int, action="append", help=f"default: {CORES}")
    parser.add_argument("--seconds", type=float, default=30.0, help="of audio (30)")
    parser.add_argument("--dtype", choices=[*DTYPES], default="fp32")
    parser.add_argument("--packed", action="store_true", help="weights packed, as jobs have them")
    parser.add_argument("--operations", action="store_true", help="what each takes beyond its work")
    parser.add_argument("--gflops", type=float, help="of a core's GEMM; default: measured here")
    arguments = parser.parse_args(argv)
    limit_threads(1)
    frames = round(arguments.seconds * FRAMES_PER_SECOND)
    config = w2vbert_fast.Wav2Vec2BertConfig(num_hidden_layers=1)
    model = w2vbert_fast.Wav2Vec2BertModel(config).eval().to(DTYPES[arguments.dtype])
    model.use_fast_kernels = True
    if arguments.packed:
        model.pack_weights()
    x = torch.randn(1, frames, 160, dtype=DTYPES[arguments.dtype])
    rates = measured_rates(arguments.dtype)
    if arguments.gflops is not None:
        rates = Rates(1e9 * arguments.gflops, rates.bytes, rates.call)
    unlocked = Rates(rates.flops, rates.bytes)
    flops = encoder_flops(config, [frames])
    rows, operations = [], []
    for cores in arguments.cores or CORES:
        regions = count(model, x, cores)
        shares = [share_of_gemm(regions, flops, cores, unlocked, barrier) for barrier in BARRIERS]
        locked = share_of_gemm(regions, flops, cores, rates, BARRIERS[-1])
        calls = sum(share.calls for region in regions for share in region.shares)
        cells = [f"{share:.2f}" for share in (*shares, locked)]
        rows.append((str(cores), str(len(regions)), f"{calls:,}", *cells))
        operations.append(by_operation(regions, cores, rates, BARRIERS[-1]))
    print(
        f"predicted, {arguments.dtype}, {arguments.seconds:g} s, one layer; a core: "
        f"{rates.flops / 1e9:.0f} GFLOP/s, {rates.bytes / 1e9:.0f} GB/s in cache, "
        f"{1e6 * rates.call:.1f} us of lock a call"
    )
    columns = [f"{1e6 * barrier:g} us" for barrier in BARRIERS]
    print(Table(("cores", "regions", "calls", *columns, f"{columns[-1]}, lock"), rows))
    if arguments.operations:
        print(*(f"\n{table}" for table in operations), sep="\n")


if __name__ == "__main__":
    main()
