"""The kernels that ship, recorded from the launchers: what they would compile, and how they launch.

Every operation is called with the sizes of the published checkpoint, facebook/w2v-bert-2.0, forward
and backward, on tensors without memory, for a long batch and for a short utterance. What the
launchers then ask of Triton is all that the lanes know of a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from csrc_triton.conv.config import conv_candidates
from csrc_triton.fbank import log_mel_filterbank
from csrc_triton.gemm.config import linear_candidates
from tools.compile.target import Target
from tools.virtual_gpu.requests import Uncompiled, requests
from w2vbert_fast.ops.examples import Sizes, example
from w2vbert_fast.ops.operation import OPERATIONS

DTYPES = ("float32", "float16", "bfloat16")

PUBLISHED = Sizes(
    width=1024,
    inner=4096,
    heads=16,
    head_size=64,
    left=64,
    right=8,
    taps=31,
    vocabulary=32,
)
BATCHES = ((1500,) * 16, (150,))
"""Frames of each utterance: of 30 s, and of 3 s."""
COMPOSED = frozenset({"feed_forward"})
"""Operations whose Triton form calls other operations, and no launcher."""
WAVEFORMS = frozenset({"log_mel_filterbank", "normalize_and_stack"})
"""Operations in float32 alone, whose launchers look at lengths; these have a few frames each."""


@dataclass(frozen=True)
class Variant:
    """A call of an operation, and so of its gradient, that compiles kernels of its own.

    Attributes:
        sizes: other ones than those of the published checkpoint.
        changes: arguments that differ from the example's, of the call's sizes.
        form: what is called instead of the operation's Triton form.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    changes: Callable[[Sizes], Mapping[str, Any]] = lambda sizes: {}
    form: Callable[..., Any] | None = None


def _seqused(sizes: Sizes) -> Mapping[str, Any]:
    return {"seqused_k": torch.tensor([length - 1 for length in sizes.lengths]).int()}


def _dropout(sizes: Sizes) -> Mapping[str, Any]:
    return {"dropout_p": 0.1, "dropout_seed": torch.tensor([0, 0])}


# By operation; one that has no entry has one variant, which bears its name.
VARIANTS: dict[str, dict[str, Variant]] = {
    "residual_layer_norm": {
        "residual_layer_norm": Variant(),
        "residual_layer_norm_unscaled": Variant(changes=lambda sizes: {"scale": 1.0}),
    },
    "linear": {
        "linear_silu": Variant(),
        "linear": Variant(changes=lambda sizes: {"activation": None}),
        "linear_no_bias": Variant(changes=lambda sizes: {"activation": None, "bias": None}),
        # Whose last step over the features is no whole one.
        "linear_features": Variant(
            {"width": 160, "inner": 1024}, changes=lambda sizes: {"activation": None}
        ),
    },
    "linear_glu": {"linear_glu": Variant(changes=lambda sizes: {"bias": None})},
    "conv_norm_act": {"conv_norm_act": Variant(), "conv_norm_act_seqused": Variant({}, _seqused)},
    "shaw_attention": {
        "relative_key": Variant(),
        "no_positions": Variant(changes=lambda sizes: {"distance_embedding": None}),
        "relative_key_dropout": Variant({}, _dropout),
        "relative_key_seqused": Variant({}, _seqused),
    },
    "ctc_greedy": {
        "characters": Variant(),
        "word_pieces": Variant({"vocabulary": 32_000}),
    },
    "log_mel_filterbank": {
        "log_mel_filterbank": Variant(),
        # For devices without float64; no operation asks for it.
        "log_mel_filterbank_float32": Variant(
            form=lambda waveforms, cu_seqlens, *_: log_mel_filterbank(
                waveforms, cu_seqlens, compute_dtype=torch.float32
            )
        ),
    },
}


@dataclass(frozen=True)
class Shipped:
    """A kernel as a launcher has it compiled.

    Attributes:
        name: of the kernel and of the variant that launches it, and where the variant has several,
            the constants that tell it from the first: `slide/conv_norm_act/BACKWARDS=True`.
        dtype: of the activations.
        target: the GPU.
        request: what was asked of Triton.
    """

    name: str
    dtype: str
    target: Target
    request: Uncompiled


def variants(operation: str) -> Mapping[str, Variant]:
    """Those of an operation, or of a gradient."""
    forward = operation.removesuffix("_backward")
    return VARIANTS.get(forward, {forward: Variant()})


_LAUNCHERS = {name: f"csrc_triton.gemm:{name}" for name in ("linear", "linear_glu")}
"""Of operations that may run PyTorch's product instead."""


def launch(
    operation: str, variant: Variant, sizes: Sizes, dtype: str, device: str, **options: Any
) -> None:
    """Calls the launcher of an operation, with options that the launcher alone has."""
    form = variant.form or _LAUNCHERS.get(operation) or OPERATIONS[operation].triton
    if isinstance(form, str):
        module, _, name = form.partition(":")
        form = getattr(importlib.import_module(module), name)
    if form is None:
        return
    sizes = dataclasses.replace(sizes, **variant.sizes)
    changes = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in variant.changes(sizes).items()
    }
    # The gradient's arguments are the forward pass's, which comes first.
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device, "changes": changes}
    form(*example(operation, sizes, **kind), **options)


def launched_operations(dtype: str) -> list[str]:
    """The operations that launch kernels of a dtype."""
    return [
        operation
        for operation in OPERATIONS
        if operation not in COMPOSED and (operation not in WAVEFORMS or dtype == "float32")
    ]


def tiles(operation: str, dtype: str, arch: str) -> list[dict[str, Any]]:
    """Options of an operation's launcher: each tile that lengths choose from, where they do."""
    element = getattr(torch, dtype)
    candidates: tuple[Any, ...] = ()
    if operation in ("linear", "linear_glu"):
        candidates = linear_candidates(element, arch)
    elif operation == "conv_norm_act":
        candidates = conv_candidates(PUBLISHED.width, PUBLISHED.taps, element, arch)
    return [{"config": config} for config in candidates] or [{}]


def _launches(target: Target, dtype: str) -> Iterator[tuple[str, list[Uncompiled]]]:
    """What each call asks for, with the name of its variant."""
    for operation in launched_operations(dtype):
        for name, variant in variants(operation).items():
            with requests(target.gpu) as found, torch.no_grad():
                if operation in WAVEFORMS:
                    launch(operation, variant, Sizes(), dtype, "cpu")
                else:
                    options = tiles(operation, dtype, target.arch)
                    for lengths, chosen in itertools.product(BATCHES, options):
                        sizes = dataclasses.replace(PUBLISHED, lengths=lengths)
                        launch(operation, variant, sizes, dtype, "meta", **chosen)
            yield name, found


def _differences(first: Uncompiled, other: Uncompiled) -> list[str]:
    """The constants that another launch has, or else the arguments about which it hints at more
    or less."""
    constants = other.constants.items() - first.constants.items()
    found = [f"{n}={v}" for n, v in other.constants.items() if (n, v) in constants]
    return found or [a.name for a in other.arguments
                     if other.hints.get(a.name) != first.hints.get(a.name)]  # fmt: skip


@functools.cache
def shipped_kernels(target: Target, dtype: str) -> tuple[Shipped, ...]:
    """All kernels that the launchers have compiled for activations of a dtype.

    Args:
        target: the GPU.
        dtype: "float16", "bfloat16" or "float32".
    """
    kernels: dict[str, Shipped] = {}
    keys: set[str] = set()
    for variant, found in _launches(target, dtype):
        for request in found:
            if request.key in keys:
                continue
            keys.add(request.key)
            name = f"{request.name}/{variant}"
            if name in kernels:
                name += "/" + ",".join(_differences(kernels[name].request, request))
            assert name not in kernels, name
            kernels[name] = Shipped(name, dtype, target, request)
    return tuple(kernels.values())
