"""The encoder's layers as CUDA graphs, for small packed batches (`compile_for_inference`).

A layer is 14 operations, each of which costs the host more than a small batch costs the GPU. A CUDA
graph records them once and is then launched as one. It is recorded for fixed sizes and addresses,
so a batch is copied into buffers of the next larger size. In the packed layout that needs no
masks: the tokens left over are further utterances, of zeros, and no utterance sees another.
"""

from __future__ import annotations

import itertools
import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.layers import (
    Wav2Vec2BertConvolutionModule,
    Wav2Vec2BertEncoderLayer,
    Wav2Vec2BertFeedForward,
    Wav2Vec2BertSelfAttention,
    has_global_hooks,
    is_touched,
)
from w2vbert_fast.models.optimized.cuda_graphs import CudaGraphs, GraphDevice
from w2vbert_fast.models.optimized.stacked import StackedSelfAttention
from w2vbert_fast.models.positions import (
    Wav2Vec2BertRelPositionalEmbedding,
    Wav2Vec2BertRotaryPositionalEmbedding,
)
from w2vbert_fast.ops.attention import MAX_TRITON_HEAD_SIZE

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 8192
DEFAULT_MAX_GRAPHS = 64
"""Each default bucket more than twice."""
DEFAULT_MAX_BYTES = 2**30
"""Of all graphs' buffers; one of 8,192 tokens and 1,024 channels in bf16 has 32 MiB."""
SMALLEST_STEP = 64
"""Tokens between the smallest buckets."""
SHORTEST_FILLER = 128
"""Filling utterances are this long, or as long as the longest real one: longer ones would make the
attention over nothing costly, shorter ones would be many."""
FEWEST_UTTERANCES = 16
"""Smallest number of utterances in a graph; the next ones are four times as large."""

# Everything that an answer depends on besides the input is in these modules' parameters, which
# `_State` watches. Others (LoRA, quantisation, wrappers) have state that it knows nothing of.
KNOWN_MODULES = frozenset(
    {
        Wav2Vec2BertEncoderLayer,
        Wav2Vec2BertFeedForward,
        Wav2Vec2BertConvolutionModule,
        Wav2Vec2BertSelfAttention,
        StackedSelfAttention,
        Wav2Vec2BertRotaryPositionalEmbedding,
        Wav2Vec2BertRelPositionalEmbedding,
        nn.Conv1d,
        nn.Dropout,
        nn.Embedding,
        nn.LayerNorm,
        nn.Linear,
        nn.ModuleList,
    }
)


def default_buckets(max_tokens: int) -> tuple[int, ...]:
    """Token counts up to `max_tokens`: every 64 up to 512, then four to an octave."""
    sizes = [0]
    while sizes[-1] < max_tokens:
        step = max(SMALLEST_STEP, 1 << max(sizes[-1].bit_length() - 3, 0))
        sizes.append(min(sizes[-1] + step, max_tokens))
    return tuple(sizes[1:])


def filled(lengths: Sequence[int], num_tokens: int) -> list[int]:
    """Lengths of real utterances, then of those that fill up a bucket.

    Args:
        lengths: frames of the real utterances, `num_tokens` together at most.
        num_tokens: size of the bucket.

    Returns:
        Lengths that add up to `num_tokens`. Their number is a bucket as well (16, 64, 256, ...);
        the last ones are 0.
    """
    longest = max(*lengths, SHORTEST_FILLER)
    whole, rest = divmod(num_tokens - sum(lengths), longest)
    every = [*lengths, *[longest] * whole, rest]
    count = FEWEST_UTTERANCES
    while count < len(every):
        count *= 4
    return every + [0] * (count - len(every))


@dataclass
class _State:
    """What a graph takes for granted about the encoder: its parts, switches and addresses.

    Equal states give equal answers, as a replay reads the parameters where they lie. The modules
    themselves are kept, so that a new one cannot pass for an old one; of the parameters only the
    addresses are, so that memory is freed as soon as a model is moved. Made anew for each batch:
    0.4 ms for 24 layers.
    """

    modules: list[nn.Module]
    kinds: list[type]
    switches: list[tuple[bool, bool | None]]
    touched: list[bool]
    parameters: list[tuple[Any, ...]]

    @classmethod
    def of(cls, encoder: nn.Module) -> _State:
        # Not the encoder itself, which holds the graphs: it must be freed when it is let go.
        found = list(encoder._modules.values())
        for module in found:  # the list grows meanwhile
            if module is not None and module._modules:
                found += module._modules.values()
        modules = [module for module in found if module is not None]
        attributes = [module.__dict__ for module in modules]
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        return cls(
            modules,
            [type(module) for module in modules],
            [
                (encoder.training, encoder.__dict__.get("use_fast_kernels")),
                *[(own["training"], own.get("use_fast_kernels")) for own in attributes],
            ],
            [is_touched(module) for module in modules],
            [(id(p), p.data_ptr(), p.dtype, p.shape, p.stride()) for p in parameters],
        )

    def problem(self) -> str | None:
        """Why these modules cannot be captured, if they cannot."""
        if any(training for training, _ in self.switches):
            return "a part of the encoder is in training mode"
        if not self.switches[0][1]:
            return "use_fast_kernels is off"
        if unknown := {*self.kinds} - KNOWN_MODULES:
            names = ", ".join(sorted(kind.__name__ for kind in unknown))
            return f"the encoder has parts with a state of their own ({names})"
        if any(self.touched):
            return "a part of the encoder has hooks or another forward"
        for module in self.modules:
            kinds = {type(parameter) for parameter in module._parameters.values()}
            if not kinds <= {nn.Parameter, type(None)}:
                return "the encoder has parameters that are more than tensors"
            if type(module) is Wav2Vec2BertRelPositionalEmbedding:
                return 'position_embeddings_type "relative" has no kernel'
            if (
                isinstance(module, Wav2Vec2BertSelfAttention)
                and module.head_size > MAX_TRITON_HEAD_SIZE
            ):
                return f"attention heads of {module.head_size} channels have no kernel"
        return None


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured graph with its buffers.

    Attributes:
        x: `[bucket, C]`, what enters the first layer.
        cu_seqlens: int32 `[utterances + 1]`.
        seqused_k: int32 `[utterances]`, or `None` in a graph for batches without half frames.
        outputs: `[bucket, C]` each: the last layer's output, then the kept hidden states.
        kept: index of the hidden state for each of `outputs` but the first.
        replay: computes `outputs` from the rest.
        nbytes: of `x` and `outputs`.
    """

    x: Tensor
    cu_seqlens: Tensor
    seqused_k: Tensor | None
    outputs: list[Tensor]
    kept: list[int]
    replay: Callable[[], object]
    nbytes: int


class LayerGraphs:
    """The graphs of one encoder: captured when a size first comes, kept until one of them is stale.

    A graph serves one bucket of token counts and of numbers of utterances, batches with half frames
    or without, dtype, device, choice of hidden states, number of layers and precision setting. All
    are dropped when a parameter moves or is replaced, a module is replaced or changes its mode, or
    `use_fast_kernels` is switched; values that change in place are read at the next replay.
    Attributes that are no parameters, such as a norm's `eps`, are not watched. The methods are
    thread-safe.

    Arguments and errors are those of `compile_for_inference`.
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        buckets: Sequence[int] | None = None,
        max_graphs: int = DEFAULT_MAX_GRAPHS,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        chosen = None if buckets is None else tuple(buckets)
        numbers = {"max_tokens": max_tokens, "max_graphs": max_graphs, "max_bytes": max_bytes}
        numbers |= {f"buckets[{i}]": size for i, size in enumerate(chosen or ())}
        for name, value in numbers.items():
            if value is None and name == "max_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be an integer")
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if chosen is not None and (not chosen or sorted(set(chosen)) != list(chosen)):
            raise ValueError(f"buckets is {chosen}; it must be one or more rising token counts")
        if max_tokens is None:
            max_tokens = DEFAULT_MAX_TOKENS if chosen is None else chosen[-1]
        if chosen is not None and chosen[-1] < max_tokens:
            raise ValueError(
                f"the largest of buckets is {chosen[-1]}; it must be at least max_tokens, "
                f"{max_tokens}"
            )
        self.max_tokens = max_tokens
        self.buckets = default_buckets(max_tokens) if chosen is None else chosen
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.device: GraphDevice = CudaGraphs()
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._failed: set[tuple[Any, ...]] = set()
        self._state: _State | None = None
        self._problem: str | None = None  # of the state
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or stored model has the settings and captures graphs of its own.
        return type(self), (self.max_tokens, self.buckets, self.max_graphs, self.max_bytes)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers of the graphs that are kept now, without the pool they share."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def __len__(self) -> int:
        """Number of graphs that are kept now."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._clear()

    def run(
        self,
        encoder: Any,
        x: Tensor,
        layout: PackedBatch,
        wanted: set[int],
        num_layers: int | None,
    ) -> tuple[Tensor, dict[int, Tensor]] | None:
        """The encoder's layers by a graph.

        Args:
            encoder: the `Wav2Vec2BertEncoder`, always the same one.
            x: `[N, C]`.
            layout: the utterances.
            wanted: indices of the hidden states to keep.
            num_layers: run the first so many layers; `None`: all.

        Returns:
            As `Wav2Vec2BertEncoder.forward`, in new memory, without attention maps. `None` where
            the layers must run operation by operation.
        """
        num_tokens = x.shape[0]
        stop = len(encoder.layers) if num_layers is None else num_layers
        if (
            stop < 1
            or "_is_replica" in encoder.__dict__  # of DataParallel, made anew for each batch
            or not 0 < num_tokens <= self.max_tokens
            or num_tokens != layout.num_tokens
            or type(x) is not Tensor
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or _get_current_dispatch_mode() is not None
            or has_global_hooks()
        ):
            return None
        with self._lock:
            state = _State.of(encoder)
            if state != self._state:
                self._clear()
                self._state, self._problem = state, state.problem()
            problem = self._problem or self.device.problem(x)
            if problem is not None:
                self._say(f"the encoder's layers run without CUDA graphs: {problem}")
                return None
            size = self.buckets[bisect_left(self.buckets, num_tokens)]
            lengths = filled(layout.lengths, size)
            used = None
            if layout.used_lengths is not None:
                used = [*layout.used_lengths, *lengths[layout.batch_size :]]
            kept = sorted(index for index in wanted if 0 < index < stop)
            kind = (x.dtype, x.device, (*kept,), stop, used is not None, _precision())
            key = (size, len(lengths), *kind)
            if key in self._failed:
                return None
            graph = self._graphs.get(key) or self._captured(
                key, encoder, x, kept, stop, has_half_frames=used is not None
            )
            if graph is None:
                return None
            self._graphs.move_to_end(key)
            states = self._replayed(graph, x, lengths, used)
        output = states[0]
        found = dict(zip(graph.kept, states[1:], strict=True))
        found |= {index: value for index, value in ((0, x), (stop, output)) if index in wanted}
        return output, found

    def _captured(
        self,
        key: tuple[Any, ...],
        encoder: Any,
        x: Tensor,
        kept: list[int],
        stop: int,
        *,
        has_half_frames: bool,
    ) -> _Graph | None:
        size, num_utterances = key[:2]
        nbytes = (2 + len(kept)) * size * x.shape[1] * x.element_size()
        if nbytes > self.max_bytes:
            self._failed.add(key)
            self._say(
                f"the encoder's layers run without a CUDA graph for {size} tokens: its buffers "
                f"would take {nbytes} bytes, and max_bytes is {self.max_bytes}"
            )
            return None
        room = self.max_bytes - nbytes
        if len(self._graphs) >= self.max_graphs or self.nbytes > room:
            # So that nothing that is still running loses its memory.
            self.device.wait()
            while len(self._graphs) >= self.max_graphs or self.nbytes > room:
                self._graphs.popitem(last=False)

        # Buffers of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.zeros(size, x.shape[1], dtype=x.dtype, device=x.device)
            cu_seqlens = torch.full((num_utterances + 1,), size, dtype=torch.int32, device=x.device)
            cu_seqlens[0] = 0
            seqused_k = cu_seqlens.diff() if has_half_frames else None
        # The host's numbers are bounds: one utterance could be as long as the bucket. The true
        # lengths are on the device only.
        lengths = (size, *[0] * (num_utterances - 1))
        layout = PackedBatch(cu_seqlens, lengths, size, None, seqused_k=seqused_k)

        def run() -> list[Tensor]:
            with torch.inference_mode(False), torch.no_grad():
                output, states, _ = encoder.run_layers(buffer, layout, set(kept), False, stop)
            return [output, *(states[index] for index in kept)]

        try:
            with self.device.turn(x.device):
                outputs, replay = self.device.capture(x.device, run)
        except Exception as error:  # whatever stands in the way, the layers can run without
            self._failed.add(key)
            self._say(
                f"the encoder's layers run without a CUDA graph for {size} tokens in "
                f"{num_utterances} utterances of {x.dtype}: {type(error).__name__}: {error}",
                logging.WARNING,
            )
            return None
        finally:
            # A run that moves a weight leaves graphs behind that were captured before.
            state = _State.of(encoder)
            if state != self._state:
                self.device.wait()
                self._graphs.clear()
                self._state = state
        graph = _Graph(buffer, cu_seqlens, seqused_k, outputs, kept, replay, nbytes)
        self._graphs[key] = graph
        logger.info(
            "captured a CUDA graph for %d tokens in %d utterances of %s; the buffers of %d graphs "
            "take %.1f MiB of %.1f",
            *(size, num_utterances, x.dtype, len(self._graphs)),
            *(self.nbytes / 2**20, self.max_bytes / 2**20),
        )
        return graph

    def _replayed(
        self, graph: _Graph, x: Tensor, lengths: list[int], used: list[int] | None
    ) -> list[Tensor]:
        num_tokens = x.shape[0]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
        with torch.no_grad(), self.device.turn(x.device):
            # Not blocking: the driver has read pageable memory when the call returns.
            graph.cu_seqlens.copy_(starts, non_blocking=True)
            if graph.seqused_k is not None:
                counts = torch.tensor(used, dtype=torch.int32, device="cpu")
                graph.seqused_k.copy_(counts, non_blocking=True)
            graph.x[:num_tokens].copy_(x)
            graph.x[num_tokens:].zero_()
            graph.replay()
            return [output[:num_tokens].clone() for output in graph.outputs]

    def _clear(self) -> None:
        if self._graphs:
            self.device.wait()
        self._graphs.clear()
        self._failed.clear()
        self._state = None

    def _say(self, message: str, level: int = logging.INFO) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.log(level, "%s", message)


def _precision() -> tuple[Any, ...]:
    """What a matrix product's algorithm is chosen by, besides its operands."""
    matmul = torch.backends.cuda.matmul
    return (
        # Who uses the later name must not use the earlier, which older PyTorch has alone.
        matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )
