"""Candidates for a training step: this library, and transformers in each of its configurations.

A pass over the workload is the forward and backward pass of every batch, gradients added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import training
from bench.context import Context, gather
from bench.flops import reference_bytes
from bench.machine import DTYPES
from bench.measure import Candidate, Prepared, joined
from bench.peers.pytorch import compile_layers, in_batches, with_weights
from bench.workloads import batches

BATCHINGS = ("one by one", "padded batch")
CONFIGURATIONS = (("sdpa", ""), ("eager", ""), ("sdpa", "compiled"), ("eager", "compiled"))


def candidates(context: Context, dtypes: tuple[str, ...]) -> Iterator[Candidate]:
    """Ours, then transformers', for a workload of training."""
    modes = [(dtype, mode) for dtype in dtypes for mode in training.MODES[dtype]]
    for dtype, mode in modes:
        build = partial(_ours, context, dtype, mode)
        yield Candidate("w2vbert_fast", mode, dtype, build, memory=True)
    several = len(context.features) > 1
    for dtype, mode in modes:
        for attention, compiled, batching in in_batches(context, CONFIGURATIONS, BATCHINGS):
            yield Candidate(
                "transformers",
                joined(attention, compiled, batching if several else "", mode),
                dtype,
                partial(_transformers, context, dtype, mode, attention, compiled, batching),
                bytes_needed=_needed(context, dtype, batching),
                # Memory is for one long utterance.
                memory=not several,
            )


def _needed(context: Context, dtype: str, batching: str) -> int:
    """What every layer keeps for its backward pass: position vectors and maps of the attention, and
    some 30 values a token and channel."""
    config, size = context.our_config(), DTYPES[dtype].itemsize

    def kept(lengths: list[int]) -> int:
        values = 30 * len(lengths) * max(lengths) * config.hidden_size
        return context.layers * (reference_bytes(config, lengths, size) + size * values)

    return context.largest(batching, kept)


def _ours(context: Context, dtype: str, mode: str) -> Prepared:
    import w2vbert_fast

    config = w2vbert_fast.Wav2Vec2BertConfig(**training.config_values(context))
    weights = training.weights(context, training.weights_dtype(dtype, mode))
    model = with_weights(w2vbert_fast.Wav2Vec2BertForCTC, config, weights)
    model.train().use_fast_kernels = True
    return _prepared(context, model, dtype, mode, batches(context.features, "padded batch"))


def _transformers(
    context: Context, dtype: str, mode: str, attention: str, compiled: str, batching: str
) -> Prepared:
    model = training.reference(context, training.weights_dtype(dtype, mode), attention)
    prepared = _prepared(context, model, dtype, mode, batches(context.features, batching))
    if compiled:

        def twice() -> None:  # a layer whose weights have gradients already is compiled once more
            prepared.run()
            prepared.run()

        layers = model.wav2vec2_bert.encoder.layers
        compile_layers(layers, compiled, len(context.features) == 1, twice)
        prepared.reset()
    return prepared


def _prepared(
    context: Context, model: nn.Module, dtype: str, mode: str, groups: list[list[int]]
) -> Prepared:
    stored = training.weights_dtype(dtype, mode)
    targets = training.labels(context)
    inputs = []
    for rows in groups:
        wanted = training.padded_labels([targets[i] for i in rows]).to(context.device)
        inputs.append((context.batch(rows, DTYPES[stored]), wanted))
    autocast: Callable[[], Any] = partial(
        torch.autocast, context.device.type, torch.bfloat16, enabled=mode == "autocast"
    )

    def run() -> list[Tensor]:
        logits = []
        with training.recording():
            for batch, wanted in inputs:
                with autocast():
                    output = model(**batch).logits
                training.loss(output, wanted).backward()
                logits.append(output.detach())
        return logits

    def collect(logits: list[Tensor]) -> list[training.Errors]:
        errors = training.truth(context, stored).errors(
            gather(groups, context.lengths, logits), model
        )
        model.zero_grad()
        return [errors]

    return Prepared(run, collect, parameters=tuple(model.parameters()), reset=model.zero_grad)
